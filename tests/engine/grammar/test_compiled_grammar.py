"""Token masks against re-parsing: a token is allowed if and only if its bytes, one by one, continue the text."""

from __future__ import annotations

import json
import random

import pytest

from afterword.engine.grammar import compiled_grammar
from afterword.engine.grammar.compiled_grammar import GrammarTokens, InvalidGrammar, Place, compile_grammar
from afterword.engine.protocol import Grammar, GrammarKind

WORDS = [
    "name",
    "na",
    "am",
    "me",
    "me1",
    '{"',
    '":',
    '"name":',
    " {",
    "é",
    "  ",
    "\n ",
    "10",
    "}}",
    '"}',
    "true",
    "yes",
]
SPECIAL = [b"", b"\xff", b"\xff<end>"]
TEXTS = [
    *(bytes([byte]) for byte in range(128)),
    b"\xc3",
    b"\xa9",
    b"\xa9a",
    *(word.encode() for word in WORDS),
    *SPECIAL,
]
TOKENS = GrammarTokens(TEXTS)
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "integer"}, "b": {"enum": ["a", "name", True]}},
    "required": ["name"],
    "additionalProperties": False,
}
GRAMMARS: list[tuple[GrammarKind, str]] = [
    ("lark", 'start: "name" /[0-9]/ "amen"?'),
    ("gbnf", 'root ::= "na" ("me" | [1-3]+) end\nend ::= "10" | "é"'),
    ("regex", "(name|na|é)+1?"),
    ("regex", r"^\d{2}/yes$"),
    ("choice", '["yes","name","na","é \\"10\\"\\n"]'),
    ("json", json.dumps(PERSON)),
    ("json", '{"type":"array","items":{"type":"boolean"},"maxItems":2}'),
]


def place(kind: GrammarKind, text: str) -> Place:
    return compile_grammar(Grammar(kind, text, "grammar"), TOKENS)


def allowed(here: Place) -> set[int]:
    mask = here.allowed().mask
    return {token for token in range(32 * len(mask)) if mask[token // 32] >> (token % 32) & 1}


def continues(here: Place, piece: bytes) -> bool:
    """Whether a text may go on with these bytes, each taken as the token of one byte."""
    here = here.copy()
    for byte in piece:
        token = TEXTS.index(bytes([byte]))
        if token not in allowed(here):
            return False
        here.append(token)
    return True


@pytest.mark.parametrize(("kind", "text"), GRAMMARS)
def test_a_token_is_allowed_if_its_bytes_continue_the_text(kind: GrammarKind, text: str) -> None:
    rng = random.Random(text)
    seen = 0
    for _ in range(3):
        here = place(kind, text)
        for _ in range(12):
            found = allowed(here)
            assert found == {
                token for token, piece in enumerate(TEXTS) if piece[:1] != b"\xff" and piece and continues(here, piece)
            }
            seen += len(found)
            if not found or here.append(rng.choice(sorted(found))):
                break
    assert seen


@pytest.mark.parametrize(
    ("kind", "text", "whole", "ends"),
    [
        ("choice", '["yes","yes, name"]', "yes", False),
        ("choice", '["yes","yes, name"]', "yes, name", True),
        ("regex", "", "", False),
        ("regex", "a*", "aa", False),
        ("json", json.dumps(PERSON), '{"name": 10}', True),
        ("json", json.dumps(PERSON), '{\n  "name":10,\n  "b": true\n}', True),
        ("json", "true", '[{"name": [true, "yes"]}]', True),
    ],
)
def test_a_complete_text_is_known_and_whether_anything_can_follow(
    kind: GrammarKind, text: str, whole: str, ends: bool
) -> None:
    here = place(kind, text)
    assert [here.append(TEXTS.index(bytes([byte]))) for byte in whole.encode()] == [False] * (len(whole) - 1) + [
        ends
    ] * bool(whole)
    assert here.allowed().complete
    assert ends <= (not here.allowed().mask.any())


@pytest.mark.parametrize(
    ("text", "allows"),
    [
        ('{"name":  1}', False),
        ('{"name":\n\n1}', False),
        ('{"name":\n \t1}', True),
        ('{"name":1}', True),
        (" {}", False),
    ],
)
def test_white_space_in_json_is_bounded(text: str, allows: bool) -> None:
    assert continues(place("json", json.dumps(PERSON)), text.encode()) is allows


def test_a_copy_is_independent() -> None:
    first = place("regex", "abc")
    second = first.copy()
    first.append(ord("a"))
    assert (allowed(first), allowed(second)) == ({ord("b")}, {ord("a")})


def test_a_wrong_token_is_an_error_from_then_on() -> None:
    here = place("regex", "abc")
    assert not here.append(ord("x"))
    assert here.allowed().error


UNMET = '{"type":"integer","minimum":5,"maximum":1}'


def required(name: str, inner: str, definition: str = "{}") -> str:
    """A schema of objects with one required member."""
    whole = {"type": "object", "properties": {name: json.loads(inner)}, "required": [name]}
    return json.dumps(whole | {"$defs": {"b": json.loads(definition)}})


LIST = {"type": "array", "items": json.loads(UNMET), "minItems": 1}
MEMBER = json.loads(required("a", UNMET))


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (
            "json",
            '{"properties":{"a":{"items":{"type":"strng"}}}}',
            "Invalid type: strng (at /properties/a/items of the schema)",
        ),
        (
            "json",
            '{"$defs":{"x/y":{"type":"string","pattern":"("}},"$ref":"#/$defs/x~1y"}',
            "(at /$defs/x~1y of the schema)",
        ),
        (
            "json",
            '{"anyOf":[{"type":"string"},{"not":{"type":"integer"}}]}',
            'Unimplemented keys: ["not"] (at /anyOf/1 of the',
        ),
        ("json", '{"allOf":[{"type":"string"},{"type":"integer"}]}', "Unsatisfiable schema"),
        ("json", "false", "Unsatisfiable schema"),
        ("json", required("a/b", required("it's", UNMET)), "(1) (at /properties/a~1b/properties/it's of the schema)"),
        ("json", required("", required("", UNMET)), "(1) (at /properties//properties/ of the schema)"),
        (
            "json",
            json.dumps({"type": "array", "prefixItems": [{}, LIST], "minItems": 2}),
            "(at /prefixItems/1/items of",
        ),
        ("json", json.dumps({"allOf": [MEMBER]}), "(1) (at /allOf/0/properties/a of the schema)"),
        ("json", required("a", '{"$ref":"#/$defs/b"}', UNMET), "(1) (at /properties/a of the schema)"),
        (
            "json",
            json.dumps({"type": "object", "additionalProperties": json.loads(UNMET), "required": ["q"]}),
            "required property 'q' is unsatisfiable (at the top of the schema)",
        ),
        ("json", '{"$ref":"#/$defs/none"}', "Pointer '/$defs/none' does not exist"),
        ("regex", "(a", "unclosed group"),
        ("regex", "(?=a)b", "look-around"),
        ("regex", r"(a)\1", "backreferences are not supported"),
        ("lark", 'start: "a" b', 'at 1(8): unknown name: "b"'),
        ("gbnf", 'root ::= "a" b', "Rule 'b' not found"),
        ("gbnf", 'root ::= "a', "Unexpected end of input at line 1"),
    ],
)
def test_what_is_wrong_in_a_grammar_is_said(kind: GrammarKind, text: str, message: str) -> None:
    with pytest.raises(InvalidGrammar) as problem:
        place(kind, text)
    assert message in str(problem.value)
    assert len(str(problem.value)) < 400


def nested(depth: int) -> str:
    return '{"type":"array","items":' * depth + "{}" + "}" * depth


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("json", nested(400)),
        (
            "json",
            json.dumps({"allOf": [{"anyOf": [{"required": [f"a{i}"]}, {"required": [f"b{i}"]}]} for i in range(24)]}),
        ),
        ("regex", "(" * 5000 + "a" + ")" * 5000),
        ("lark", "start: " + "(" * 5000 + '"a"' + ")" * 5000),
    ],
    ids=["deep schema", "product of alternatives", "deep regex", "deep grammar"],
)
def test_what_is_too_large_is_refused(kind: GrammarKind, text: str) -> None:
    with pytest.raises(InvalidGrammar):
        place(kind, text)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("regex", "(a?){5000}a{5000}"),
        ("regex", "(a*)*" * 100),
        ("regex", "((a{1,100}){1,100}){1,100}"),
        ("regex", "[am]*a[am]{25}"),
        ("lark", 'start: a\na: a a | "n" | '),
        ("lark", 'start: start "a" | "a"'),
        ("json", '{"$defs":{"a":{"$ref":"#/$defs/b"},"b":{"$ref":"#/$defs/a"}},"$ref":"#/$defs/a"}'),
        ("json", '{"$defs":{"n":{"properties":{"c":{"$ref":"#/$defs/n"}},"required":["c"]}},"$ref":"#/$defs/n"}'),
        ("json", '{"type":"array","minItems":100000}'),
    ],
)
def test_evil_grammars_give_masks_or_errors(kind: GrammarKind, text: str) -> None:
    """They neither end the process nor take a time that grows with their size."""
    try:
        here = place(kind, text)
    except InvalidGrammar:
        return
    rng = random.Random(1)
    for _ in range(30):
        found = here.allowed()
        if found.error or not found.mask.any():
            return
        here.append(rng.choice(sorted(allowed(here))))


def test_many_choices_are_compiled_and_followed() -> None:
    here = place("choice", json.dumps([f"{number}" for number in range(3000)]))
    for byte in b"2999":
        assert not here.allowed().error
        here.append(TEXTS.index(bytes([byte])))
    assert here.allowed().complete


def test_an_expression_with_many_backslashes_is_read_at_once() -> None:
    """A search for the anchor that tried each backslash would take minutes."""
    assert compiled_grammar._without_anchors("\\" * 130_000 + "$") == "\\" * 130_000
    assert compiled_grammar._without_anchors("\\" * 3 + "$") == "\\" * 3 + "$"


def test_an_expression_that_ends_in_an_escape_is_refused() -> None:
    with pytest.raises(InvalidGrammar, match="single backslash"):
        place("regex", "a\\")
