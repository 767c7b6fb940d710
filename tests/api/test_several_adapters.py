"""Adapters over HTTP: models of their own names over the same weights, which share nothing that was computed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from completion_requests import Json, complete

from oracle.adapters import random_pairs, write_adapter
from oracle.architectures import write_random

PROMPT = [5 + i * i % 190 for i in range(200)]


@pytest.fixture(scope="module")
def http(serve: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a server with a model and three adapters, of which two differ in their scale only."""
    folder = tmp_path_factory.mktemp("adapters")
    base = write_random(folder / "base.gguf", "llama", "Q8_0")
    one, two = (write_adapter(folder / f"{i}.gguf", random_pairs(base, 8, seed=i)) for i in (1, 2))
    words = ("--lora", f"one={one}", "--lora", f"half={one}@0.5", "--lora", f"two={two}", "--parallel", "2")
    with serve(str(base), "--cache-dir", str(folder / "cache"), *words, key=None) as server, server.http() as http:
        yield http


def complete_with(http: httpx.Client, model: str) -> Json:
    return complete(http, model=model, prompt=PROMPT, temperature=0, max_tokens=8, logprobs=0, prompt_logprobs=0)


def test_a_prompt_of_several_adapters_shares_nothing(http: httpx.Client) -> None:
    names = ("base", "one", "half", "two")
    first = {name: complete_with(http, name) for name in names}
    cached = [each["usage"]["prompt_tokens_details"]["cached_tokens"] for each in first.values()]
    assert cached == [0] * 4
    assert len({str(each["choices"][0]["prompt_logprobs"]) for each in first.values()}) == 4
    assert len({each["system_fingerprint"] for each in first.values()}) == 4
    for name in names:
        again = complete_with(http, name)
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 190
        assert again["choices"] == first[name]["choices"]


def test_models_with_an_adapter_name_their_base(http: httpx.Client) -> None:
    listed = {each["id"]: each for each in http.get("/v1/models").json()["data"]}
    assert {name: each["parent"] for name, each in listed.items()} == {
        **{"base": None, "one": "base"},
        **{"half": "base", "two": "base"},
    }
    assert {each["reproducible"] for each in listed.values()} == {"exact"}
