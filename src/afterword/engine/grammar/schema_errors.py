"""Says where in a JSON Schema the part is that llguidance cannot use. llguidance itself says only what is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from llguidance import LLMatcher, LLParserLimits

_OF_NAMES = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_OF_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_DEFINITIONS = ("$defs", "definitions")
_MOST_TRIES = 300  # parts that are compiled to find the place; each takes about a millisecond


def schema_error(schema: Any, limits: LLParserLimits) -> str:
    """What is wrong in a schema, and the JSON pointer of the innermost part with that fault. Empty: nothing is."""
    message = _error(schema, limits)
    if not message:
        return ""
    shared = {name: schema[name] for name in _DEFINITIONS if name in schema} if isinstance(schema, dict) else {}
    pointer, part, tries = "", schema, 0
    found = True
    while found:
        found = False
        for step, inner in _parts(part):
            tries += 1
            if tries > _MOST_TRIES:
                break
            whole = {**shared, **inner} if isinstance(inner, dict) else inner
            if _error(whole, limits) == message:
                pointer, part, found = f"{pointer}/{step}", inner, True
                break
    return f"{message} (at {pointer or 'the top'} of the schema)"


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
                yield f"{key}/{name.replace('~', '~0').replace('/', '~1')}", inner
        elif key in _OF_LISTS and isinstance(value, list):
            for index, inner in enumerate(value):
                yield f"{key}/{index}", inner
        elif isinstance(value, dict):
            yield key, value
