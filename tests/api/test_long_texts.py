"""Texts that a tokenizer takes long for are refused or tokenized, and other clients' requests are answered beside them.

How long it takes at full size is the gate G15's; here the texts are short enough for every run of the tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from completion_requests import complete, problem, tokens_of

from oracle.tiny import write_tiny

MOST = 2**20


@pytest.fixture(scope="module")
def large(serve: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A SentencePiece model with a large context."""
    path = write_tiny(tmp_path_factory.mktemp("models") / "large.gguf", vocabulary="spm", context=32768)
    with serve(str(path), "--parallel", "1", "--context", "32768", key=None) as server, server.http() as client:
        yield client


@pytest.mark.parametrize("unit", ["<|endoftext|>", "<|endoftext|> a", "<|endoftext|"])
def test_special_tokens_in_a_row_are_tokenized_and_hold_no_completion(http: httpx.Client, unit: str) -> None:
    """F1a of the faults that were found."""
    count = 300_000 // len(unit)
    with ThreadPoolExecutor() as pool:
        long = pool.submit(tokens_of, http, unit * count)
        assert complete(http, prompt="Once upon a time", max_tokens=2)["usage"]["completion_tokens"] == 2
        assert len(long.result()) >= count
    assert problem(http.post("/tokenize", json={"prompt": unit * (MOST // len(unit) + 1)}), 400)["param"] == "prompt"
    assert http.get("/ready").json()["restarts"] == 0


@pytest.mark.parametrize("unit", ["<", "é", "<é ", "</s>"])
def test_a_text_beyond_a_large_context_is_refused(large: httpx.Client, unit: str) -> None:
    """F1b of the faults that were found."""
    text = unit * (700_000 // len(unit.encode()))
    error = problem(large.post("/v1/completions", json={"prompt": text}), 400)
    assert "maximum context length is 32768 tokens" in error["message"]
    assert complete(large, prompt="the", max_tokens=2)["usage"]["prompt_tokens"] == 1
    assert large.get("/ready").json()["restarts"] == 0


@pytest.mark.parametrize("unit", [" ", "\n", "\t ", "▁"])
def test_spaces_in_a_row_are_tokenized_or_refused_by_name(large: httpx.Client, unit: str) -> None:
    """F1c of the faults that were found."""
    error = problem(large.post("/tokenize", json={"prompt": unit * 1_300_000}), 400)
    assert f"at most {MOST} are tokenized" in error["message"]
    assert len(tokens_of(large, unit * 10_000)) > 10_000
    assert large.get("/ready").json()["restarts"] == 0


def test_the_limit_of_texts_can_be_set(serve: Any) -> None:
    with serve("--limit", "max_text=100", "--parallel", "1", key=None) as server, server.http() as client:
        assert len(tokens_of(client, "a" * 100)) > 1
        for path in ("/tokenize", "/v1/completions"):
            assert "max_text" in problem(client.post(path, json={"prompt": "a" * 101}), 400)["message"]
        body = {"prompt": "a", "suffix": "b" * 101}
        assert "max_text" in problem(client.post("/v1/completions", json=body), 400)["message"]
