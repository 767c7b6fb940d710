"""Streams: the framing of events, the order of chunks, and that the chunks add up to the whole response."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest
from completion_requests import COLUMNS, complete, joined, one, problem, stream
from one_text_model import TEXT

STORY = "Once upon a time"
SEVERAL = {"prompt": [STORY, "The dog"], "n": 3, "seed": 5, "max_tokens": 12}
KINDS = {
    "greedy": {"prompt": STORY, "temperature": 0},
    "seeded": {"prompt": STORY, "seed": 3, "max_tokens": 30},
    "logprobs": {"prompt": STORY, "seed": 3, "logprobs": 5},
    "logprobs of none": {"prompt": STORY, "temperature": 0, "logprobs": 0},
    "echo": {"prompt": STORY, "seed": 4, "echo": True},
    "echo with logprobs": {"prompt": "héllo 😀 wörld", "seed": 4, "echo": True, "logprobs": 2},
    "scoring": {"prompt": [STORY, "The dog"], "max_tokens": 0, "echo": True, "logprobs": 1},
    "several": SEVERAL,
    "several with logprobs": SEVERAL | {"logprobs": 1, "echo": True},
    "stops": SEVERAL | {"stop": [" the", ".", "e w"], "max_tokens": 40},
    "suffix": {"prompt": "The dog ", "suffix": " home.", "seed": 6},
}
ONE_TEXT_KINDS = {
    "end": {"max_tokens": 40},
    "stop": {"max_tokens": 40, "stop": "34567"},
    "stop of many bytes": {"max_tokens": 40, "stop": "😀漢"},
    "stop that never completes": {"max_tokens": 40, "stop": ["123456789!", "12345x", "😀字"]},
    "length inside a character": {"max_tokens": 4},
    "stop that the length leaves open": {"max_tokens": 14, "stop": "123456"},
}


@pytest.mark.parametrize("body", KINDS.values(), ids=KINDS.keys())
def test_the_chunks_of_a_stream_add_up_to_the_whole_response(http: httpx.Client, body: dict[str, Any]) -> None:
    whole = complete(http, **body)
    *chunks, last = stream(http, **body, stream_options={"include_usage": True})
    assert joined(chunks) == whole["choices"]
    assert last["usage"] == whole["usage"]
    assert last["system_fingerprint"] == whole["system_fingerprint"]


@pytest.mark.parametrize("logprobs", [None, 2])
@pytest.mark.parametrize("body", ONE_TEXT_KINDS.values(), ids=ONE_TEXT_KINDS.keys())
def test_a_stream_of_split_characters_and_stops_adds_up(
    one_text_client: httpx.Client, body: dict[str, Any], logprobs: int | None
) -> None:
    whole = complete(one_text_client, prompt="(", **body, logprobs=logprobs)
    assert joined(stream(one_text_client, prompt="(", **body, logprobs=logprobs)) == whole["choices"]


@pytest.mark.parametrize("body", KINDS.values(), ids=KINDS.keys())
def test_every_chunk_has_the_same_shape(http: httpx.Client, server: Any, body: dict[str, Any]) -> None:
    chunks = stream(http, **body)
    first = chunks[0]
    assert re.fullmatch("cmpl-[0-9A-Za-z]{29}", first["id"])
    assert isinstance(first["created"], int)
    for chunk in chunks:
        (choice,) = chunk["choices"]
        assert {name: chunk[name] for name in chunk if name != "choices"} == {
            "id": first["id"],
            "object": "text_completion",
            "created": first["created"],
            "model": server.model,
            "system_fingerprint": first["system_fingerprint"],
        }
        assert choice.keys() == {"text", "index", "logprobs", "finish_reason"}
        assert isinstance(choice["text"], str)
        assert (choice["logprobs"] is None) == ("logprobs" not in body)


@pytest.mark.parametrize("body", KINDS.values(), ids=KINDS.keys())
def test_a_choice_finishes_once_and_has_no_chunk_after(http: httpx.Client, body: dict[str, Any]) -> None:
    finished: set[int] = set()
    for chunk in stream(http, **body):
        (choice,) = chunk["choices"]
        assert choice["index"] not in finished
        if choice["finish_reason"] is not None:
            finished.add(choice["index"])
    assert finished == set(range(len(complete(http, **body)["choices"])))


def test_response_ids_are_unique(http: httpx.Client) -> None:
    assert len({stream(http, prompt="a", max_tokens=1)[0]["id"] for _ in range(3)}) == 3


@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}, {"include_usage": None}], ids=str)
def test_usage_is_absent_by_default(http: httpx.Client, options: dict[str, Any] | None) -> None:
    chunks = stream(http, prompt="a", max_tokens=2, stream_options=options)
    assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)


def test_usage_is_null_until_the_last_chunk(http: httpx.Client) -> None:
    *chunks, last = stream(http, **SEVERAL, stream_options={"include_usage": True})
    assert {chunk["usage"] for chunk in chunks} == {None}
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + last["usage"]["completion_tokens"]


@pytest.mark.parametrize("stop", ["34567", "😀漢", "é", ") 1", "."])
def test_no_part_of_a_stop_string_is_sent(one_text_client: httpx.Client, stop: str) -> None:
    before, _, _ = TEXT.removeprefix("(").partition(stop)
    sent = ""
    for chunk in stream(one_text_client, prompt="(", max_tokens=40, stop=stop):
        sent += chunk["choices"][0]["text"]
        assert before.startswith(sent)
    assert sent == before


def test_an_incomplete_stop_string_is_sent(one_text_client: httpx.Client) -> None:
    (choice,) = joined(stream(one_text_client, prompt="(", max_tokens=14, stop="123456"))
    assert (choice["text"], choice["finish_reason"]) == ("é😀漢) 123", "length")


def test_a_character_cut_by_max_tokens_is_replaced(one_text_client: httpx.Client) -> None:
    (choice,) = joined(stream(one_text_client, prompt="(", max_tokens=4, logprobs=0))
    assert choice["text"] == one(one_text_client, prompt="(", max_tokens=4)["text"] == "é\ufffd"
    assert choice["logprobs"]["tokens"] == [r"bytes:\xc3", r"bytes:\xa9", r"bytes:\xf0", r"bytes:\x9f"]
    assert choice["logprobs"]["text_offset"] == [1, 1, 2, 2]


def test_a_chunk_with_logprobs_has_a_token_unless_it_is_the_end(http: httpx.Client) -> None:
    for chunk in stream(http, **SEVERAL, logprobs=1):
        (choice,) = chunk["choices"]
        lengths = {len(choice["logprobs"][name]) for name in COLUMNS}
        assert len(lengths) == 1
        assert lengths != {0} or choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"prompt": "a", "n": 0}, 400),
        ({"prompt": [[-1]]}, 400),
        ({"prompt": "a", "max_tokens": 10**6}, 400),
        ({"prompt": "a", "model": "no-such"}, 404),
    ],
    ids=["field", "token", "length", "model"],
)
def test_an_error_before_the_first_byte_is_an_http_error(http: httpx.Client, body: Any, status: int) -> None:
    problem(http.post("/v1/completions", json=body | {"stream": True}), status)


def test_any_accept_header_is_allowed(http: httpx.Client) -> None:
    for accept in ("application/json", "text/event-stream", "image/png"):
        for streamed in (False, True):
            body = {"prompt": "a", "max_tokens": 1, "stream": streamed}
            response = http.post("/v1/completions", json=body, headers={"Accept": accept, "Accept-Encoding": "gzip"})
            assert response.status_code == 200
            assert "content-encoding" not in response.headers
