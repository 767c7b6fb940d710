"""Afterword in front of vLLM's own server: the conformance cases, and the same answers as vLLM as child."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from guarded import guarded
from model_with_bos import check_case
from vllm_server import FLAGS, PYTHON

sys.path.append(str(Path(__file__).parents[1] / "conformance"))

from cases import CASES
from extensions import EXTENSIONS, NOT_WITH_VLLM, Extension, check_extension
from probe import Probe
from verdict import Case

SECONDS = 240  # for vLLM's server to start on a slow machine
KEY = "upstream-key"
NOT_WITH_UPSTREAM = NOT_WITH_VLLM | {"cache_salt"}
"""The route for token ids does not report cached tokens. `test_wire.py` tests which salt is sent."""
STORY = "The server keeps every job until it ends, so that"


@contextmanager
def vllm_server(folder: Path) -> Iterator[str]:
    """The address of vLLM's server, which needs a key and reports the whole vocabulary.

    The program `vllm` of the build for CPUs does not start, because it looks for a package of the name vllm.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [PYTHON, "-m", "vllm.entrypoints.launchers.api_server.entry", f"--model={folder}", *FLAGS]
    command += ["--host=127.0.0.1", f"--port={port}", "--enable-scale-out", f"--api-key={KEY}", "--max-logprobs=-1"]
    command += ["--max-num-seqs=8"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    with (
        tempfile.TemporaryFile("w+") as log,
        guarded(command, stdout=log, stderr=log, env=environment) as process,
    ):
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}"


def wait_for(url: str, process: subprocess.Popen[bytes], log: Any) -> None:
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            if httpx.get(url, trust_env=False, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        if process.poll() is not None or time.monotonic() > deadline:
            log.seek(0)
            pytest.fail(f"vLLM's server did not start: {log.read()[-3000:]}")
        time.sleep(0.2)


@pytest.fixture(scope="module")
def upstream(folder: Path) -> Iterator[str]:
    with vllm_server(folder) as url:
        yield url


@pytest.fixture(scope="module")
def http_arguments(folder: Path, upstream: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The arguments of `afterword serve`."""
    key = tmp_path_factory.mktemp("key") / "key"
    key.write_text(KEY)
    return (str(folder), "--engine", "http", "--upstream", upstream, "--upstream-key-file", str(key), "--parallel", "8")


@pytest.fixture(scope="module")
def front(serve: Any, http_arguments: tuple[str, ...]) -> Iterator[httpx.Client]:
    """A client of Afterword in front of vLLM's server."""
    with serve(*http_arguments, "--max-logprobs", "1000") as server:
        headers = {"Authorization": f"Bearer {server.key}"}
        with httpx.Client(base_url=server.url, headers=headers, timeout=300, trust_env=False) as client:
            yield client


@pytest.fixture(scope="module")
def api(serve: Any, http_arguments: tuple[str, ...]) -> Iterator[Probe]:
    with (
        serve(*http_arguments, "--strict") as server,
        Probe(f"{server.url}/v1", server.key, server.model) as probe,
    ):
        yield probe


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.number:02} {case.rule}")
def test_case(case: Case, api: Probe) -> None:
    check_case(case, api)


@pytest.fixture(scope="module")
def extended(serve: Any, http_arguments: tuple[str, ...]) -> Iterator[Probe]:
    with (
        serve(*http_arguments, "--max-logprobs", "1000") as server,
        Probe(f"{server.url}/v1", server.key, server.model) as probe,
    ):
        yield probe


@pytest.mark.parametrize("case", EXTENSIONS, ids=lambda case: case.field)
def test_a_field_has_its_meaning_or_is_refused_by_name(case: Extension, extended: Probe) -> None:
    check_extension(case, extended, NOT_WITH_UPSTREAM)


SAME: list[dict[str, Any]] = [
    {"temperature": 0, "max_tokens": 40, "logprobs": 3},
    {"seed": 5, "n": 3, "max_tokens": 20, "logprobs": 0},
    {"seed": 6, "temperature": 0.7, "top_p": 0.9, "top_k": 30, "min_p": 0.02, "max_tokens": 30},
    {"temperature": 0, "presence_penalty": 1.5, "frequency_penalty": -0.5, "repetition_penalty": 1.2, "max_tokens": 30},
    {"temperature": 0, "logit_bias": {"300": 5, "301": -5}, "max_tokens": 20},
    {"temperature": 0, "min_tokens": 4, "logit_bias": {"0": 100}, "max_tokens": 8},
    {"temperature": 0, "ignore_eos": True, "stop_token_ids": [300], "logit_bias": {"300": 100}, "max_tokens": 8},
    {"max_tokens": 0, "echo": True, "logprobs": 5},
    {"temperature": 0, "prompt_logprobs": 3, "logprobs": 1000, "max_tokens": 2},
    {"temperature": 0, "best_of": 3, "n": 2, "seed": 1, "max_tokens": 5},
    {"seed": 9, "suffix": " is over", "max_tokens": 10},
]


@pytest.mark.parametrize("fields", SAME, ids=" ".join)
def test_answers_are_those_of_vllm_as_child(front: httpx.Client, http: httpx.Client, fields: dict[str, Any]) -> None:
    """The texts of both are the same, and their numbers to the rounding of other batches."""
    body = {"prompt": STORY, "return_token_ids": True, **fields}
    behind, child = (client.post("/v1/completions", json=body).json()["choices"] for client in (front, http))
    assert [choice["token_ids"] for choice in behind] == [choice["token_ids"] for choice in child]
    for ours, theirs in zip(behind, child, strict=True):
        assert ours["finish_reason"] == theirs["finish_reason"]
        assert rows(ours) == pytest.approx(rows(theirs), abs=1e-3)


def rows(choice: dict[str, Any]) -> list[float]:
    """All log probabilities and ranks of a choice."""
    found = [value for value in (choice["logprobs"] or {}).get("token_logprobs", []) if value is not None]
    for row in (choice["logprobs"] or {}).get("top_logprobs") or []:
        found += sorted((row or {}).values())
    for entries in choice.get("prompt_logprobs") or []:
        for entry in (entries or {}).values():
            found += [entry["logprob"], entry["rank"]]
    return found


def test_min_tokens_with_ignore_eos_is_refused(front: httpx.Client) -> None:
    """vLLM bans EOS for the first tokens although it does not end the text."""
    response = front.post("/v1/completions", json={"prompt": STORY, "min_tokens": 2, "ignore_eos": True})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "min_tokens")
