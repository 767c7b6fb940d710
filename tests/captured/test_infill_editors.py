"""Sends the requests of llama.vim and llama.vscode to `/infill`, and reads the responses as they do.

A line of infill.jsonl is a request that was written after the client's source (llama.vim: `autoload/llama.vim`,
llama.vscode: `src/llama-server.ts`) with a text of ours. `reads`: the members of the response that the client reads.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

Json = dict[str, Any]

REQUESTS = [json.loads(line) for line in (Path(__file__).parent / "infill.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module", params=["default", "--strict"])
def served(serve: Any, request: pytest.FixtureRequest) -> Any:
    options = [] if request.param == "default" else [request.param]
    with serve(*options, "--parallel", "4", key=None) as server, server.http() as http:
        yield http, server.model


@pytest.mark.parametrize("seen", REQUESTS, ids=[f"{seen['client']}: {seen['request']}" for seen in REQUESTS])
def test_an_editor_gets_the_response_that_it_reads(served: tuple[httpx.Client, str], seen: Json) -> None:
    http, model = served
    body = seen["body"] | ({"model": model} if seen["body"].get("model") == "tiny" else {})
    answer = http.post("/infill", json=body, headers={"authorization": "Bearer x"})
    assert answer.status_code == 200, answer.text
    count = body.get("n_cmpl", 1)
    found = answer.json() if count > 1 else [answer.json()]
    assert len(found) == count
    for middle in found:
        for path in seen["reads"]:
            value = at(middle, path, whole="response_fields" in body)
            assert isinstance(value, str if path == "content" else int | float), path
        if seen["reads"]:
            check_text(middle["content"], body)
            assert re.match(r'\s*[{\[].*"content"\s*:"', answer.text, re.DOTALL)  # llama.vim ignores other responses
        else:
            assert middle == {}


@pytest.mark.parametrize(
    "seen",
    [seen for seen in REQUESTS if seen["body"].get("n_cmpl", 1) == 1],
    ids=lambda seen: f"{seen['client']}: {seen['request']}",
)
def test_the_same_request_can_be_streamed(served: tuple[httpx.Client, str], seen: Json) -> None:
    http, model = served
    body = {name: value for name, value in seen["body"].items() if name not in ("model", "response_fields")}
    # with a seed and without limits of time, so that both responses have the same tokens
    body = {name: value for name, value in body.items() if not name.startswith("t_max")} | {"seed": 1}
    whole = http.post("/infill", json=body | {"model": model, "stream": False}).json()
    answer = http.post("/infill", json=body | {"model": model, "stream": True})
    assert answer.status_code == 200, answer.text
    events = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n") if line.startswith("data: {")]
    assert "".join(event["content"] for event in events) == whole["content"]
    assert [event["stop"] for event in events] == [False] * (len(events) - 1) + [True]


def at(middle: Json, path: str, whole: bool) -> Any:
    """The member at a path. `whole`: the path is the name of the member."""
    if whole:
        return middle[path]
    value: Any = middle
    for name in path.split("/"):
        value = value[name]
    return value


def check_text(text: str, body: Json) -> None:
    """Check that the text ends where the request says, and that a request without tokens gets none."""
    assert all(stop not in text for stop in body.get("stop", ()))
    indent = body.get("n_indent", 0)
    assert all(re.match(r"[ \t]*", line).end() >= indent for line in text.split("\n")[1:-1])  # type: ignore[union-attr]
    if not body["n_predict"]:
        assert not text
