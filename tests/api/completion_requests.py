"""Helpers that send completion requests to a server and check the form of its responses."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import httpx

Json = dict[str, Any]

ENVELOPE = {"message", "type", "param", "code"}
COLUMNS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


def complete(http: httpx.Client, **body: Any) -> Json:
    """The response, not streamed."""
    response = http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    answer: Json = response.json()
    return answer


def one(http: httpx.Client, **body: Any) -> Json:
    """The only choice of a whole response."""
    (choice,) = complete(http, **body)["choices"]
    return choice


def stream(http: httpx.Client, **body: Any) -> list[Json]:
    """The chunks of a streamed response. Checks the framing of its events."""
    response = http.post("/v1/completions", json=body | {"stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    assert b"\r" not in response.content
    *events, done, rest = response.content.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    assert all(event.startswith(b"data: {") and b"\n" not in event for event in events)
    return [json.loads(event.removeprefix(b"data: ")) for event in events]


def joined(chunks: list[Json]) -> list[Json]:
    """The choices of the whole response that all chunks of a stream add up to, in order of their index."""
    choices: dict[int, Json] = {}
    for chunk in chunks:
        for part in chunk["choices"]:
            whole = choices.setdefault(part["index"], part | {"text": "", "logprobs": None, "prompt_logprobs": None})
            whole["text"] += part["text"]
            whole["finish_reason"] = part["finish_reason"]
            if part["logprobs"] is not None:
                before = whole["logprobs"] or {name: [] for name in COLUMNS}
                whole["logprobs"] = {name: added(before[name], part["logprobs"][name]) for name in COLUMNS}
    return [choices[index] for index in sorted(choices)]


def added(before: list[Any] | None, more: list[Any] | None) -> list[Any] | None:
    return None if more is None else (before or []) + more


def problem(response: httpx.Response, status: int) -> Json:
    """The error of a response that must have this status."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"].startswith("application/json")
    (error,) = response.json().values()
    assert error.keys() == ENVELOPE
    return error


def refused(http: httpx.Client, param: str | None = None, status: int = 400, **body: Any) -> Json:
    """The error for an invalid body. `param`: the field that the error may name."""
    error = problem(http.post("/v1/completions", json=body), status)
    assert error["type"] == "invalid_request_error"
    assert error["param"] in (None, param)
    return error


def tokens_of(http: httpx.Client, text: str) -> list[int]:
    response = http.post("/tokenize", json={"prompt": text})
    assert response.status_code == 200, response.text
    tokens: list[int] = response.json()["tokens"]
    return tokens


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Poll until the condition is true. The deadline is long enough for slow machines."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.02)


def is_idle(http: httpx.Client) -> bool:
    """Whether no sequence runs and no prompt waits."""
    load = http.get("/ready").json()
    return bool(load["status"] == "ready" and load["running"] == load["waiting"] == 0)
