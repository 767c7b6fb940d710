"""Requests as real clients send them, each to three servers: accepted ones, and refused ones with the reason.

A line of requests.jsonl is a request: `captured` on the wire and shortened, or `described`, put together from the
fields that the client sends. Its `status` is what each server answers: the status, and of a refusal the field to
blame. The model "tiny" stands for the one that is served; other names are the client's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

Json = dict[str, Any]

REQUESTS = [json.loads(line) for line in (Path(__file__).parent / "requests.jsonl").read_text("utf-8").splitlines()]
SERVERS = {"default": (), "ignore_unknown": ("--ignore-unknown",), "strict": ("--strict",)}


@pytest.fixture(scope="module", params=SERVERS)
def mode(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def served(serve: Any, mode: str) -> Iterator[tuple[httpx.Client, str]]:
    with serve(*SERVERS[mode], "--parallel", "4", key=None) as server, server.http() as http:
        yield http, server.model


@pytest.mark.parametrize("seen", REQUESTS, ids=[f"{at}-{seen['clients'][0]}" for at, seen in enumerate(REQUESTS)])
def test_a_clients_request_gets_the_answer_that_it_should(
    served: tuple[httpx.Client, str], mode: str, seen: Json
) -> None:
    http, model = served
    body = seen["body"]
    if body and body.get("model") == "tiny":
        body = body | {"model": model}
    content = None if body is None else json.dumps(body)
    answer = http.request(seen["method"], seen["path"], headers=seen["headers"], content=content)
    status, _, blamed = seen["status"][mode].partition(" ")
    assert answer.status_code == int(status), answer.text
    if status != "200":
        is_refusal(answer.json()["error"], blamed)
    elif body is None:
        assert [entry["id"] for entry in answer.json()["data"]] == [model]
    elif body.get("stream"):
        is_stream(answer, body)
    else:
        is_answer(answer.json(), body)


def is_refusal(error: Json, blamed: str) -> None:
    """What clients read of an error; the field is named in the sentence that people get to see."""
    assert error["type"] == "invalid_request_error"
    assert blamed in error["message"]
    assert error["param"] in (None, blamed or None)


def is_answer(answer: Json, body: Json) -> None:
    """What clients read of a whole answer: choices by place, arrays of one length, usage that adds up."""
    assert answer["object"] == "text_completion"
    assert [choice["index"] for choice in answer["choices"]] == list(range(choices_of(body)))
    for choice in answer["choices"]:
        is_choice(choice, body)
        assert choice["finish_reason"] in ("stop", "length")
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def is_stream(answer: httpx.Response, body: Json) -> None:
    """What clients read of a stream: bare data lines, a choice a chunk, one end for each, usage if asked for."""
    *events, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(event.startswith("data: {") for event in events)
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    if (body.get("stream_options") or {}).get("include_usage"):
        last = chunks.pop()
        assert last["choices"] == []
        assert last["usage"]["prompt_tokens"] > 0
    finished = []
    for chunk in chunks:
        (choice,) = chunk["choices"]
        is_choice(choice, body)
        finished += [choice["index"]] if choice["finish_reason"] else []
    assert sorted(finished) == list(range(choices_of(body)))


def is_choice(choice: Json, body: Json) -> None:
    assert isinstance(choice["text"], str)
    columns = choice["logprobs"]
    assert (columns is None) == (body.get("logprobs") is None)
    if columns:
        given = [column for column in columns.values() if column is not None]
        assert len({len(column) for column in given}) == 1


def choices_of(body: Json) -> int:
    prompt = body["prompt"]
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    count: int = (len(prompt) if several else 1) * body.get("n", 1)
    return count
