"""Sends the requests of real clients to three servers, and checks each status and the named field of each error.

A line of requests.jsonl is a request. It was `captured` on the network and shortened, or `described`: built from the
fields that the client sends. Its `status` has for each server the expected status, and for an error the field that the
message names. The test replaces the model "tiny" by the served model; other names are the client's own.
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
def test_a_clients_request_has_the_expected_response(served: tuple[httpx.Client, str], mode: str, seen: Json) -> None:
    http, model = served
    body = seen["body"]
    if body and body.get("model") == "tiny":
        body = body | {"model": model}
    content = None if body is None else json.dumps(body)
    answer = http.request(seen["method"], seen["path"], headers=seen["headers"], content=content)
    status, _, field = seen["status"][mode].partition(" ")
    assert answer.status_code == int(status), answer.text
    if status != "200":
        check_error(answer.json()["error"], field)
    elif body is None:
        assert [entry["id"] for entry in answer.json()["data"]] == [model]
    elif body.get("stream"):
        check_stream(answer, body)
    else:
        check_response(answer.json(), body)


def check_error(error: Json, field: str) -> None:
    """Check the parts of an error that clients read. The message names the field."""
    assert error["type"] == "invalid_request_error"
    assert field in error["message"]
    assert error["param"] in (None, field or None)


def check_response(answer: Json, body: Json) -> None:
    """Check a whole response: choices in order, columns of equal length, the usage's sum."""
    assert answer["object"] == "text_completion"
    assert [choice["index"] for choice in answer["choices"]] == list(range(choices_of(body)))
    for choice in answer["choices"]:
        check_choice(choice, body)
        assert choice["finish_reason"] in ("stop", "length")
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def check_stream(answer: httpx.Response, body: Json) -> None:
    """Check a stream: only data lines, one choice per chunk, one end per choice, and usage if requested."""
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
        check_choice(choice, body)
        finished += [choice["index"]] if choice["finish_reason"] else []
    assert sorted(finished) == list(range(choices_of(body)))


def check_choice(choice: Json, body: Json) -> None:
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
