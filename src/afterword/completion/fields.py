"""Parsers for the fields of a request: each checks one JSON value and converts it, or raises `RequestError`.

A parser takes (name, value, limits). A value is never None here. Error messages use OpenAI's wording where it was
recorded. Each parser has a JSON Schema of the values that it accepts, for `/openapi.json`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from afterword.completion.request_limits import RequestLimits
from afterword.errors import RequestError

Prompt = str | tuple[int, ...] | None
Parser = Callable[[str, Any, RequestLimits], Any]
JsonSchema = dict[str, Any]

_LONGEST_STOP = 1024  # characters
_SLICE = 2**16  # items of an array that are checked in one step
_STOP: JsonSchema = {"type": "string", "minLength": 1, "maxLength": _LONGEST_STOP}
_IDS: JsonSchema = {"type": "array", "items": {"type": "integer"}}
_TEXT_PART: JsonSchema = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """The field `stream_options`. `include_obfuscation` has no effect: chunks of this endpoint have no such field."""

    include_usage: bool = False
    include_obfuscation: bool = False
    continuous_usage_stats: bool = False


@dataclass(frozen=True, slots=True)
class ContextFile:
    """Another file that the model reads before the prompt: an item of `input_extra`."""

    text: str
    filename: str = "tmp"  # llama-server's name for a file without one


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
            raise _wrong_type(name, value, "an integer")
        highest = highest_of(limits)
        if not low <= number <= highest:
            raise _out_of_range(name, number, low, highest, "integer")
        return number

    return parse


def decimal(low: float, high: float) -> Field:
    """A field for numbers from `low` to `high`."""

    @field_parser({"type": "number", "minimum": low, "maximum": high})
    def parse(name: str, value: Any, _: RequestLimits) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _wrong_type(name, value, "a decimal")
        if not low <= value <= high:  # in this form, so that NaN cannot pass
            raise _out_of_range(name, value, low, high, "decimal")
        return float(value)

    return parse


@field_parser({"type": "boolean"})
def boolean(name: str, value: Any, _: RequestLimits) -> bool:
    if not isinstance(value, bool):
        raise _wrong_type(name, value, "a boolean")
    return value


@field_parser({"type": "string"})
def string(name: str, value: Any, _: RequestLimits) -> str:
    if not isinstance(value, str):
        raise _wrong_type(name, value, "a string")
    return value


@field_parser({"type": "array", "items": {"type": "string"}})
def strings(name: str, value: Any, _: RequestLimits) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise _wrong_type(name, value, "an array of strings")
    return tuple(value)


@field_parser(lambda limits: {"type": "string", "maxLength": limits.max_name})
def name_string(name: str, value: Any, limits: RequestLimits) -> str:
    """A string of at most `limits.max_name` characters, for `model` and `user`."""
    text: str = string(name, value, limits)
    if len(text) > limits.max_name:
        raise _too_long(name, "string", limits.max_name, len(text))
    return text


@field_parser(lambda limits: {"type": "string", "minLength": 1, "maxLength": limits.max_salt})
def salt(name: str, value: Any, limits: RequestLimits) -> str:
    """A string of 1 to `limits.max_salt` characters, for `cache_salt`."""
    text: str = string(name, value, limits)
    if not text:
        raise RequestError(f"Invalid '{name}': empty string. Expected at least one character.", param=name)
    if len(text) > limits.max_salt:
        raise _too_long(name, "string", limits.max_salt, len(text))
    return text


def as_integer(value: object) -> int | None:
    """The value as an integer: 16 for 16 and for 16.0. None for any other value, also for true."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


# ---- fields with their own formats


@field_parser(lambda limits: {"type": "integer", "minimum": 0, "maximum": _most_logprobs(limits)})
def logprobs(name: str, value: Any, limits: RequestLimits) -> int:
    """The number of alternatives to report. With `limits.strict`, a number above the maximum means the maximum."""
    wanted: int = integer(0, _most_logprobs)(name, value, limits)
    return min(wanted, limits.max_logprobs)


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


@field_parser(lambda limits: _IDS | {"maxItems": limits.max_bias})
def token_ids(name: str, value: Any, limits: RequestLimits) -> tuple[int, ...]:
    """An array of at most `limits.max_bias` token ids; it may be empty."""
    ids = _integers(value) if isinstance(value, list) else None
    if ids is None:
        raise _wrong_type(name, value, "an array of integers")
    if len(ids) > limits.max_bias:
        raise _too_long(name, "array", limits.max_bias, len(ids))
    return ids


@field_parser(
    {
        "type": "object",
        "properties": {
            "type": {"const": "content"},
            "content": {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": _TEXT_PART}]},
        },
        "required": ["type", "content"],
        "additionalProperties": False,
    }
)
def prediction(name: str, value: Any, _: RequestLimits) -> str:
    """The text of `{"type": "content", "content": …}`, where the content is a string or an array of text parts."""
    content = _only_members(name, value, {"type": "content"}, "content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _wrong_type(f"{name}.content", content, "one of a string or an array of objects")
    if not content:
        raise _empty_array(f"{name}.content")
    return "".join(_text_part(f"{name}.content[{index}]", part) for index, part in enumerate(content))


def _text_part(path: str, part: object) -> str:
    text = _only_members(path, part, {"type": "text"}, "text")
    if not isinstance(text, str):
        raise _wrong_type(f"{path}.text", text, "a string")
    return text


def _only_members(path: str, value: object, fixed: dict[str, str], wanted: str) -> object:
    """The member `wanted` of an object whose other members are `fixed`."""
    if not isinstance(value, dict):
        raise _wrong_type(path, value, "an object")
    for key in value:
        if key not in (*fixed, wanted):
            name = f"{path}.{str(key)[:64]}"
            raise RequestError(f"Unknown parameter: '{name}'.", param=name, code="unknown_parameter")
    for key in (*fixed, wanted):
        if value.get(key) is None:
            name = f"{path}.{key}"
            message = f"Missing required parameter: '{name}'."
            raise RequestError(message, param=name, code="missing_required_parameter")
    for key, only in fixed.items():
        if value[key] != only:
            message = f"Invalid value for '{path}.{key}'. Supported values are: '{only}'."
            raise RequestError(message, param=f"{path}.{key}", code="invalid_value")
    return value[wanted]


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
        raise _wrong_type(name, value, "one of a string or an array of strings")
    if not stops and limits.strict:
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
        raise _wrong_type(name, value, "an object")
    if len(value) > limits.max_bias:
        raise RequestError(f"Invalid '{name}': at most {limits.max_bias} tokens can have a bias.", param=name)
    return tuple((_bias_key(name, key), _bias_value(name, bias)) for key, bias in value.items())


@field_parser(
    lambda limits: {
        "type": "object",
        "properties": {key: {"type": ["boolean", "null"]} for key in sorted(_stream_keys(limits))},
        "additionalProperties": False,
    }
)
def stream_options(name: str, value: Any, limits: RequestLimits) -> StreamOptions:
    if not isinstance(value, dict):
        raise _wrong_type(name, value, "an object")
    for key in value:
        if key not in _stream_keys(limits):
            path = f"{name}.{key[:64]}"
            raise RequestError(f"Unknown parameter: '{path}'.", param=path, code="unknown_parameter")
    given = {key: item for key, item in value.items() if item is not None}
    return StreamOptions(**{key: boolean(f"{name}.{key}", item, limits) for key, item in given.items()})


@field_parser(
    {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {"text": {"type": "string"}, "filename": {"type": ["string", "null"]}, "time": {}},
            "required": ["text"],
            "additionalProperties": False,
        },
    }
)
def input_extra(name: str, value: Any, limits: RequestLimits) -> tuple[ContextFile, ...]:
    """Files as llama-server reads them: objects with `text` and `filename`. Editors add `time`, which has no effect."""
    if not isinstance(value, list):
        raise _wrong_type(name, value, "an array of objects")
    return tuple(_context_file(f"{name}[{index}]", item, limits) for index, item in enumerate(value))


def _context_file(path: str, item: Any, limits: RequestLimits) -> ContextFile:
    if not isinstance(item, dict):
        raise _wrong_type(path, item, "an object")
    for key in item:
        if key not in ("text", "filename", "time"):
            raise RequestError(
                f"Unknown parameter: '{path}.{key[:64]}'.", param=f"{path}.{key[:64]}", code="unknown_parameter"
            )
    text = string(f"{path}.text", item.get("text"), limits)
    filename = item.get("filename")
    return ContextFile(text) if filename is None else ContextFile(text, string(f"{path}.filename", filename, limits))


def _most_logprobs(limits: RequestLimits) -> int:
    return 2**31 - 1 if limits.strict else limits.max_logprobs


def _stream_keys(limits: RequestLimits) -> set[str]:
    return {"include_usage", "include_obfuscation"} | (set() if limits.strict else {"continuous_usage_stats"})


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
