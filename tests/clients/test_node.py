"""OpenAI's library for Node against the server."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

NODE = shutil.which("node")
if NODE is None or subprocess.run([NODE, "-e", "require('openai')"], capture_output=True, check=False).returncode:
    pytest.skip("openai for Node is not installed: make clients", allow_module_level=True)

SCRIPT = Path(__file__).parent / "node" / "ask.cjs"
ASKED = {"model": "afterword-tiny", "prompt": "Once upon a time", "max_tokens": 12, "temperature": 0, "seed": 7}

Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def ask(server: Any) -> Ask:
    def ask(leave: int = 0, **fields: Any) -> dict[str, Any]:
        order = {"baseURL": f"{server.url}/v1", "apiKey": server.key, "fields": ASKED | fields, "leave": leave}
        command = [str(NODE), str(SCRIPT)]
        done = subprocess.run(command, input=json.dumps(order), capture_output=True, text=True, check=True, timeout=60)
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    return ask


@pytest.fixture
def plain(http: httpx.Client) -> Ask:
    def ask(**fields: Any) -> dict[str, Any]:
        answer: dict[str, Any] = http.post("/v1/completions", json=ASKED | fields).raise_for_status().json()
        return answer

    return ask


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"logprobs": 2, "echo": True}, id="logprobs"),
        pytest.param({"prompt": ["The cat", "A dog"], "n": 2, "best_of": 3, "temperature": 0.9}, id="many"),
        pytest.param({"suffix": " They went home.", "stop": ["\n\n"]}, id="suffix"),
    ],
)
def test_whole_answers(ask: Ask, plain: Ask, fields: dict[str, Any]) -> None:
    theirs, ours = ask(**fields), plain(**fields)
    assert (theirs["choices"], theirs["usage"]) == (ours["choices"], ours["usage"])


def test_streams(ask: Ask, plain: Ask) -> None:
    chunks, whole = ask(stream=True, stream_options={"include_usage": True})["chunks"], plain()
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == whole["choices"][0]["text"]
    assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], whole["usage"])


def test_a_stream_may_be_left(ask: Ask, plain: Ask) -> None:
    assert len(ask(stream=True, max_tokens=500, leave=2)["chunks"]) == 2
    assert plain()["choices"]


def test_errors(ask: Ask) -> None:
    error = ask(temperature=3)
    assert error.pop("requestID")
    assert error == {
        "name": "BadRequestError",
        "status": 400,
        "code": "decimal_above_max_value",
        "param": "temperature",
        "type": "invalid_request_error",
    }
