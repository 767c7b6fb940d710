"""Parsers for the fields of a request: each checks one JSON value and converts it, or raises `RequestError`.

A parser takes (name, value, limits). A value is never None here. Error messages use OpenAI's wording where it was
recorded. Each parser has a JSON Schema of the values that it accepts, for `/openapi.json`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from afterword.completion.field_errors import empty_array, kind_of, out_of_range, too_long, wrong_type
from afterword.completion.request_limits import RequestLimits
from afterword.errors import RequestError

Prompt = str | tuple[int, ...] | None
Parser = Callable[[str, Any, RequestLimits], Any]
JsonSchema = dict[str, Any]

_LONGEST_STOP = 1024  # characters
_SLICE = 2**16  # items of an array that are checked in one step
_STOP: JsonSchema = {"type": "string", "minLength": 1, "maxLength": _LONGEST_STOP}
_IDS: JsonSchema = {"type": "array", "items": {"type": "integer"}}


@dataclass(frozen=True, slots=True)
class Field:
    """A parser, and the JSON Schema of the values that it accepts. Null is not among them: it means an absent field."""

    parse: Parser
    schema: Callable[[RequestLimits], JsonSchema]

    def __call__(self, name: str, value: Any, limits: RequestLimits) -> Any:
        return self.parse(name, value, limits)


def field_parser(schema: JsonSchema | Callable[[RequestLimits], JsonSchema]) -> Callable[[Parser], Field]:
    """A decorator that makes a `Field` of a parser."""
    return lambda parse: Field(parse, schema if callable(schema) else lambda _: schema)


# ---- plain values


def integer(low: int, high: int | Callable[[RequestLimits], int]) -> Field:
    """A field for integers from `low` to `high`. 16.0 is accepted, true is not."""

    def highest_of(limits: RequestLimits) -> int:
        return high(limits) if callable(high) else high

    @field_parser(lambda limits: {"type": "integer", "minimum": low, "maximum": highest_of(limits)})
    def parse(name: str, value: Any, limits: RequestLimits) -> int:
        number = as_integer(value)
        if number is None:
            raise wrong_type(name, value, "an integer")
        highest = highest_of(limits)
        if not low <= number <= highest:
            raise out_of_range(name, number, low, highest, "integer")
        return number

    return parse


def decimal(low: float, high: float) -> Field:
    """A field for numbers from `low` to `high`."""

    @field_parser({"type": "number", "minimum": low, "maximum": high})
    def parse(name: str, value: Any, _: RequestLimits) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong_type(name, value, "a decimal")
        if not low <= value <= high:  # in this form, so that NaN cannot pass
            raise out_of_range(name, value, low, high, "decimal")
        return float(value)

    return parse


@field_parser({"type": "boolean"})
def boolean(name: str, value: Any, _: RequestLimits) -> bool:
    if not isinstance(value, bool):
        raise wrong_type(name, value, "a boolean")
    return value


@field_parser({"type": "string"})
def string(name: str, value: Any, _: RequestLimits) -> str:
    if not isinstance(value, str):
        raise wrong_type(name, value, "a string")
    return value


@field_parser({"type": "array", "items": {"type": "string"}})
def strings(name: str, value: Any, _: RequestLimits) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise wrong_type(name, value, "an array of strings")
    return tuple(value)


def bounded(name: str, texts: tuple[str, ...], most: int, longest: int, characters: int) -> tuple[str, ...]:
    """The texts. Raises `RequestError` for too many, for one that is too long, and for too many characters of all."""
    if len(texts) > most:
        raise too_long(name, "array", most, len(texts))
    length = max(map(len, texts), default=0)
    if length > longest:
        raise too_long(name, "string", longest, length)
    if sum(map(len, texts)) > characters:
        raise RequestError(f"Invalid '{name}': more than {characters} characters in total.", param=name)
    return texts


@field_parser(lambda limits: {"type": "string", "maxLength": limits.max_name})
def name_string(name: str, value: Any, limits: RequestLimits) -> str:
    """A string of at most `limits.max_name` characters, for `model` and `user`."""
    text: str = string(name, value, limits)
    if len(text) > limits.max_name:
        raise too_long(name, "string", limits.max_name, len(text))
    return text


@field_parser(lambda limits: {"type": "string", "minLength": 1, "maxLength": limits.max_salt})
def salt(name: str, value: Any, limits: RequestLimits) -> str:
    """A string of 1 to `limits.max_salt` characters, for `cache_salt`."""
    text: str = string(name, value, limits)
    if not text:
        raise RequestError(f"Invalid '{name}': empty string. Expected at least one character.", param=name)
    if len(text) > limits.max_salt:
        raise too_long(name, "string", limits.max_salt, len(text))
    return text


def as_integer(value: object) -> int | None:
    """The value as an integer: 16 for 16 and for 16.0. None for any other value, also for true."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


# ---- fields with their own formats


@field_parser(lambda limits: {"type": "integer", "minimum": 0 if limits.strict else -1, "maximum": _most(limits)})
def logprobs(name: str, value: Any, limits: RequestLimits) -> int:
    """The number of alternatives to report; -1 for all of the vocabulary, which `vocabulary_fields` checks.

    With `limits.strict` it is not negative, and a number above the maximum means the maximum.
    """
    wanted: int = integer(0 if limits.strict else -1, _most)(name, value, limits)
    return min(wanted, limits.most_logprobs)


@field_parser({"type": "integer", "minimum": -1, "maximum": 2**31 - 1})
def top_k(name: str, value: Any, limits: RequestLimits) -> int:
    """The number of most likely tokens to sample from. 0 and -1 mean all; the result is then 0."""
    wanted: int = integer(-1, 2**31 - 1)(name, value, limits)
    return max(0, wanted)


@field_parser(
    {
        "anyOf": [
            {"type": "string"},
            {"type": "array", "minItems": 1, "items": {"type": "string"}},
            _IDS | {"minItems": 1},
            {"type": "array", "minItems": 1, "items": _IDS | {"minItems": 1}},
        ]
    }
)
def prompt(name: str, value: Any, _: RequestLimits) -> tuple[Prompt, ...]:
    """One of four forms: a string, an array of strings, an array of token ids, an array of arrays of token ids."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list):
        if not value:
            raise empty_array(name)
        if all(isinstance(item, str) for item in value):
            return tuple(value)
        if (ids := _integers(value)) is not None:
            return (ids,)
        lists = [_integers(item) for item in value if isinstance(item, list)]
        if len(lists) == len(value) and all(lists):
            return tuple(lists)
    expected = "one of a string, an array of strings, an array of integers, or an array of arrays of integers"
    raise wrong_type(name, value, expected)


@field_parser(lambda limits: _IDS | {"maxItems": limits.max_bias})
def token_ids(name: str, value: Any, limits: RequestLimits) -> tuple[int, ...]:
    """An array of at most `limits.max_bias` token ids; it may be empty."""
    ids = _integers(value) if isinstance(value, list) else None
    if ids is None:
        raise wrong_type(name, value, "an array of integers")
    if len(ids) > limits.max_bias:
        raise too_long(name, "array", limits.max_bias, len(ids))
    return ids


@field_parser(_IDS | {"minItems": 1})
def some_token_ids(name: str, value: Any, _: RequestLimits) -> tuple[int, ...]:
    """An array of at least one token id."""
    ids = _integers(value) if isinstance(value, list) else None
    if ids is None:
        raise wrong_type(name, value, "an array of integers")
    if not ids:
        raise empty_array(name)
    return ids


ReportedIds = tuple[int, ...] | tuple[tuple[int, ...], ...]


@field_parser(
    lambda limits: {
        "anyOf": [
            _IDS | {"minItems": 1, "maxItems": limits.max_bias},
            {"type": "array", "minItems": 1, "items": _IDS | {"maxItems": limits.max_bias}},
        ]
    }
)
def reported_token_ids(name: str, value: Any, limits: RequestLimits) -> ReportedIds:
    """An array of 1 to `limits.max_bias` token ids, or one for each position, which may be empty.

    An id is kept once in each array.
    """
    if isinstance(value, list) and value and all(isinstance(item, list) for item in value):
        return tuple(tuple(dict.fromkeys(token_ids(name, item, limits))) for item in value)
    if isinstance(value, list) and any(isinstance(item, list) for item in value):
        raise wrong_type(name, value, "an array of integers or an array of arrays of integers")
    ids: tuple[int, ...] = token_ids(name, value, limits)
    if not ids:
        raise empty_array(name)
    return tuple(dict.fromkeys(ids))


@field_parser({"anyOf": [{"const": -1}, {"type": "integer", "minimum": 1, "maximum": 2**63 - 1}]})
def truncation(name: str, value: Any, limits: RequestLimits) -> int:
    """The number of tokens to keep; -1 for as many as fit."""
    kept: int = integer(-1, 2**63 - 1)(name, value, limits)
    if kept == 0:
        raise RequestError(f"Invalid '{name}': expected -1 or a value >= 1, but got 0 instead.", param=name)
    return kept


def one_of(*values: str) -> Field:
    """A field for one of these strings."""

    @field_parser({"enum": list(values)})
    def parse(name: str, value: Any, limits: RequestLimits) -> str:
        text: str = string(name, value, limits)
        if text not in values:
            raise RequestError(f"Invalid '{name}'. Supported values are {', '.join(values)}.", param=name)
        return text

    return parse


@field_parser(
    lambda limits: {
        "anyOf": [
            _STOP,
            {"type": "array", "minItems": int(limits.strict), "maxItems": limits.max_stop, "items": _STOP},
        ],
    }
)
def stop(name: str, value: Any, limits: RequestLimits) -> tuple[str, ...]:
    """One string or an array of strings, none of them empty. With `limits.strict`, an empty array is an error."""
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(text, str) for text in stops):
        raise wrong_type(name, value, "one of a string or an array of strings")
    if not stops and limits.strict:
        raise empty_array(name)
    if len(stops) > limits.max_stop:
        raise too_long(name, "array", limits.max_stop, len(stops))
    for text in stops:
        if not text:
            message = "empty string. Expected a string with minimum length 1, but got an empty string instead."
            raise RequestError(f"Invalid '{name}': {message}", param=name, code="empty_string")
        if len(text) > _LONGEST_STOP:
            raise too_long(name, "string", _LONGEST_STOP, len(text))
    return tuple(stops)


@field_parser(
    lambda limits: {
        "type": "object",
        "maxProperties": limits.max_bias,
        "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,9})$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    }
)
def logit_bias(name: str, value: Any, limits: RequestLimits) -> tuple[tuple[int, float], ...]:
    """Pairs of token id and bias, from an object with decimal token ids as keys."""
    if not isinstance(value, dict):
        raise wrong_type(name, value, "an object")
    if len(value) > limits.max_bias:
        raise RequestError(f"Invalid '{name}': at most {limits.max_bias} tokens can have a bias.", param=name)
    return tuple((_bias_key(name, key), _bias_value(name, bias)) for key, bias in value.items())


def _most(limits: RequestLimits) -> int:
    return 2**31 - 1 if limits.strict else limits.most_logprobs


def _integers(items: list[Any]) -> tuple[int, ...] | None:
    """The items as integers, or None if an item is not one. Checked in slices: each holds the interpreter's lock."""
    ids: list[Any] = []
    for start in range(0, len(items), _SLICE):
        part = items[start : start + _SLICE]
        if set(map(type, part)) != {int}:
            part = [as_integer(item) for item in part]
            if None in part:
                return None
        ids += part
    return tuple(ids)


def _bias_key(name: str, key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) <= 10 and key == str(int(key))):
        raise RequestError(
            f"Invalid key in '{name}': {key[:32]}. You should only be submitting non-negative integers.", param=name
        )
    return int(key)


def _bias_value(name: str, bias: Any) -> float:
    number = bias if isinstance(bias, int | float) and not isinstance(bias, bool) else math.nan
    if not -100 <= number <= 100:
        shown = str(bias)[:32] if type(bias) in (int, float) else kind_of(bias)
        raise RequestError(f"Invalid value in '{name}': {shown}. Values must be between -100 and 100.", param=name)
    return float(number)
