"""Constrained output over HTTP: answers parse and validate, alone and together with every other field."""

from __future__ import annotations

import json
import random
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest

SCHEMAS = [
    json.loads(line)
    for line in (Path(__file__).parents[1] / "captured" / "schemas.jsonl").read_text("utf-8").splitlines()
]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}


@pytest.fixture(scope="module")
def bias(http: httpx.Client) -> dict[str, float]:
    """A `logit_bias` with which the small model soon closes what it has opened."""
    found = {}
    for text in ('"', "}", "]", '"}', '",'):
        ids = http.post("/tokenize", json={"prompt": text}).json()["tokens"]
        if len(ids) == 1:
            found[str(ids[0])] = 5.0
    return found


def ask(http: httpx.Client, **body: Any) -> httpx.Response:
    return http.post("/v1/completions", json={"prompt": "A person: ", "max_tokens": 300, "seed": 3} | body)


def choices(http: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    response = ask(http, **body)
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = response.json()["choices"]
    return found


def is_person(text: str) -> bool:
    return jsonschema_rs.validator_for(PERSON).is_valid(json.loads(text))


@pytest.mark.parametrize("schema", [pytest.param(each["schema"], id=each["name"]) for each in SCHEMAS])
def test_answers_parse_and_match_schemas_as_users_write_them(http: httpx.Client, bias: Any, schema: Any) -> None:
    validator = jsonschema_rs.validator_for(schema, validate_formats=True)
    for choice in choices(
        http, response_format={"type": "json_schema", "json_schema": {"schema": schema}}, n=4, logit_bias=bias
    ):
        assert choice["finish_reason"] == "stop"
        assert validator.is_valid(json.loads(choice["text"])), choice["text"]


def test_every_field_for_a_schema_gives_the_same_text(http: httpx.Client, bias: Any) -> None:
    first = choices(http, response_format=FORMAT, logit_bias=bias)
    assert is_person(first[0]["text"])
    assert choices(http, json_schema=PERSON, logit_bias=bias) == first
    assert choices(http, structured_outputs={"json": PERSON}, logit_bias=bias) == first
    assert choices(http, structured_outputs={"json": json.dumps(PERSON)}, logit_bias=bias) == first


def test_a_json_object(http: httpx.Client, bias: Any) -> None:
    for fields in ({"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}):
        for choice in choices(http, **fields, n=3, logit_bias=bias):
            assert isinstance(json.loads(choice["text"]), dict)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"structured_outputs": {"regex": r"^\d{4}-(0[1-9]|1[0-2])$"}}, r"[0-9]{4}-(0[1-9]|1[0-2])"),
        ({"structured_outputs": {"choice": ["yes", "no", "not at all"]}}, "yes|no|not at all"),
        (
            {"structured_outputs": {"grammar": 'start: WORD ("," WORD)~1..2 "."\nWORD: /[a-z]{1,5}/'}},
            r"[a-z]{1,5}(,[a-z]{1,5}){1,2}\.",
        ),
        ({"grammar": 'root ::= "<" [a-c]{2,4} ">" | "none"'}, "<[a-c]{2,4}>|none"),
    ],
    ids=str,
)
def test_other_grammars(http: httpx.Client, fields: Any, pattern: str) -> None:
    for choice in choices(http, **fields, n=6):
        assert choice["finish_reason"] == "stop"
        assert re.fullmatch(pattern, choice["text"]), choice["text"]


def test_any_text_is_allowed_where_the_fields_say_so(http: httpx.Client) -> None:
    plain = choices(http, max_tokens=20)
    assert choices(http, max_tokens=20, response_format={"type": "text"}) == plain
    assert choices(http, max_tokens=20, grammar="") == plain


def test_a_stream_has_the_text_of_the_whole_response(http: httpx.Client, bias: Any) -> None:
    fields = {"response_format": FORMAT, "n": 3, "logprobs": 2, "logit_bias": bias}
    whole = choices(http, **fields)
    texts, reasons = [""] * 3, [None] * 3
    for line in ask(http, stream=True, **fields).text.splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line[6:])["choices"]:
                texts[choice["index"]] += choice["text"]
                reasons[choice["index"]] = choice["finish_reason"] or reasons[choice["index"]]
    assert texts == [choice["text"] for choice in whole]
    assert reasons == ["stop"] * 3
    assert all(is_person(text) for text in texts)


def test_seeds_hold_and_differ(http: httpx.Client, bias: Any) -> None:
    fields = {"response_format": FORMAT, "n": 4, "logit_bias": bias}
    first = choices(http, **fields)
    assert choices(http, **fields) == first
    assert choices(http, **fields, cache_salt="computed again") == first
    assert choices(http, **fields | {"seed": 4}) != first
    assert len({choice["text"] for choice in first}) > 1


@pytest.mark.parametrize(
    "more",
    [
        {"temperature": 0},
        {"top_k": 5},
        {"top_p": 0.5},
        {"min_p": 0.2},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"best_of": 4, "n": 2},
        {"min_tokens": 30},
        {"ignore_eos": True},
        {"echo": True, "logprobs": 1},
        {"prompt_logprobs": 1},
        {"return_token_ids": True},
        {"prediction": {"type": "content", "content": '{"name": "'}},
    ],
    ids=str,
)
def test_a_schema_holds_with_every_other_field(http: httpx.Client, bias: Any, more: dict[str, Any]) -> None:
    for choice in choices(http, response_format=FORMAT, **{"logit_bias": bias, **more}):
        assert choice["finish_reason"] == "stop"
        assert is_person(choice["text"].removeprefix("A person: ")), choice["text"]


def test_a_prediction_changes_no_text(http: httpx.Client, bias: Any) -> None:
    plain = choices(http, response_format=FORMAT, logit_bias=bias)
    prediction = {"type": "content", "content": plain[0]["text"]}
    assert choices(http, response_format=FORMAT, logit_bias=bias, prediction=prediction) == plain


def test_a_stop_string_ends_the_text_earlier(http: httpx.Client, bias: Any) -> None:
    whole = choices(http, response_format=FORMAT, logit_bias=bias)[0]["text"]
    (choice,) = choices(http, response_format=FORMAT, logit_bias=bias, stop='"age"')
    assert (choice["text"], choice["finish_reason"]) == (whole.partition('"age"')[0], "stop")


def test_log_probabilities_are_those_of_the_model_without_a_grammar(http: httpx.Client) -> None:
    (choice,) = choices(http, structured_outputs={"choice": ["yes"]}, logprobs=3, return_token_ids=True)
    given = http.post("/tokenize", json={"prompt": "A person: "}).json()["tokens"] + choice["token_ids"]
    scored = choices(http, prompt=given, max_tokens=0, echo=True, logprobs=3)[0]["logprobs"]
    count = len(choice["token_ids"])
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(scored["token_logprobs"][-count:], abs=1e-3)
    assert [[*top][:3] for top in choice["logprobs"]["top_logprobs"]] == [
        [*top][:3] for top in scored["top_logprobs"][-count:]
    ]
    assert sum(choice["logprobs"]["token_logprobs"]) < -1, "the model would not have written it by itself"


def test_usage_counts_the_tokens_of_the_text(http: httpx.Client) -> None:
    answer = ask(http, structured_outputs={"choice": ["yes"]}, return_token_ids=True).json()
    assert answer["usage"]["completion_tokens"] == len(answer["choices"][0]["token_ids"])


def test_special_tokens_are_no_text(http: httpx.Client, facts: dict[str, Any]) -> None:
    """A grammar that allows any text never allows their names as one token."""
    fields = {"structured_outputs": {"regex": "(?s:.){40,60}"}, "logit_bias": {str(facts["eos_token_id"]): 100}}
    for choice in choices(http, **fields, n=4, return_token_ids=True, temperature=0.5):
        assert facts["eos_token_id"] not in choice["token_ids"][:-1]
        assert 40 <= len(choice["text"]) <= 60


def test_100_mixed_requests_are_the_same_alone_and_in_a_crowd(http: httpx.Client) -> None:
    rng = random.Random(1)
    constraints: list[dict[str, Any]] = [
        {},
        {"response_format": FORMAT},
        {"json_schema": {"type": "array", "items": {"type": "integer"}}},
        {"structured_outputs": {"regex": "([a-z]+ ){3,9}"}},
        {"grammar": 'root ::= ("one" | "two" | "three") ", " root | "end"'},
    ]
    more: list[dict[str, Any]] = [
        {},
        {"temperature": 0},
        {"n": 3},
        {"logprobs": 2, "top_p": 0.8},
        {"stop": ["e"], "top_k": 20},
        {"min_tokens": 5, "frequency_penalty": 0.4},
        {"mirostat": 2, "logprob_token_ids": [5, 6], "logprobs": 1},
        {"dry_multiplier": 0.8, "xtc_probability": 0.5, "typical_p": 0.9},
    ]
    bodies = [
        {
            "prompt": f"Text {rng.randrange(5)}: ",
            "max_tokens": 24,
            "seed": seed,
            **rng.choice(constraints),
            **rng.choice(more),
        }
        for seed in range(100)
    ]

    def answer(body: dict[str, Any]) -> Any:
        return choices(http, **body)

    with ThreadPoolExecutor(16) as pool:
        crowd = list(pool.map(answer, bodies))
    assert crowd == [answer(body) for body in bodies]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "strng"}}}},
            "response_format.json_schema.schema",
            "Invalid type: strng",
        ),
        ({"json_schema": {"properties": {"a": {"not": {}}}}}, "json_schema", "at /properties/a of the schema"),
        ({"json_schema": {"allOf": [{"type": "string"}, {"type": "null"}]}}, "json_schema", "Unsatisfiable schema"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex", "unclosed group"),
        ({"structured_outputs": {"grammar": "start: word"}}, "structured_outputs.grammar", 'unknown name: "word"'),
        (
            {"grammar": 'root ::= "a" word'},
            "grammar",
            "cannot be converted from llama.cpp's notation: Rule 'word' not found",
        ),
        ({"json_schema": {"enum": ["a" * 200_000]}}, "json_schema", "too long"),
        ({"json_schema": {}, "grammar": 'root ::= "a"'}, "grammar", "Leave out one of them"),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_a_400_that_says_where(
    http: httpx.Client, fields: Any, param: str, message: str, stream: bool
) -> None:
    response = ask(http, **fields, stream=stream)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert message in error["message"]


def test_refused_grammars_and_running_requests_do_not_disturb_each_other(http: httpx.Client) -> None:
    expected = choices(http, max_tokens=60)

    def refused(number: int) -> int:
        return ask(http, structured_outputs={"regex": "(" * (1 + number % 40)}).status_code

    with ThreadPoolExecutor(8) as pool:
        texts = [pool.submit(choices, http, max_tokens=60) for _ in range(4)]
        assert set(pool.map(refused, range(40))) == {400}
        assert [text.result() for text in texts] == [expected] * 4
