"""Says where in a JSON Schema the part is that llguidance cannot use. llguidance itself says only what is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from llguidance import LLMatcher, LLParserLimits

Json = dict[str, Any]

_OF_NAMES = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_OF_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_DEFINITIONS = ("$defs", "definitions")
_CAUSES = (
    (re.compile("required property '(.*)' is unsatisfiable", re.DOTALL), "properties"),
    (re.compile(r"prefixItems\[(\d+)\] is unsatisfiable"), "prefixItems"),
    (re.compile("required item is unsatisfiable"), "items"),
)
"""Messages that blame a part of the schema without its own fault, and where that part is."""
_MOST_TRIES = 300  # parts that are compiled to find the place; each takes about a millisecond


def schema_error(schema: Any, limits: LLParserLimits) -> str:
    """What is wrong in a schema, and the JSON pointer of the innermost part with that fault. Empty: nothing is."""
    message = _error(schema, limits)
    if not message:
        return ""
    shared = {name: schema[name] for name in _DEFINITIONS if name in schema} if isinstance(schema, dict) else {}
    pointer, part = "", schema
    tries = iter(range(_MOST_TRIES))
    while inner := _inner(part, message, shared, limits, tries):
        step, part, message = inner
        pointer = f"{pointer}/{step}"
    return f"{message} (at {pointer or 'the top'} of the schema)"


def _inner(
    schema: Any, message: str, shared: Json, limits: LLParserLimits, tries: Iterator[int]
) -> tuple[str, Any, str] | None:
    """The part of a schema that has its fault, with the pointer to it and the message about it; None if none has."""
    parts = list(_parts(schema))
    cause = _cause(message)
    for step, inner in parts:
        if next(tries, None) is None:
            return None
        found = _error({**shared, **inner} if isinstance(inner, dict) else inner, limits)
        if found and (found == message or step == cause):
            return step, inner, found
    return None


def _cause(message: str) -> str:
    """The pointer to the part that a message blames, relative to the schema with the fault. Empty: it blames none."""
    for pattern, part in _CAUSES:
        if found := pattern.search(message):
            return part + "".join(f"/{_escaped(name)}" for name in found.groups())
    return ""


def _error(schema: Any, limits: LLParserLimits) -> str:
    grammar = json.dumps({"grammars": [{"json_schema": schema}]})
    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, limits=limits)
    # the schema that a reference led to is left out: the caller finds it itself
    return re.split(r"\s+while processing ", messages[0])[0] if failed else ""


def _parts(schema: Any) -> Iterator[tuple[str, Any]]:
    """The schemas directly inside a schema, each with its part of a JSON pointer."""
    if not isinstance(schema, dict):
        return
    for key, value in schema.items():
        if key in _OF_NAMES and isinstance(value, dict):
            for name, inner in value.items():
                yield f"{key}/{_escaped(name)}", inner
        elif key in _OF_LISTS and isinstance(value, list):
            for index, inner in enumerate(value):
                yield f"{key}/{index}", inner
        elif isinstance(value, dict):
            yield key, value


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
