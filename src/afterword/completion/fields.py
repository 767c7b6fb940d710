"""One field of a request at a time: a JSON value to a plain one, or an error that names the field.

A parser takes (name, value, limits); a value is never None here. Wording follows the API's own where it is on record.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from afterword.completion.limits import Limits
from afterword.errors import RequestError

Prompt = str | tuple[int, ...] | None
Parser = Callable[[str, Any, Limits], Any]

_LONGEST_STOP = 1024


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """`include_obfuscation` is accepted and has no effect: this endpoint's chunks have no such field."""

    include_usage: bool = False
    include_obfuscation: bool = False
    continuous_usage_stats: bool = False


# ---- plain values


def integer(low: int, high: int | Callable[[Limits], int]) -> Parser:
    """Integers in a range; 16.0 is one, true is not."""

    def parse(name: str, value: Any, limits: Limits) -> int:
        number = as_integer(value)
        if number is None:
            raise _wrong_type(name, value, "an integer")
        highest = high(limits) if callable(high) else high
        if not low <= number <= highest:
            raise _out_of_range(name, number, low, highest, "integer")
        return number

    return parse


def decimal(low: float, high: float) -> Parser:
    """Numbers in a range."""

    def parse(name: str, value: Any, _: Limits) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _wrong_type(name, value, "a decimal")
        if not low <= value <= high:  # in this form, so that NaN cannot pass
            raise _out_of_range(name, value, low, high, "decimal")
        return float(value)

    return parse


def boolean(name: str, value: Any, _: Limits) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise _wrong_type(name, value, "a boolean")
    return value


def string(name: str, value: Any, _: Limits) -> str:
    """Any text."""
    if not isinstance(value, str):
        raise _wrong_type(name, value, "a string")
    return value


def filled_string(name: str, value: Any, limits: Limits) -> str:
    """A string that is not empty."""
    text = string(name, value, limits)
    if not text:
        raise RequestError(f"Invalid '{name}': empty string. Expected at least one character.", param=name)
    return text


def as_integer(value: object) -> int | None:
    """JSON's integers: 16 and 16.0, never true."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


# ---- fields with a shape of their own


def logprobs(name: str, value: Any, limits: Limits) -> int:
    """How many alternatives to report. Strictly, more than allowed means as many as allowed."""
    wanted: int = integer(0, 2**31 - 1 if limits.strict else limits.max_logprobs)(name, value, limits)
    return min(wanted, limits.max_logprobs)


def top_k(name: str, value: Any, limits: Limits) -> int:
    """How many of the likeliest tokens may be drawn; 0 and -1 both mean all."""
    wanted: int = integer(-1, 2**31 - 1)(name, value, limits)
    return max(0, wanted)


def prompt(name: str, value: Any, _: Limits) -> tuple[Prompt, ...]:
    """The four forms: a text, texts, token ids, lists of token ids."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list):
        if not value:
            raise _empty_array(name)
        if all(isinstance(item, str) for item in value):
            return tuple(value)
        if (ids := _integers(value)) is not None:
            return (ids,)
        lists = [_integers(item) for item in value if isinstance(item, list)]
        if len(lists) == len(value) and all(lists):
            return tuple(lists)
    expected = "one of a string, an array of strings, an array of integers, or an array of arrays of integers"
    raise _wrong_type(name, value, expected)


def token_ids(name: str, value: Any, limits: Limits) -> tuple[int, ...]:
    """A list of token ids, perhaps empty."""
    ids = _integers(value) if isinstance(value, list) else None
    if ids is None:
        raise _wrong_type(name, value, "an array of integers")
    if len(ids) > limits.max_bias:
        raise _too_long(name, "array", limits.max_bias, len(ids))
    return ids


def stop(name: str, value: Any, limits: Limits) -> tuple[str, ...]:
    """One or several texts, none of them empty."""
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(text, str) for text in stops):
        raise _wrong_type(name, value, "one of a string or an array of strings")
    if not stops:
        raise _empty_array(name)
    if len(stops) > limits.max_stop:
        raise _too_long(name, "array", limits.max_stop, len(stops))
    for text in stops:
        if not text:
            message = "empty string. Expected a string with minimum length 1, but got an empty string instead."
            raise RequestError(f"Invalid '{name}': {message}", param=name, code="empty_string")
        if len(text) > _LONGEST_STOP:
            raise _too_long(name, "string", _LONGEST_STOP, len(text))
    return tuple(stops)


def logit_bias(name: str, value: Any, limits: Limits) -> tuple[tuple[int, float], ...]:
    """Token ids, as decimal strings, to what is added to their logits."""
    if not isinstance(value, dict):
        raise _wrong_type(name, value, "an object")
    if len(value) > limits.max_bias:
        raise RequestError(f"Invalid '{name}': at most {limits.max_bias} tokens may be biased.", param=name)
    return tuple((_bias_key(name, key), _bias_value(name, bias)) for key, bias in value.items())


def stream_options(name: str, value: Any, limits: Limits) -> StreamOptions:
    """What a stream carries beside its text."""
    if not isinstance(value, dict):
        raise _wrong_type(name, value, "an object")
    known = {"include_usage", "include_obfuscation"} | (set() if limits.strict else {"continuous_usage_stats"})
    for key in value:
        if key not in known:
            path = f"{name}.{key[:64]}"
            raise RequestError(f"Unknown parameter: '{path}'.", param=path, code="unknown_parameter")
    given = {key: item for key, item in value.items() if item is not None}
    return StreamOptions(**{key: boolean(f"{name}.{key}", item, limits) for key, item in given.items()})


def _integers(items: Iterable[Any]) -> tuple[int, ...] | None:
    """Integers, or None if something else is among them."""
    ids = tuple(as_integer(item) for item in items)
    return None if None in ids else ids  # type: ignore[return-value]


def _bias_key(name: str, key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) <= 10 and key == str(int(key))):
        raise RequestError(
            f"Invalid key in '{name}': {key[:32]}. You should only be submitting non-negative integers.", param=name
        )
    return int(key)


def _bias_value(name: str, bias: Any) -> float:
    number = bias if isinstance(bias, int | float) and not isinstance(bias, bool) else math.nan
    if not -100 <= number <= 100:
        shown = str(bias)[:32] if type(bias) in (int, float) else _kind(bias)
        raise RequestError(f"Invalid value in '{name}': {shown}. Values must be between -100 and 100.", param=name)
    return float(number)


# ---- errors


def _wrong_type(name: str, value: object, expected: str) -> RequestError:
    message = f"Invalid type for '{name}': expected {expected}, but got {_kind(value)} instead."
    return RequestError(message, param=name, code="invalid_type")


def _kind(value: object) -> str:
    kinds = {bool: "a boolean", int: "an integer", float: "a decimal number", str: "a string", list: "an array"}
    return "null" if value is None else kinds.get(type(value), "an object")


def _out_of_range(name: str, value: float, low: float, high: float, kind: str) -> RequestError:
    above = value > high
    return RequestError(
        f"Invalid '{name}': {kind} {'above maximum' if above else 'below minimum'} value. Expected a value "
        f"{'<=' if above else '>='} {high if above else low}, but got {str(value)[:32]} instead.",
        param=name,
        code=f"{kind}_{'above_max' if above else 'below_min'}_value",
    )


def _empty_array(name: str) -> RequestError:
    message = "empty array. Expected an array with minimum length 1, but got an empty array instead."
    return RequestError(f"Invalid '{name}': {message}", param=name, code="empty_array")


def _too_long(name: str, kind: str, limit: int, length: int) -> RequestError:
    return RequestError(
        f"Invalid '{name}': {kind} too long. Expected {'an' if kind == 'array' else 'a'} {kind} with maximum length "
        f"{limit}, but got {'an' if kind == 'array' else 'a'} {kind} with length {length} instead.",
        param=name,
        code=f"{kind}_above_max_length",
    )
