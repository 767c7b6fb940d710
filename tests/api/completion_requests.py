"""Ways to ask a server for completions, and what every answer of a kind must look like."""

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
    """The whole answer."""
    response = http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    answer: Json = response.json()
    return answer


def one(http: httpx.Client, **body: Any) -> Json:
    """The only choice of the whole answer."""
    (choice,) = complete(http, **body)["choices"]
    return choice


def stream(http: httpx.Client, **body: Any) -> list[Json]:
    """The chunks of a streamed answer, which is framed as it must be."""
    response = http.post("/v1/completions", json=body | {"stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    assert b"\r" not in response.content
    *events, done, rest = response.content.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    assert all(event.startswith(b"data: {") and b"\n" not in event for event in events)
    return [json.loads(event.removeprefix(b"data: ")) for event in events]


def joined(chunks: list[Json]) -> list[Json]:
    """The choices that the chunks of a stream add up to, in order."""
    choices: dict[int, Json] = {}
    for chunk in chunks:
        for part in chunk["choices"]:
            whole = choices.setdefault(part["index"], part | {"text": "", "logprobs": None})
            whole["text"] += part["text"]
            whole["finish_reason"] = part["finish_reason"]
            if part["logprobs"] is not None:
                before = whole["logprobs"] or {name: [] for name in COLUMNS}
                whole["logprobs"] = {name: added(before[name], part["logprobs"][name]) for name in COLUMNS}
    return [choices[index] for index in sorted(choices)]


def added(before: list[Any] | None, more: list[Any] | None) -> list[Any] | None:
    return None if more is None else (before or []) + more


def problem(response: httpx.Response, status: int) -> Json:
    """The error in an answer that must be one."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"].startswith("application/json")
    (error,) = response.json().values()
    assert error.keys() == ENVELOPE
    return error


def refused(http: httpx.Client, blamed: str | None = None, status: int = 400, **body: Any) -> Json:
    """The error for a body that is the caller's fault; `blamed` is the field that the error may name."""
    error = problem(http.post("/v1/completions", json=body), status)
    assert error["type"] == "invalid_request_error"
    assert error["param"] in (None, blamed)
    return error


def tokens_of(http: httpx.Client, text: str) -> list[int]:
    response = http.post("/tokenize", json={"prompt": text})
    assert response.status_code == 200, response.text
    tokens: list[int] = response.json()["tokens"]
    return tokens


def wait_until(holds: Callable[[], bool], seconds: float = 60) -> None:
    """Polls; the deadline is for servers that never get there, not for slow ones."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it never came to hold"
        time.sleep(0.02)


def is_idle(http: httpx.Client) -> bool:
    """Whether nothing runs and nothing waits."""
    load = http.get("/ready").json()
    return bool(load["status"] == "ready" and load["running"] == load["waiting"] == 0)
