"""Scores as lm-evaluation-harness requests them, sample by sample beside an independent forward pass.

The harness sends a context and a continuation in one prompt, as text or token ids and several in one request, with
`echo`, `logprobs` 1 and `max_tokens` 1. It leaves out the last entry, adds up the log probabilities of the
continuation, and takes it for the greedy one if every token is the most likely of its position. Long texts come in
windows. The harness itself runs in tests/clients/test_lm_eval_vllm.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from forward_pass import reference

from oracle.oracle import Oracle

BEGIN = 1
NATS = 1e-3
CONTEXTS = ("The server keeps", "A request that has brought nothing", "Once upon a time there was a", "日本語 and")
CONTINUATIONS = (" every job until it ends", " the", " café 🙂", " a text of some more words than the others have here")
LONG = "The journal has a line for each request, and the text of an answer is written before the next one is sent. " * 6


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Oracle:
    return reference(folder)


def tokenize(http: httpx.Client, text: str) -> list[int]:
    body = {"prompt": text, "add_special_tokens": False}
    found: list[int] = http.post("/tokenize", json=body).json()["tokens"]
    return found


def score(http: httpx.Client, prompts: Sequence[Any]) -> list[dict[str, list[Any]]]:
    """The log probabilities of each prompt as the harness reads them: without those of the generated token."""
    body = {"prompt": prompts, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1, "seed": 1234}
    response = http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    choices = sorted(response.json()["choices"], key=lambda choice: choice["index"])
    return [{name: column[:-1] for name, column in choice["logprobs"].items()} for choice in choices]


def check(found: dict[str, list[Any]], oracle: Oracle, tokens: Sequence[int], known: int, before: int = 0) -> None:
    """Compare the scores of `tokens[known:]`, of which the first `before` tokens are not reported."""
    rows = oracle.log_probs(list(tokens[:-1]))[known - 1 :]
    expected = [float(row[token]) for row, token in zip(rows, tokens[known:], strict=True)]
    logprobs = found["token_logprobs"][known - before :]
    assert logprobs == pytest.approx(expected, abs=NATS)
    assert sum(logprobs) == pytest.approx(sum(expected), abs=NATS)
    for row, token, given, top in zip(
        rows, tokens[known:], logprobs, found["top_logprobs"][known - before :], strict=True
    ):
        assert max(top.values()) == pytest.approx(float(row.max()), abs=NATS)
        if float(row.max() - row[token]) > NATS or int(row.argmax()) == token:
            assert (given == max(top.values())) == (int(row.argmax()) == token)


def pairs(http: httpx.Client) -> list[tuple[list[int], list[int]]]:
    """All contexts with all continuations, and one more whose continuation is the greedy one."""
    found = [(tokenize(http, one), tokenize(http, other)) for one in CONTEXTS for other in CONTINUATIONS]
    body = {"prompt": found[0][0], "max_tokens": 6, "temperature": 0, "return_token_ids": True, "ignore_eos": True}
    found.append((found[0][0], http.post("/v1/completions", json=body).json()["choices"][0]["token_ids"]))
    return found


@pytest.mark.parametrize("size", [1, 5])
def test_choices_as_token_ids_are_scored_like_the_forward_pass(http: httpx.Client, oracle: Oracle, size: int) -> None:
    samples = pairs(http)
    for start in range(0, len(samples), size):
        batch = samples[start : start + size]
        for (context, continuation), found in zip(batch, score(http, [a + b for a, b in batch]), strict=True):
            check(found, oracle, context + continuation, len(context))


def test_a_greedy_continuation_is_seen(http: httpx.Client) -> None:
    context, continuation = pairs(http)[-1]
    (found,) = score(http, [context + continuation])
    given = zip(found["token_logprobs"], found["top_logprobs"], strict=True)
    assert all(logprob == max(top.values()) for logprob, top in list(given)[len(context) :])


def test_choices_as_texts_are_scored_like_the_forward_pass(http: httpx.Client, oracle: Oracle) -> None:
    """The model reads a BOS before texts, which is not reported."""
    texts = [one + other for one in CONTEXTS for other in CONTINUATIONS]
    for text, found in zip(texts, score(http, texts), strict=True):
        tokens = [BEGIN, *tokenize(http, text)]
        assert len(found["token_logprobs"]) == len(tokens) - 1
        check(found, oracle, tokens, 2, before=1)


@pytest.mark.parametrize("window", [32, 2046])
def test_rolling_scores_of_a_long_text_are_those_of_the_forward_pass(
    http: httpx.Client, oracle: Oracle, window: int
) -> None:
    """Windows of `window` tokens, each with as much of the text before it as fits, from BOS on."""
    tokens = [BEGIN, *tokenize(http, LONG)]
    starts = range(1, len(tokens), window)
    parts = [(tokens[max(0, min(at + window, len(tokens)) - window - 1) : at + window], at) for at in starts]
    for (part, at), found in zip(parts, score(http, [part for part, _ in parts]), strict=True):
        known = len(part) - (min(at + window, len(tokens)) - at)
        check(found, oracle, part, known)
