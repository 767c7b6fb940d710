"""The caller's JSON, parsed once: bytes to a `Request`, or an error that names the field.

Left of the plan values may be absent, so absent fields are None or the API's default here. What depends on the
model (ids, context, infill) is the plan's to check. Wording follows the API's own where it is on record.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import msgspec

from afterword.errors import RequestError

Prompt = str | tuple[int, ...] | None

_BAD_JSON = (
    "We could not parse the JSON body of your request. (HINT: This likely means you aren't using your HTTP library "
    "correctly. The OpenAI API expects a JSON payload, but what was sent was not valid JSON.)"
)
_INT64 = 2**63
_LONGEST_STOP = 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one request may ask for. Above OpenAI's own limits where that does no harm."""

    max_logprobs: int = 20
    max_stop: int = 16
    max_n: int = 128
    max_best_of: int = 20
    max_completions: int = 2048
    max_bias: int = 1024


@dataclass(frozen=True, slots=True)
class Request:
    """A request body. Field order and meaning are the API reference's."""

    model: str | None = None
    prompt: tuple[Prompt, ...] = (None,)
    best_of: int | None = None
    echo: bool = False
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    max_tokens: int = 16
    n: int = 1
    presence_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    stream_options: StreamOptions | None = None
    suffix: str | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    user: str | None = None


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """`include_obfuscation` is accepted and has no effect: this endpoint's chunks have no such field."""

    include_usage: bool = False
    include_obfuscation: bool = False


def parse(body: bytes, limits: Limits) -> Request:
    """A request from its body. Raises `RequestError`; nothing of the body but field names and numbers is quoted."""
    values = parse_object(body)
    for name in values:
        if name not in FIELDS:
            raise RequestError(
                f"Unrecognized request argument supplied: {name[:64]}",
                param=name[:64],
                code="unknown_parameter",
            )
    request = Request(
        **{name: FIELDS[name](name, value, limits) for name, value in values.items() if value is not None}
    )
    _check_together(request, limits)
    return request


def parse_object(body: bytes) -> dict[str, Any]:
    """A JSON object as a dict. Strict: UTF-8, no NaN, no lone surrogates, bounded depth."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise RequestError(_BAD_JSON) from None
    if not isinstance(value, dict):
        raise RequestError(_BAD_JSON)
    return value


def _check_together(request: Request, limits: Limits) -> None:
    """Rules about several fields at once."""
    best_of = request.n if request.best_of is None else request.best_of
    if request.n > best_of:
        raise RequestError(
            "You requested that the server return more choices than it will generate (HINT: you must set 'n' "
            f"(currently {request.n}) to be at most 'best_of' (currently {best_of}), or omit either parameter if you "
            "don't specifically want to use them.)"
        )
    if request.stream and best_of > request.n:
        raise RequestError(
            "Results cannot be streamed when 'best_of' is greater than 'n'. (HINT: set 'best_of' to at most 'n', or "
            "set 'stream' to false.)",
            param="best_of",
        )
    if request.stream_options is not None and not request.stream:
        raise RequestError(
            "The 'stream_options' parameter is only allowed when 'stream' is enabled.", param="stream_options"
        )
    if request.max_tokens == 0:
        _check_scoring(request)
    if request.suffix and request.echo and request.logprobs is not None:
        raise RequestError(
            "'suffix' cannot be combined with 'echo' and 'logprobs' together: the model reads the suffix before it "
            "writes, so the prompt's log probabilities are not those of the prompt alone.",
            param="suffix",
        )
    if len(request.prompt) * best_of > limits.max_completions:
        raise RequestError(
            f"Too many parallel completions requested. You submitted {len(request.prompt)} prompts with {best_of} "
            f"completions each, but you can request at most {limits.max_completions} in total.",
            param="prompt",
        )


def _check_scoring(request: Request) -> None:
    if not request.echo:
        raise RequestError(
            "You requested a length 0 completion, but you did not set the 'echo' parameter. That means that we will "
            "return no data to you. (HINT: set 'echo' to true in order for the API to echo back the prompt to you.)"
        )
    if request.logprobs is None:
        raise RequestError(
            "You requested a length 0 completion, but did not specify a 'logprobs' parameter to see the probability "
            "of each token. Either request a completion with length greater than 1, or set 'logprobs' to 0 (to see "
            "the probabilities of each token you submitted) or more (to also see the probabilities over alternative "
            "tokens)."
        )


# ---- one field at a time: (name, value, limits) -> parsed value; a value is never None here

Parser = Callable[[str, Any, Limits], Any]


def _wrong_type(name: str, value: object, expected: str) -> RequestError:
    return RequestError(
        f"Invalid type for '{name}': expected {expected}, but got {_kind(value)} instead.",
        param=name,
        code="invalid_type",
    )


def _kind(value: object) -> str:
    kinds = {
        bool: "a boolean",
        int: "an integer",
        float: "a decimal number",
        str: "a string",
        list: "an array",
    }
    return "null" if value is None else kinds.get(type(value), "an object")


def as_integer(value: object) -> int | None:
    """JSON's integers: 16 and 16.0, never true."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _out_of_range(name: str, value: float, low: float, high: float, kind: str) -> RequestError:
    above = value > high
    return RequestError(
        f"Invalid '{name}': {kind} {'above maximum' if above else 'below minimum'} value. Expected a value "
        f"{'<=' if above else '>='} {high if above else low}, but got {str(value)[:32]} instead.",
        param=name,
        code=f"{kind}_{'above_max' if above else 'below_min'}_value",
    )


def _integer(low: int, high: int | Callable[[Limits], int]) -> Parser:
    def parse_integer(name: str, value: Any, limits: Limits) -> int:
        number = as_integer(value)
        if number is None:
            raise _wrong_type(name, value, "an integer")
        highest = high(limits) if callable(high) else high
        if not low <= number <= highest:
            raise _out_of_range(name, number, low, highest, "integer")
        return number

    return parse_integer


def _number(low: int, high: int) -> Parser:
    def parse_number(name: str, value: Any, _: Limits) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _wrong_type(name, value, "a decimal")
        if not low <= value <= high:  # in this form, so that NaN cannot pass
            raise _out_of_range(name, value, low, high, "decimal")
        return float(value)

    return parse_number


def _boolean(name: str, value: Any, _: Limits) -> bool:
    if not isinstance(value, bool):
        raise _wrong_type(name, value, "a boolean")
    return value


def _string(name: str, value: Any, _: Limits) -> str:
    if not isinstance(value, str):
        raise _wrong_type(name, value, "a string")
    return value


def _prompt(name: str, value: Any, _: Limits) -> tuple[Prompt, ...]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list):
        if not value:
            raise RequestError(
                "Invalid 'prompt': empty array. Expected an array with minimum length 1, but got an empty array "
                "instead.",
                param=name,
                code="empty_array",
            )
        if all(isinstance(item, str) for item in value):
            return tuple(value)
        if (ids := _token_ids(value)) is not None:
            return (ids,)
        lists = [_token_ids(item) for item in value if isinstance(item, list)]
        if len(lists) == len(value) and all(lists):
            return tuple(lists)
    expected = "one of a string, an array of strings, an array of integers, or an array of arrays of integers"
    raise _wrong_type(name, value, expected)


def _token_ids(items: list[Any]) -> tuple[int, ...] | None:
    """Integers, or None if something else is among them."""
    ids = tuple(as_integer(item) for item in items)
    return None if None in ids else ids  # type: ignore[return-value]


def _stop(name: str, value: Any, limits: Limits) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise _wrong_type(name, value, "one of a string or an array of strings")
    if not stops:
        message = "empty array. Expected an array with minimum length 1, but got an empty array instead."
        raise RequestError(f"Invalid 'stop': {message}", param=name, code="empty_array")
    if len(stops) > limits.max_stop:
        raise RequestError(
            f"Invalid 'stop': array too long. Expected an array with maximum length {limits.max_stop}, but got an "
            f"array with length {len(stops)} instead.",
            param=name,
            code="array_above_max_length",
        )
    for stop in stops:
        if not stop:
            message = "empty string. Expected a string with minimum length 1, but got an empty string instead."
            raise RequestError(f"Invalid 'stop': {message}", param=name, code="empty_string")
        if len(stop) > _LONGEST_STOP:
            raise RequestError(
                f"Invalid 'stop': string too long. Expected a string with maximum length {_LONGEST_STOP}, but got a "
                f"string with length {len(stop)} instead.",
                param=name,
                code="string_above_max_length",
            )
    return tuple(stops)


def _logit_bias(name: str, value: Any, limits: Limits) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, dict):
        raise _wrong_type(name, value, "an object")
    if len(value) > limits.max_bias:
        raise RequestError(f"Invalid 'logit_bias': at most {limits.max_bias} tokens may be biased.", param=name)
    return tuple((_bias_key(key), _bias_value(bias)) for key, bias in value.items())


def _bias_key(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) <= 10 and key == str(int(key))):
        raise RequestError(
            f"Invalid key in 'logit_bias': {key[:32]}. You should only be submitting non-negative integers.",
            param="logit_bias",
        )
    return int(key)


def _bias_value(bias: Any) -> float:
    number = bias if isinstance(bias, int | float) and not isinstance(bias, bool) else math.nan
    if not -100 <= number <= 100:
        shown = str(bias)[:32] if type(bias) in (int, float) else _kind(bias)
        raise RequestError(
            f"Invalid value in 'logit_bias': {shown}. Values must be between -100 and 100.",
            param="logit_bias",
        )
    return float(number)


def _stream_options(name: str, value: Any, limits: Limits) -> StreamOptions:
    if not isinstance(value, dict):
        raise _wrong_type(name, value, "an object")
    known = {field.name for field in fields(StreamOptions)}
    for key in value:
        if key not in known:
            path = f"{name}.{key[:64]}"
            raise RequestError(f"Unknown parameter: '{path}'.", param=path, code="unknown_parameter")
    given = {key: item for key, item in value.items() if item is not None}
    return StreamOptions(**{key: _boolean(f"{name}.{key}", item, limits) for key, item in given.items()})


FIELDS: dict[str, Parser] = {
    "model": _string,
    "prompt": _prompt,
    "best_of": _integer(0, lambda limits: limits.max_best_of),
    "echo": _boolean,
    "frequency_penalty": _number(-2, 2),
    "logit_bias": _logit_bias,
    "logprobs": _integer(0, lambda limits: limits.max_logprobs),
    "max_tokens": _integer(0, 2**31 - 1),
    "n": _integer(1, lambda limits: limits.max_n),
    "presence_penalty": _number(-2, 2),
    "seed": _integer(-_INT64, _INT64 - 1),
    "stop": _stop,
    "stream": _boolean,
    "stream_options": _stream_options,
    "suffix": _string,
    "temperature": _number(0, 2),
    "top_p": _number(0, 1),
    "user": _string,
}
"""Every field that a request may have. An unknown one is refused by name."""
