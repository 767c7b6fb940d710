"""Parsers for request fields whose values are objects, as in `fields`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from afterword.completion.field_errors import empty_array, too_long, unknown, wrong_type
from afterword.completion.fields import JsonSchema, boolean, field_parser, integer, string
from afterword.completion.request_limits import RequestLimits
from afterword.engine.protocol import RepetitionDetection
from afterword.errors import RequestError

_MOST_FILES = 1024  # each file is a text in the queue of the tokenizer, which all clients share
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


@field_parser(
    lambda limits: {
        "type": "object",
        "properties": {key: {"type": ["boolean", "null"]} for key in sorted(_stream_keys(limits))},
        "additionalProperties": False,
    }
)
def stream_options(name: str, value: Any, limits: RequestLimits) -> StreamOptions:
    if not isinstance(value, dict):
        raise wrong_type(name, value, "an object")
    for key in value:
        if key not in _stream_keys(limits):
            raise unknown(f"{name}.{key[:64]}")
    given = {key: item for key, item in value.items() if item is not None}
    return StreamOptions(**{key: boolean(f"{name}.{key}", item, limits) for key, item in given.items()})


@field_parser(
    {
        "type": "array",
        "maxItems": _MOST_FILES,
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
        raise wrong_type(name, value, "an array of objects")
    if len(value) > _MOST_FILES:
        raise too_long(name, "array", _MOST_FILES, len(value))
    return tuple(_context_file(f"{name}[{index}]", item, limits) for index, item in enumerate(value))


def _context_file(path: str, item: Any, limits: RequestLimits) -> ContextFile:
    if not isinstance(item, dict):
        raise wrong_type(path, item, "an object")
    for key in item:
        if key not in ("text", "filename", "time"):
            raise unknown(f"{path}.{key[:64]}")
    text = string(f"{path}.text", item.get("text"), limits)
    filename = item.get("filename")
    return ContextFile(text) if filename is None else ContextFile(text, string(f"{path}.filename", filename, limits))


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
        raise wrong_type(f"{name}.content", content, "one of a string or an array of objects")
    if not content:
        raise empty_array(f"{name}.content")
    return "".join(_text_part(f"{name}.content[{index}]", part) for index, part in enumerate(content))


_LOOP_SIZES = {"max_pattern_size": 512, "min_pattern_size": 512, "min_count": 1024}


@field_parser(
    {
        "type": "object",
        "properties": {
            key: {"type": ["integer", "null"], "minimum": 0, "maximum": most} for key, most in _LOOP_SIZES.items()
        },
        "additionalProperties": False,
    }
)
def repetition_detection(name: str, value: Any, limits: RequestLimits) -> RepetitionDetection | None:
    """vLLM's object with `max_pattern_size`, `min_pattern_size` and `min_count`. A `max_pattern_size` of 0: None."""
    if not isinstance(value, dict):
        raise wrong_type(name, value, "an object")
    for key in value:
        if key not in _LOOP_SIZES:
            raise unknown(f"{name}.{str(key)[:64]}")
    given = {key: item for key, item in value.items() if item is not None}
    numbers = {key: integer(0, _LOOP_SIZES[key])(f"{name}.{key}", item, limits) for key, item in given.items()}
    largest, smallest = numbers.get("max_pattern_size", 0), numbers.get("min_pattern_size", 0)
    if smallest > largest:
        raise RequestError(
            f"'{name}.min_pattern_size' ({smallest}) must be at most '{name}.max_pattern_size' ({largest}).", param=name
        )
    if not largest:
        return None
    if numbers.get("min_count", 0) < 2:
        raise RequestError(f"'{name}.min_count' must be at least 2.", param=name)
    return RepetitionDetection(largest, max(smallest, 1), numbers["min_count"])


def _text_part(path: str, part: object) -> str:
    text = _only_members(path, part, {"type": "text"}, "text")
    if not isinstance(text, str):
        raise wrong_type(f"{path}.text", text, "a string")
    return text


def _only_members(path: str, value: object, fixed: dict[str, str], wanted: str) -> object:
    """The member `wanted` of an object whose other members are `fixed`."""
    if not isinstance(value, dict):
        raise wrong_type(path, value, "an object")
    for key in value:
        if key not in (*fixed, wanted):
            raise unknown(f"{path}.{str(key)[:64]}")
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


def _stream_keys(limits: RequestLimits) -> set[str]:
    return {"include_usage", "include_obfuscation"} | (set() if limits.strict else {"continuous_usage_stats"})
