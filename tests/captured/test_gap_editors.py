"""Sends the requests with which editors ask for the text at the cursor to `/v1/completions`, streamed and not.

A line of gap_editors.jsonl is a request that was written after the client's source with a text of ours: most have a
`suffix`, two have a prompt that the client's template has made. The model is tiny: it has Qwen's infill tokens, and
after the token for the middle it generates one known answer. So the answer is right only if the layout is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from captured.test_next_edits import LINE, QWEN, read_lines, write_answering_model

Json = dict[str, Any]

REQUESTS = [json.loads(line) for line in (Path(__file__).parent / "gap_editors.jsonl").read_text("utf-8").splitlines()]
PREFIX, SUFFIX = "def total(prices):\n", "\n\nprint(total([1, 2]))\n"


@pytest.fixture(scope="module", params=["default", "--strict"])
def served(serve: Any, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    path = tmp_path_factory.mktemp("gaps") / "coder.gguf"
    write_answering_model(path, QWEN, "<|endoftext|>", ("<|fim_middle|>", *LINE))
    options = [] if request.param == "default" else [request.param]
    with serve(str(path), "--alias", "coder", "--parallel", "2", *options, key=None) as server, server.http() as client:
        yield client, request.param


def body_of(seen: Json, mode: str) -> Json:
    """The request. Without `model`, which twinny does not send, a strict server refuses it."""
    return seen["body"] | ({"model": "coder"} if mode == "--strict" else {})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("seen", REQUESTS, ids=[seen["client"] for seen in REQUESTS])
def test_an_editor_gets_the_middle(served: tuple[httpx.Client, str], seen: Json, stream: bool) -> None:
    http, mode = served
    answer = http.post("/v1/completions", json=body_of(seen, mode) | {"stream": stream, "temperature": 0})
    assert answer.status_code == 200, answer.text
    if stream:
        assert "".join(read_lines(answer.text.split("\n"), seen["body"].get("stop", []))) == "".join(LINE)
        return
    (choice,) = answer.json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("".join(LINE), "stop")


def test_the_suffix_is_not_repeated(served: tuple[httpx.Client, str]) -> None:
    """Also not with `echo`: the text is the prompt and the middle."""
    http, _ = served
    body = {"model": "coder", "prompt": PREFIX, "suffix": SUFFIX, "temperature": 0, "max_tokens": 64, "echo": True}
    (choice,) = http.post("/v1/completions", json=body).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == (PREFIX + "".join(LINE), "stop")


@pytest.mark.parametrize("seen", REQUESTS, ids=[seen["client"] for seen in REQUESTS])
def test_the_request_as_it_is_sent_is_answered(served: tuple[httpx.Client, str], seen: Json) -> None:
    http, mode = served
    body = body_of(seen, mode)
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream" if body.get("stream") else "application/json")


@pytest.mark.parametrize("seen", REQUESTS, ids=[seen["client"] for seen in REQUESTS])
def test_the_prompt_has_the_tokens_of_the_families_layout(served: tuple[httpx.Client, str], seen: Json) -> None:
    http, mode = served

    def ids(text: str) -> list[int]:
        tokens: list[int] = http.post("/tokenize", json={"model": "coder", "prompt": text}).json()["tokens"]
        return tokens

    begin, gap, middle = (ids(name)[-1] for name in QWEN[:3])
    asked = body_of(seen, mode) | {"stream": False, "return_token_ids": True}
    if mode == "--strict":
        pytest.skip("`return_token_ids` is an extension")
    (choice,) = http.post("/v1/completions", json=asked).json()["choices"]
    assert choice["prompt_token_ids"] == [begin, *ids(PREFIX), gap, *ids(SUFFIX), middle]
