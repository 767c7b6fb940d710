"""Parsers for the fields that say what the text must be. Each results in a `Grammar`, or in None for any text.

They check the form and the size. The worker compiles the grammar, and says what is wrong in it.
"""

from __future__ import annotations

import json
import re
from typing import Any

from afterword.completion.field_errors import empty_array, too_long, unknown, wrong_type
from afterword.completion.fields import JsonSchema, field_parser
from afterword.completion.request_limits import RequestLimits
from afterword.engine.protocol import Grammar, GrammarKind
from afterword.errors import RequestError

_ANY_OBJECT = {"type": "object"}
_TYPES = ("text", "json_object", "json_schema")
_LABELS = {"name": str, "description": str, "strict": bool}  # members of `json_schema` without effect
_OUTPUTS = ("json", "json_object", "regex", "choice", "grammar")
_DEEPEST = 60  # brackets inside each other; llguidance refuses deeper schemas too, with a message that says less
_END = object()
_GBNF = re.compile(r"^[ \t]*[A-Za-z0-9_-]+[ \t]*::=", re.MULTILINE)  # never across lines: linear

_SCHEMA: JsonSchema = {"type": ["object", "boolean"]}
_NAMED_SCHEMA: JsonSchema = {
    "type": "object",
    "properties": {
        "schema": _SCHEMA,
        "name": {"type": ["string", "null"]},
        "description": {"type": ["string", "null"]},
        "strict": {"type": ["boolean", "null"]},
    },
    "required": ["schema"],
    "additionalProperties": False,
}
_NO_SCHEMA: JsonSchema = {"type": "null", "examples": [None]}


def _form(kind: str, json_schema: JsonSchema, schema: JsonSchema, *required: str) -> JsonSchema:
    """The JSON Schema of `response_format` with a type."""
    return {
        "type": "object",
        "properties": {"type": {"const": kind, "examples": [kind]}, "json_schema": json_schema, "schema": schema},
        "required": ["type", *required],
        "additionalProperties": False,
    }


def _text_schema(limits: RequestLimits, least: int = 1) -> JsonSchema:
    return {"type": "string", "minLength": least, "maxLength": limits.max_grammar}


def _outputs_schema(limits: RequestLimits) -> JsonSchema:
    """An object with one of the members; the others are null, and `json_object` may be false."""
    members: dict[str, JsonSchema] = {
        "json": {"anyOf": [_SCHEMA, _text_schema(limits)]},
        "json_object": {"const": True},
        "regex": _text_schema(limits, 0),
        "choice": {"type": "array", "minItems": 1, "items": {"type": "string"}},
        "grammar": _text_schema(limits),
    }
    # Not `"enum": [None]`, at which generators of clients fail.
    absent: dict[str, JsonSchema] = {key: {"type": "null", "examples": [None]} for key in members}
    absent["json_object"] = {"anyOf": [{"type": "null"}, {"const": False}], "examples": [False]}
    return {
        "anyOf": [
            {
                "type": "object",
                "properties": absent | {key: schema},
                "required": [key],
                "additionalProperties": False,
            }
            for key, schema in members.items()
        ]
    }


@field_parser(
    {
        "anyOf": [
            _form("text", _NO_SCHEMA, _NO_SCHEMA),
            _form("json_object", _NO_SCHEMA, {"type": ["object", "boolean", "null"]}),
            _form("json_schema", _NAMED_SCHEMA, _NO_SCHEMA, "json_schema"),
        ]
    }
)
def response_format(name: str, value: Any, limits: RequestLimits) -> Grammar | None:
    """The field of OpenAI's chat API. llama-server's form `{"type": "json_object", "schema": …}` is accepted too."""
    given = _members(name, value, ("type", "json_schema", "schema"))
    kind = given.get("type")
    if kind is None:
        raise _missing(f"{name}.type")
    if kind not in _TYPES:
        allowed = ", ".join(f"'{each}'" for each in _TYPES)
        message = f"Invalid value for '{name}.type'. Supported values are: {allowed}."
        raise RequestError(message, param=f"{name}.type", code="invalid_value")
    fitting = {"text": (), "json_object": ("schema",), "json_schema": ("json_schema",)}[kind]
    for key in given:
        if key not in ("type", *fitting):
            raise RequestError(f"'{name}.{key}' cannot be combined with the type '{kind}'.", param=f"{name}.{key}")
    if kind == "text":
        return None
    if kind == "json_object":
        return _schema_grammar(
            f"{name}.schema" if "schema" in given else name, given.get("schema", _ANY_OBJECT), limits
        )
    inner = _named_schema(f"{name}.json_schema", given.get("json_schema"))
    return _schema_grammar(f"{name}.json_schema.schema", inner, limits)


def _named_schema(path: str, value: object) -> object:
    if value is None:
        raise _missing(path)
    given = _members(path, value, ("schema", *_LABELS))
    for key, wanted in _LABELS.items():
        if not isinstance(given.get(key, wanted()), wanted):
            raise wrong_type(f"{path}.{key}", given[key], "a boolean" if wanted is bool else "a string")
    if "schema" not in given:
        raise _missing(f"{path}.schema")
    return given["schema"]


@field_parser(_outputs_schema)
def structured_outputs(name: str, value: Any, limits: RequestLimits) -> Grammar | None:
    """vLLM's field: an object of which one member says what the text must be."""
    given = _members(name, value, _OUTPUTS)
    if given.get("json_object") is False:
        del given["json_object"]
    if len(given) != 1:
        allowed = ", ".join(f"'{each}'" for each in _OUTPUTS)
        raise RequestError(f"'{name}' must have exactly one of the members {allowed}.", param=name)
    ((key, item),) = given.items()
    path = f"{name}.{key}"
    if key == "json_object":
        if item is not True:
            raise wrong_type(path, item, "a boolean")
        return _schema_grammar(path, _ANY_OBJECT, limits)
    if key == "json":
        return _schema_grammar(path, item, limits, text_allowed=True)
    if key == "choice":
        return _choice_grammar(path, item, limits)
    text = _text(path, item, limits)
    if key == "regex":
        return _grammar("regex", text, path)
    if not text:
        raise RequestError(f"Invalid '{path}': empty string. Expected at least one character.", param=path)
    return _notation(text, path)


@field_parser(_SCHEMA)
def json_schema(name: str, value: Any, limits: RequestLimits) -> Grammar:
    """llama-server's field: a JSON Schema."""
    return _schema_grammar(name, value, limits)


@field_parser(lambda limits: _text_schema(limits, 0))
def grammar(name: str, value: Any, limits: RequestLimits) -> Grammar | None:
    """llama-server's field: a grammar in its own notation (GBNF), or in Lark's. An empty one allows any text."""
    text = _text(name, value, limits)
    return _notation(text, name) if text.strip() else None


def _notation(text: str, path: str) -> Grammar:
    return _grammar("gbnf" if _GBNF.search(text) else "lark", text, path)


def _schema_grammar(path: str, value: object, limits: RequestLimits, text_allowed: bool = False) -> Grammar:
    if text_allowed and isinstance(value, str):
        try:
            value = json.loads(_text(path, value, limits))
        except (ValueError, RecursionError) as problem:
            raise RequestError(f"Invalid '{path}': it is not JSON ({str(problem)[:64]}).", param=path) from None
    if not isinstance(value, dict | bool):
        raise wrong_type(path, value, "an object")
    if _is_longer(value, limits.max_grammar):  # before `json.dumps`, which would make all of a large body in one call
        raise RequestError(
            f"Invalid '{path}': the schema is too long. Maximum length is {limits.max_grammar} characters.",
            param=path,
            code="string_above_max_length",
        )
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except RecursionError:
        raise _too_deep(path) from None
    except ValueError as problem:
        raise RequestError(f"Invalid '{path}': it is not JSON ({str(problem)[:64]}).", param=path) from None
    if len(text) > limits.max_grammar:
        raise too_long(path, "string", limits.max_grammar, len(text))
    if _is_deep(value, _DEEPEST):
        raise RequestError(f"Invalid '{path}': more than {_DEEPEST} objects and arrays inside each other.", param=path)
    return _grammar("json", text, path)


def _choice_grammar(path: str, value: object, limits: RequestLimits) -> Grammar:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise wrong_type(path, value, "an array of strings")
    if not value:
        raise empty_array(path)
    if len(value) > limits.max_grammar:
        raise too_long(path, "array", limits.max_grammar, len(value))
    if (size := sum(map(len, value))) > limits.max_grammar:
        message = f"{size} characters in total, but the limit ('max_grammar') is {limits.max_grammar}."
        raise RequestError(f"Invalid '{path}': {message}", param=path)
    return _grammar("choice", json.dumps(list(dict.fromkeys(value)), ensure_ascii=False), path)


def _text(path: str, value: object, limits: RequestLimits) -> str:
    if not isinstance(value, str):
        raise wrong_type(path, value, "a string")
    if len(value) > limits.max_grammar:
        raise too_long(path, "string", limits.max_grammar, len(value))
    return value


def _grammar(kind: GrammarKind, text: str, path: str) -> Grammar:
    if kind not in ("json", "choice") and _depth(text) > _DEEPEST:
        raise _too_deep(path)
    try:
        text.encode()
    except UnicodeEncodeError:  # of a schema that is JSON in a string
        raise RequestError(
            f"Invalid '{path}': it has a lone surrogate, which is not a character.", param=path
        ) from None
    return Grammar(kind, text, path)


def _is_longer(value: object, most: int) -> bool:
    """Whether a JSON value certainly has more than `most` characters. Only as many of its items are counted."""
    left, items = most, [iter([value])]
    while items and left >= 0:
        item = next(items[-1], _END)
        if item is _END:
            items.pop()
            continue
        left -= 1
        if isinstance(item, str):
            left -= len(item) + 1
        elif isinstance(item, dict):
            items += (iter(item), iter(item.values()))
        elif isinstance(item, list):
            items.append(iter(item))
    return left < 0


def _is_deep(value: object, most: int) -> bool:
    """Whether a JSON value has more than `most` objects and arrays inside each other."""
    level = [value]
    for _ in range(most + 1):
        members = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list))
        level = [member for each in members for member in each]
        if not level:
            return False
    return any(isinstance(each, dict | list) for each in level)


def _depth(text: str) -> int:
    """The most brackets that are open at a place of a text, those in strings included."""
    depth = deepest = 0
    for bracket in re.findall(r"[\[\](){}]", text):
        depth = depth + 1 if bracket in "[({" else max(0, depth - 1)
        deepest = max(deepest, depth)
    return deepest


def _members(path: str, value: object, allowed: tuple[str, ...]) -> dict[str, Any]:
    """The members of an object that are not null."""
    if not isinstance(value, dict):
        raise wrong_type(path, value, "an object")
    for key in value:
        if key not in allowed:
            raise unknown(f"{path}.{str(key)[:64]}")
    return {key: item for key, item in value.items() if item is not None}


def _too_deep(path: str) -> RequestError:
    return RequestError(f"Invalid '{path}': more than {_DEEPEST} brackets inside each other.", param=path)


def _missing(path: str) -> RequestError:
    message = f"Missing required parameter: '{path}'."
    return RequestError(message, param=path, code="missing_required_parameter")
