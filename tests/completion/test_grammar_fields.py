"""The fields that say what the text must be: accepted values, and the errors for all others."""

from __future__ import annotations

import json
from typing import Any

import pytest

from afterword.completion.request import CompletionRequest, parse
from afterword.completion.request_limits import STRICT, RequestLimits
from afterword.engine.protocol import Grammar
from afterword.errors import RequestError

LIMITS = RequestLimits(max_grammar=2000)
SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "string"}}}
TEXT = '{"type":"object","properties":{"b":{"type":"integer"},"a":{"type":"string"}}}'
ANY_OBJECT = '{"type":"object"}'


def parsed(limits: RequestLimits = LIMITS, **values: Any) -> CompletionRequest:
    return parse(json.dumps(values).encode(), limits)


@pytest.mark.parametrize(
    ("name", "value", "grammar"),
    [
        ("response_format", {"type": "text"}, None),
        ("response_format", {"type": "json_object"}, Grammar("json", ANY_OBJECT, "response_format")),
        ("response_format", {"type": "json_object", "schema": SCHEMA}, Grammar("json", TEXT, "response_format.schema")),
        (
            "response_format",
            {
                "type": "json_schema",
                "json_schema": {"name": "x", "strict": True, "description": None, "schema": SCHEMA},
            },
            Grammar("json", TEXT, "response_format.json_schema.schema"),
        ),
        ("structured_outputs", {"json": SCHEMA}, Grammar("json", TEXT, "structured_outputs.json")),
        (
            "structured_outputs",
            {"json": json.dumps(SCHEMA), "regex": None},
            Grammar("json", TEXT, "structured_outputs.json"),
        ),
        ("structured_outputs", {"json_object": True}, Grammar("json", ANY_OBJECT, "structured_outputs.json_object")),
        ("structured_outputs", {"regex": ""}, Grammar("regex", "", "structured_outputs.regex")),
        (
            "structured_outputs",
            {"choice": ["b", "a", "b"]},
            Grammar("choice", '["b", "a"]', "structured_outputs.choice"),
        ),
        ("structured_outputs", {"grammar": 'start: "a"'}, Grammar("lark", 'start: "a"', "structured_outputs.grammar")),
        ("json_schema", {}, Grammar("json", "{}", "json_schema")),
        ("json_schema", True, Grammar("json", "true", "json_schema")),
        ("grammar", "", None),
        (
            "grammar",
            "# words\nroot ::= word\nword ::= [a-z]+",
            Grammar("gbnf", "# words\nroot ::= word\nword ::= [a-z]+", "grammar"),
        ),
        ("grammar", 'start: "::="', Grammar("lark", 'start: "::="', "grammar")),
    ],
)
def test_accepted(name: str, value: Any, grammar: Grammar | None) -> None:
    """The order of a schema's members is kept: the model writes them in this order."""
    request = parsed(**{name: value})
    assert getattr(request, name) == grammar
    assert request.constraints == ([] if grammar is None else [grammar])
    with pytest.raises(RequestError, match=name):
        parsed(STRICT, model="m", **{name: value})


def nested(depth: int) -> Any:
    return {"items": nested(depth - 1)} if depth else {}


@pytest.mark.parametrize(
    ("name", "value", "param", "code"),
    [
        ("response_format", "json_object", "response_format", "invalid_type"),
        ("response_format", {}, "response_format.type", "missing_required_parameter"),
        ("response_format", {"type": "xml"}, "response_format.type", "invalid_value"),
        ("response_format", {"type": "json_schema"}, "response_format.json_schema", "missing_required_parameter"),
        ("response_format", {"type": "json_schema", "json_schema": []}, "response_format.json_schema", "invalid_type"),
        (
            "response_format",
            {"type": "json_schema", "json_schema": {}},
            "response_format.json_schema.schema",
            "missing_required_parameter",
        ),
        (
            "response_format",
            {"type": "json_schema", "json_schema": {"schema": {}, "strict": 1}},
            "response_format.json_schema.strict",
            "invalid_type",
        ),
        (
            "response_format",
            {"type": "json_schema", "json_schema": {"schema": 1}},
            "response_format.json_schema.schema",
            "invalid_type",
        ),
        (
            "response_format",
            {"type": "json_schema", "json_schema": {"schema": {}, "a": 1}},
            "response_format.json_schema.a",
            "unknown_parameter",
        ),
        (
            "response_format",
            {"type": "json_object", "json_schema": {"schema": {}}},
            "response_format.json_schema",
            None,
        ),
        ("response_format", {"type": "text", "a": 1}, "response_format.a", "unknown_parameter"),
        ("structured_outputs", "a", "structured_outputs", "invalid_type"),
        ("structured_outputs", {}, "structured_outputs", None),
        ("structured_outputs", {"json": {}, "regex": "a"}, "structured_outputs", None),
        ("structured_outputs", {"structural_tag": "a"}, "structured_outputs.structural_tag", "unknown_parameter"),
        ("structured_outputs", {"json": "{"}, "structured_outputs.json", None),
        ("structured_outputs", {"json": 1}, "structured_outputs.json", "invalid_type"),
        ("structured_outputs", {"json": r'{"const":"\ud800"}'}, "structured_outputs.json", None),
        ("structured_outputs", {"json": r'{"properties":{"\udfff":{}}}'}, "structured_outputs.json", None),
        ("structured_outputs", {"json_object": "yes"}, "structured_outputs.json_object", "invalid_type"),
        ("structured_outputs", {"regex": 1}, "structured_outputs.regex", "invalid_type"),
        ("structured_outputs", {"regex": "a" * 2001}, "structured_outputs.regex", "string_above_max_length"),
        ("structured_outputs", {"regex": "(" * 61 + ")" * 61}, "structured_outputs.regex", None),
        ("structured_outputs", {"choice": []}, "structured_outputs.choice", "empty_array"),
        ("structured_outputs", {"choice": ["a", 1]}, "structured_outputs.choice", "invalid_type"),
        ("structured_outputs", {"choice": ["a" * 2001]}, "structured_outputs.choice", None),
        ("structured_outputs", {"choice": [""] * 2001}, "structured_outputs.choice", "array_above_max_length"),
        ("structured_outputs", {"grammar": ""}, "structured_outputs.grammar", None),
        ("json_schema", "a", "json_schema", "invalid_type"),
        ("json_schema", {"enum": ["a" * 2000]}, "json_schema", "string_above_max_length"),
        ("json_schema", nested(70), "json_schema", None),
        ("grammar", 1, "grammar", "invalid_type"),
        ("grammar", "a" * 2001, "grammar", "string_above_max_length"),
    ],
)
def test_refused(name: str, value: Any, param: str, code: str | None) -> None:
    with pytest.raises(RequestError) as problem:
        parsed(**{name: value})
    assert (problem.value.param, problem.value.code) == (param, code)


def test_only_one_of_the_fields_can_be_given() -> None:
    with pytest.raises(RequestError, match="'response_format' and 'grammar' both say what the text must be") as problem:
        parsed(response_format={"type": "json_object"}, grammar='root ::= "a"')
    assert problem.value.param == "grammar"
    assert parsed(response_format={"type": "text"}, grammar='root ::= "a"').constraints


def test_brackets_in_the_texts_of_a_schema_are_not_counted() -> None:
    request = parsed(json_schema={"enum": [f":( {number}" for number in range(90)]})
    assert request.json_schema is not None


def test_the_notation_of_a_long_text_without_rules_is_found_at_once() -> None:
    """A search that looked across lines would take minutes."""
    request = parsed(RequestLimits(), grammar="\n" * 130_000 + "x")
    assert request.grammar is not None
    assert request.grammar.kind == "lark"
