"""A request for which the model computes logits that are not finite, over HTTP."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import httpx
import pytest

from oracle.architectures import write_random

POISON = 200
"""The id of the token with an embedding of NaN."""


def post(client: httpx.Client, prompt: list[int], **fields: object) -> httpx.Response:
    return client.post("/v1/completions", json={"prompt": prompt, "temperature": 0, "max_tokens": 6, **fields})


@pytest.mark.parametrize("kv_type", ["exact", "f16"])
def test_a_request_whose_numbers_are_not_finite_fails_alone(serve: Any, tmp_path: Path, kv_type: str) -> None:
    path = write_random(tmp_path / "tiny.gguf", "llama", poison={POISON: math.nan})
    good, bad = list(range(5, 40)), [*range(5, 40), POISON, 7, 8]
    with serve(str(path), "--parallel", "2", "--kv-type", kv_type, key=None) as server, server.http() as client:
        expected = post(client, good, logprobs=2).json()["choices"]
        for fields in ({}, {"n": 3}, {"echo": True, "logprobs": 1}, {"max_tokens": 0, "echo": True, "logprobs": 1}):
            answer = post(client, bad, **fields)
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "not_finite")
            assert answer.headers["x-should-retry"] == "false"
            for _ in range(3):
                assert post(client, good, logprobs=2).json()["choices"] == expected
        streamed = post(client, bad, stream=True)
        assert "not_finite" in streamed.text
