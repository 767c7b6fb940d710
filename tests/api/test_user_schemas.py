"""200 schemas as users write them: every answer that ends by itself parses and validates; others are refused."""

from __future__ import annotations

import json
from typing import Any

import httpx
import jsonschema_rs
import pytest

from user_schemas import REFUSED, SCHEMAS

EVERY = 9
"""The default tests take each ninth schema."""


@pytest.fixture(scope="module")
def bias(http: httpx.Client) -> dict[str, float]:
    """A `logit_bias` with which the small model soon closes what it has opened."""
    found = {}
    for text in ('"', "}", "]", '"}', '",', "null", "1", "0"):
        ids = http.post("/tokenize", json={"prompt": text}).json()["tokens"]
        if len(ids) == 1:
            found[str(ids[0])] = 5.0
    return found


def answers(http: httpx.Client, schema: Any, **more: Any) -> list[dict[str, Any]]:
    body = {"prompt": "As JSON: ", "max_tokens": 400, "seed": 11, "n": 3, "json_schema": schema, **more}
    response = http.post("/v1/completions", json=body, timeout=120)
    assert response.status_code == 200, response.text
    choices: list[dict[str, Any]] = response.json()["choices"]
    return choices


def check(http: httpx.Client, bias: Any, schema: Any) -> None:
    validator = jsonschema_rs.validator_for(schema, validate_formats=True)
    choices = answers(http, schema, logit_bias=bias) + answers(http, schema, logit_bias=bias, temperature=0, n=1)
    ended = [choice["text"] for choice in choices if choice["finish_reason"] == "stop"]
    assert ended
    for text in ended:
        assert validator.is_valid(json.loads(text)), text


def pick(chosen: bool) -> list[Any]:
    return [
        pytest.param(schema, id=name)
        for at, (name, schema) in enumerate(SCHEMAS.items())
        if (at % EVERY == 0) == chosen
    ]


def test_there_are_200_different_schemas() -> None:
    assert len(SCHEMAS) == len({json.dumps(schema) for schema in SCHEMAS.values()}) == 200


@pytest.mark.parametrize("schema", pick(True))
def test_answers_match_some_of_200_schemas(http: httpx.Client, bias: Any, schema: Any) -> None:
    check(http, bias, schema)


@pytest.mark.slow
@pytest.mark.parametrize("schema", pick(False))
def test_answers_match_the_others_of_200_schemas(http: httpx.Client, bias: Any, schema: Any) -> None:
    check(http, bias, schema)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_constrained_is_refused_with_the_place(http: httpx.Client, name: str) -> None:
    schema, place = REFUSED[name]
    response = http.post("/v1/completions", json={"json_schema": schema})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "invalid_grammar", "json_schema")
    assert f"(at {place} of the schema)" in error["message"]
