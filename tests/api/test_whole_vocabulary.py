"""`logprobs` and `prompt_logprobs` -1: all of the vocabulary at every position, whole and streamed row by row."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import httpx
import pytest
from completion_requests import complete, joined, one, refused, stream, tokens_of

PROMPT = "Once upon a time"
Json = dict[str, Any]


@pytest.fixture(scope="module")
def all_tokens(serve: Any) -> Iterator[httpx.Client]:
    """A client of a server without API keys that allows any number of alternatives."""
    with serve("--max-logprobs", "-1", "--parallel", "4", key=None) as server, server.http() as client:
        yield client


@pytest.fixture(scope="module")
def size(all_tokens: httpx.Client) -> int:
    found: int = all_tokens.get("/tokenizer_info").json()["vocab_size"]
    assert found > 1000, "this model's alternatives would not be packed"
    return found


def test_every_token_of_the_vocabulary_is_reported(all_tokens: httpx.Client, size: int) -> None:
    body = {"prompt": PROMPT, "max_tokens": 3, "temperature": 0, "return_tokens_as_token_ids": True}
    some = one(all_tokens, **body, logprobs=20)["logprobs"]["top_logprobs"]
    found = one(all_tokens, **body, logprobs=-1)["logprobs"]
    for entry, first in zip(found["top_logprobs"], some, strict=True):
        assert set(entry) == {f"token_id:{token}" for token in range(size)}
        assert list(entry.items())[:20] == list(first.items())
        values = list(entry.values())
        assert all(one >= other for one, other in pairwise(values))
        assert abs(math.fsum(map(math.exp, values)) - 1) < 1e-5
    assert one(all_tokens, **body, logprobs=2**31 - 1)["logprobs"] == found


def test_of_tokens_with_the_same_text_the_likeliest_is_named(all_tokens: httpx.Client) -> None:
    body = {"prompt": PROMPT, "max_tokens": 1, "temperature": 0}
    by_id = one(all_tokens, **body, logprobs=-1, return_tokens_as_token_ids=True)["logprobs"]["top_logprobs"][0]
    by_text = one(all_tokens, **body, logprobs=-1)["logprobs"]["top_logprobs"][0]
    listed = one(all_tokens, **body, logprobs=1000)["logprobs"]["top_logprobs"][0]
    assert list(by_text.items())[: len(listed)] == list(listed.items())
    assert set(by_text.values()) <= set(by_id.values())


def test_prompt_tokens_have_ranks_and_the_same_numbers_as_an_echo(all_tokens: httpx.Client, size: int) -> None:
    body = {"prompt": PROMPT, "max_tokens": 0, "echo": True, "return_tokens_as_token_ids": True}
    found = one(all_tokens, **body, logprobs=-1, prompt_logprobs=-1)
    few = one(all_tokens, **body, logprobs=5, prompt_logprobs=5)
    first, *entries = found["prompt_logprobs"]
    assert first is None
    columns = found["logprobs"]["top_logprobs"][1:]
    for entry, column, small in zip(entries, columns, few["prompt_logprobs"][1:], strict=True):
        assert sorted(each["rank"] for each in entry.values()) == list(range(1, size + 1))
        assert {f"token_id:{token}": each["logprob"] for token, each in entry.items()} == column
        assert small.items() <= entry.items()
    assert found["logprobs"]["token_logprobs"] == few["logprobs"]["token_logprobs"]
    mixed = one(all_tokens, **body, logprobs=-1, prompt_logprobs=5)
    assert (mixed["prompt_logprobs"], mixed["logprobs"]) == (few["prompt_logprobs"], found["logprobs"])


BODIES: list[Json] = [
    {"logprobs": -1, "max_tokens": 4},
    {"logprobs": -1, "max_tokens": 4, "n": 2, "stop": [" the cat"], "return_token_ids": True},
    {"logprobs": -1, "echo": True, "max_tokens": 2},
    {"logprobs": -1, "echo": True, "max_tokens": 0},
    {"logprobs": 2, "echo": True, "prompt_logprobs": -1, "max_tokens": 2, "n": 2},
    {"logprobs": -1, "echo": True, "prompt_logprobs": -1, "max_tokens": 2, "return_token_ids": True},
    {"prompt_logprobs": -1, "echo": True, "max_tokens": 2},
    {"prompt_logprobs": -1, "max_tokens": 2, "prompt": ["Once", PROMPT], "return_token_ids": True},
    {"prompt_logprobs": -1, "echo": True, "logprobs": 0, "max_tokens": 2, "prompt": "a"},
    {"prompt_logprobs": 3, "max_tokens": 2, "return_token_ids": True},
    {"prompt_logprobs": 3, "echo": True, "logprobs": 3, "max_tokens": 2, "n": 2},
    {"logprobs": -1, "echo": True, "max_tokens": 1, "prompt": "é😀 漢"},
]


@pytest.mark.parametrize("body", BODIES, ids=str)
def test_a_stream_adds_up_to_the_whole_response(all_tokens: httpx.Client, body: Json) -> None:
    body = {"prompt": PROMPT, "seed": 5} | body
    chunks = stream(all_tokens, **body)
    whole = complete(all_tokens, **body)["choices"]
    parts: dict[int, list[Json]] = {}
    for chunk in chunks:
        for part in chunk["choices"]:
            parts.setdefault(part["index"], []).append(part)
    for choice, sum_of_parts in zip(whole, joined(chunks), strict=True):
        mine = parts[choice["index"]]
        assert (sum_of_parts["text"], sum_of_parts["logprobs"]) == (choice["text"], choice["logprobs"])
        for name in ("prompt_logprobs", "prompt_token_ids", "token_ids"):
            found = [item for part in mine for item in part.get(name) or ()]
            assert found == (choice.get(name) or []), name
        assert [part["finish_reason"] for part in mine] == [*[None] * (len(mine) - 1), choice["finish_reason"]]


def test_each_event_has_at_most_one_row(all_tokens: httpx.Client) -> None:
    body = {"prompt": PROMPT, "echo": True, "logprobs": -1, "prompt_logprobs": -1, "max_tokens": 6, "seed": 1}
    body |= {"stop": ["never to be found"], "logit_bias": {str(tokens_of(all_tokens, "n")[0]): 5}}
    for chunk in stream(all_tokens, **body):
        for part in chunk["choices"]:
            assert sum(entry is not None for entry in part["logprobs"]["top_logprobs"]) <= 1
            assert len(part.get("prompt_logprobs") or ()) <= 1


def test_a_second_scoring_has_the_same_numbers_and_leaves_plain_scores_cached(all_tokens: httpx.Client) -> None:
    body = {
        "prompt": "The dog ran over the hill and saw the sea. " * 8,
        "echo": True,
        "max_tokens": 0,
        "cache_salt": "w",
    }
    first = one(all_tokens, **body, logprobs=-1)
    assert one(all_tokens, **body, logprobs=-1) == first
    plain = complete(all_tokens, **body, logprobs=0)
    assert plain["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert plain["choices"][0]["logprobs"]["token_logprobs"] == first["logprobs"]["token_logprobs"]


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
def test_minus_one_needs_a_limit_that_allows_it(http: httpx.Client, all_tokens: httpx.Client, name: str) -> None:
    assert "all" in refused(http, name, prompt="a", **{name: -1})["message"]
    refused(all_tokens, name, prompt="a", **{name: -2})


def test_an_unstreamed_response_is_bounded_and_a_stream_is_not(all_tokens: httpx.Client) -> None:
    body = {"prompt": [PROMPT] * 64, "n": 30, "echo": True, "logprobs": -1, "max_tokens": 100}
    error = refused(all_tokens, "logprobs", **body)
    assert error["code"] == "answer_too_large"
    with all_tokens.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        assert response.status_code == 200
        assert next(response.iter_lines()).startswith("data: {")


def test_a_prediction_changes_nothing_in_a_row(all_tokens: httpx.Client) -> None:
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "logprobs": -1}
    plain = one(all_tokens, **body)
    assert one(all_tokens, **body, prediction={"type": "content", "content": plain["text"]}) == plain
