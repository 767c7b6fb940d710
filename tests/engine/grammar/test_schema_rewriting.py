"""Rewritten schemas: what their grammars accept, judged by an independent validator."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import jsonschema_rs
import pytest

from afterword.engine.grammar.compiled_grammar import GrammarTokens, InvalidGrammar, compile_grammar
from afterword.engine.grammar.schema_rewriting import rewritten
from afterword.engine.protocol import Grammar

TOKENS = GrammarTokens([bytes([byte]) for byte in range(0xFF)])
KINDS = [
    {"type": "object", "properties": {"kind": {"const": kind}, kind: {"type": "integer"}}, "required": ["kind"]}
    for kind in "ab"
]
TREE = {
    "$defs": {
        "leaf": KINDS[0],
        "node": {
            "type": "object",
            "properties": {"kind": {"enum": ["node", "root"]}, "down": {"$ref": "#/$defs/any"}},
            "required": ["kind", "down"],
        },
        "any": {
            "oneOf": [{"$ref": "#/$defs/leaf"}, {"$ref": "#/$defs/node"}],
            "discriminator": {"propertyName": "kind"},
        },
    },
    "$ref": "#/$defs/any",
    "nullable": False,
}


def accepts(schema: Any, text: str) -> bool:
    place = compile_grammar(Grammar("json", json.dumps(schema, ensure_ascii=False), "json_schema"), TOKENS)
    for byte in text.encode():
        if not int(place.allowed().mask[byte // 32]) >> byte % 32 & 1:
            return False
        place.append(byte)
    return place.allowed().complete


@pytest.mark.parametrize(
    ("name", "valid", "invalid"),
    [
        (
            "date",
            ["2024-02-29", "2000-02-29", "1900-02-28", "0001-01-31", "2021-04-30", "2021-12-31"],
            ["2021-02-29", "1900-02-29", "2100-02-29", "2021-04-31", "2021-13-01", "2021-00-10", "2021-1-1"],
        ),
        (
            "time",
            ["00:00:00Z", "23:59:59.123+02:00", "12:00:00-23:59", "12:00:00z"],
            ["24:00:00Z", "12:60:00Z", "12:00:60Z", "12:00:00", "12:00Z", "12:00:00.Z", "12:00:00+24:00"],
        ),
        (
            "date-time",
            ["2024-02-29T12:00:00Z", "1985-04-12T23:20:50.52Z", "1937-01-01t12:00:27.87+00:20"],
            ["2023-02-29T12:00:00Z", "2024-02-28 12:00:00Z", "2024-02-28T12:00:00", "1998-12-31T23:58:60Z"],
        ),
        (
            "hostname",
            ["a", "example.com", "a-b.c--d-e.x1", "1.2", "a" * 63, ".".join(["ab" * 30] * 4)],
            ["", ".", "a.", ".a", "-a", "a-", "a..b", "a_b", "a" * 64, "xn--X", "ab--c", ".".join(["ab" * 31] * 5)],
        ),
    ],
)  # fmt: skip
def test_formats_are_exact(name: str, valid: list[str], invalid: list[str]) -> None:
    schema = {"type": "string", "format": name}
    assert [text for text in valid if not accepts(schema, json.dumps(text))] == []
    assert [text for text in invalid if accepts(schema, json.dumps(text))] == []
    validator = jsonschema_rs.validator_for(schema, validate_formats=True)
    assert all(validator.is_valid(text) for text in valid)


def test_a_format_holds_beside_a_pattern_and_bounds() -> None:
    schema = {"type": "string", "format": "date", "pattern": "^202", "allOf": [{"maxLength": 10}]}
    assert accepts(schema, '"2024-02-29"')
    assert not accepts(schema, '"2023-02-29"')
    assert not accepts(schema, '"1999-01-01"')


def test_alternatives_that_a_member_tells_apart_are_accepted_also_recursively() -> None:
    validator = jsonschema_rs.validator_for(TREE)
    texts = [
        '{"kind":"a","a":1}',
        '{"kind":"node","down":{"kind":"root","down":{"kind":"a"}}}',
        '{"kind":"node","down":{"kind":"b"}}',
        '{"kind":"a","a":true}',
        '{"a":1}',
    ]
    assert [accepts(TREE, text) for text in texts] == [True, True, False, False, False]
    assert [validator.is_valid(json.loads(text)) for text in texts] == [True, True, False, False, False]


@pytest.mark.parametrize(
    ("alternatives", "told_apart"),
    [
        (KINDS, True),
        ([KINDS[0], {**KINDS[1], "required": []}], True),
        ([{**each, "required": []} for each in KINDS], False),
        ([KINDS[0], KINDS[0]], False),
        ([KINDS[0], {key: value for key, value in KINDS[1].items() if key != "type"}], False),
        ([KINDS[0], {"type": "object", "properties": {"kind": {"type": "string"}}, "required": ["kind"]}], False),
        ([KINDS[0], {"$ref": "#/$defs/loop"}], False),
        ([KINDS[0], {"$ref": "#/nowhere"}], False),
        ([KINDS[0], {"$ref": "#/$defs/b"}], True),
        ([KINDS[0], True], False),
        ([], False),
        ("text", False),
    ],
)
def test_only_alternatives_that_exclude_each_other_count_as_any(alternatives: Any, told_apart: bool) -> None:
    schema = {"oneOf": alternatives, "$defs": {"loop": {"$ref": "#/$defs/loop"}, "b": KINDS[1]}}
    assert ("anyOf" in rewritten(schema)) == told_apart
    assert ("oneOf" in rewritten(schema)) != told_apart


@pytest.mark.parametrize(
    ("names", "accepted", "rejected"),
    [
        ({"enum": ["x", "y"]}, ["{}", '{"x":1}', '{"x":1,"y":2}'], ['{"z":1}', '{"x":"a"}']),
        ({"const": "x", "type": "string"}, ['{"x":1}'], ['{"y":1}']),
        ({"pattern": "^[a-c]+$"}, ["{}", '{"ab":1,"c":2}'], ['{"d":1}', '{"a":null}']),
    ],
)
def test_names_of_members_can_be_listed(names: Any, accepted: list[str], rejected: list[str]) -> None:
    schema = {"type": "object", "propertyNames": names, "additionalProperties": {"type": "integer"}}
    validator = jsonschema_rs.validator_for(schema)
    for text in accepted + rejected:
        assert accepts(schema, text) == (text in accepted) == validator.is_valid(json.loads(text)), text


@pytest.mark.parametrize(
    "more", [{"properties": {"x": {}}}, {"patternProperties": {"x": {}}}, {"propertyNames": {"maxLength": 2}}]
)
def test_other_names_of_members_are_refused(more: Any) -> None:
    with pytest.raises(InvalidGrammar, match="propertyNames"):
        accepts({"propertyNames": {"enum": ["x"]}, **more}, "{}")


def test_whole_numbers_can_have_a_point_in_bounds() -> None:
    assert accepts({"type": "array", "maxItems": 1.0}, "[1]")
    assert not accepts({"type": "array", "maxItems": 1.0}, "[1,1]")


def test_values_and_names_of_members_are_no_schemas() -> None:
    value = {"format": "date", "maxItems": 1.0, "oneOf": KINDS}
    for schema in ({"const": value}, {"enum": [value]}, {"default": value}, {"examples": [value]}):
        assert rewritten(schema) == schema
    assert accepts({"const": {"format": "date"}}, '{"format":"date"}')
    named = {"type": "object", "properties": {"format": {"type": "string"}, "const": {"format": "date"}}}
    assert accepts(named, '{"format":"date"}')
    assert not accepts(named, '{"const":"2021-02-29"}')


@pytest.mark.parametrize("name", [r"\u0066oo", r"f\u006fo", r"fo\u006F", r"\u00e9", r"\ud83d"])
def test_names_of_members_have_no_codes_of_characters(name: str) -> None:
    """Else an open object could have the member foo under another spelling, with a value that the schema forbids."""
    schema = {"type": "object", "properties": {"foo": {"type": "integer"}, "é": {"type": "integer"}}}
    assert accepts(schema, '{"foo":1,"bar":"x"}')
    assert not accepts(schema, f'{{"{name}":"x"}}')
    assert not accepts({"patternProperties": {"^f": {"type": "integer"}}}, f'{{"{name}":"x"}}')


def test_control_characters_of_a_schema_can_be_written() -> None:
    assert accepts({"const": "a\x01"}, r'"a\u0001"')
    assert accepts({"const": "a\n\t"}, r'"a\n\t"')


def many_references(size: int) -> Any:
    """Alternatives that share one reference, which leads nowhere after many parts."""
    return {"oneOf": [{"$ref": "#/a"}] * size, "a": {"$ref": "#/" + "/" * size}}


def one_object(size: int) -> Any:
    """Alternatives that are one object with many members."""
    members = {str(number): {"const": "x"} for number in range(size)}
    return {"oneOf": [{"$ref": "#/a"}] * size, "a": {"type": "object", "properties": members}}


def long_chain(size: int) -> Any:
    """Each alternative begins a chain of references that all others follow to its end."""
    chain = {str(number): {"$ref": f"#/{number + 1}"} for number in range(size)}
    return chain | {"x": [{"oneOf": [{"$ref": f"#/{number}"}] * 2} for number in range(size)]}


@pytest.mark.parametrize("schema_of", [many_references, one_object, long_chain])
def test_the_work_grows_with_the_size_of_a_schema(schema_of: Callable[[int], Any]) -> None:
    """Counted in lines of Python: twice the size must not need four times as many."""
    few, many = (lines_of(lambda size=size: rewritten(schema_of(size))) for size in (100, 200))  # type: ignore[misc]
    assert many < 2.5 * few


def test_the_work_of_comparing_alternatives_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many lists can name the same large alternatives. Behind the bound a list stays as it is."""
    monkeypatch.setattr("afterword.engine.grammar.schema_rewriting._MOST_COMPARED", 9)
    schema = {"oneOf": [{"$ref": "#/$defs/0"}, {"$ref": "#/$defs/1"}]}
    whole = rewritten({"$defs": dict(zip("01", KINDS, strict=True)), "items": [schema] * 4})
    assert ["anyOf" in each for each in whole["items"]] == [True, True, False, False]


def lines_of(work: Callable[[], object]) -> int:
    """How many lines of Python a call executes."""
    count = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal count
        count += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def test_a_reference_can_lead_into_alternatives() -> None:
    """The keyword keeps its name where a reference has it."""
    schema = {
        "type": "object",
        "properties": {"x": {"oneOf": KINDS}, "y": {"$ref": "#/properties/x/oneOf/0"}},
        "required": ["x", "y"],
    }
    assert accepts(schema, '{"x":{"kind":"b","b":1},"y":{"kind":"a","a":1}}')
    assert not accepts(schema, '{"x":{"kind":"b","b":1},"y":{"kind":"b","b":1}}')
    encoded = {"oneOf": KINDS, "properties": {"y": {"$ref": "#/one%4Ff/0"}}}
    assert "oneOf" in rewritten(encoded)


def test_a_reference_can_lead_into_an_annotation_or_names() -> None:
    schema = {"$ref": "#/x-kinds/0", "x-kinds": KINDS, "x-order": 1}
    assert rewritten(schema) == {"$ref": "#/x-kinds/0", "x-kinds": KINDS}
    names = {"propertyNames": {"enum": ["x"]}, "items": {"$ref": "#/propertyNames"}}
    assert rewritten(names) == names


@pytest.mark.parametrize("all_of", ["text", 5, {"type": "string"}, None])
def test_a_malformed_keyword_beside_a_format_is_named(all_of: Any) -> None:
    with pytest.raises(InvalidGrammar, match="allOf"):
        accepts({"type": "string", "format": "date", "allOf": all_of}, '"2024-02-29"')
