"""Texts that take long to tokenize are refused or tokenized, and requests of other clients are answered meanwhile.

The gate G15 measures the time for texts of full size. Here the texts are short enough for every test run.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from completion_requests import complete, problem, tokens_of

from oracle.tiny import write_tiny

MAX_TEXT = 2**20


@pytest.fixture(scope="module")
def large(serve: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a server with a SentencePiece model and a large context."""
    path = write_tiny(tmp_path_factory.mktemp("models") / "large.gguf", vocabulary="spm", context=32768)
    with serve(str(path), "--parallel", "1", "--context", "32768", key=None) as server, server.http() as client:
        yield client


@pytest.mark.parametrize("unit", ["<|endoftext|>", "<|endoftext|> a", "<|endoftext|"])
def test_many_special_tokens_are_tokenized_without_blocking_completions(http: httpx.Client, unit: str) -> None:
    count = 300_000 // len(unit)
    with ThreadPoolExecutor() as pool:
        long = pool.submit(tokens_of, http, unit * count)
        assert complete(http, prompt="Once upon a time", max_tokens=2)["usage"]["completion_tokens"] == 2
        assert len(long.result()) >= count
    assert (
        problem(http.post("/tokenize", json={"prompt": unit * (MAX_TEXT // len(unit) + 1)}), 400)["param"] == "prompt"
    )
    assert http.get("/ready").json()["restarts"] == 0


@pytest.mark.parametrize("unit", ["<", "é", "<é ", "</s>"])
def test_a_text_beyond_a_large_context_is_refused(large: httpx.Client, unit: str) -> None:
    text = unit * (700_000 // len(unit.encode()))
    error = problem(large.post("/v1/completions", json={"prompt": text}), 400)
    assert "maximum context length is 32768 tokens" in error["message"]
    assert complete(large, prompt="the", max_tokens=2)["usage"]["prompt_tokens"] == 1
    assert large.get("/ready").json()["restarts"] == 0


@pytest.mark.parametrize("unit", [" ", "\n", "\t ", "▁"])
def test_many_spaces_are_tokenized_or_refused_by_name(large: httpx.Client, unit: str) -> None:
    error = problem(large.post("/tokenize", json={"prompt": unit * 1_300_000}), 400)
    assert f"at most {MAX_TEXT} are tokenized" in error["message"]
    assert len(tokens_of(large, unit * 10_000)) > 10_000
    assert large.get("/ready").json()["restarts"] == 0


def test_the_limit_of_texts_can_be_set(serve: Any) -> None:
    with serve("--limit", "max_text=100", "--parallel", "1", key=None) as server, server.http() as client:
        long = "a" * 101
        assert len(tokens_of(client, "a" * 100)) > 1
        for path in ("/tokenize", "/v1/completions"):
            assert "max_text" in problem(client.post(path, json={"prompt": long}), 400)["message"]
        for name, value in (("suffix", long), ("prediction", {"type": "content", "content": long})):
            error = problem(client.post("/v1/completions", json={"prompt": "a", name: value}), 400)
            assert "max_text" in error["message"]
            assert error["param"] == name
