"""`--infill-fallback rerank`: models without infill tokens return the sampled middle that fits the suffix best."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from completion_requests import Json, complete, joined, one, refused, stream, tokens_of

from oracle.tiny import write_tiny

PROMPT, SUFFIX = "Hello and the", " was in a"
SAMPLED = {"max_tokens": 8, "seed": 5, "temperature": 1.2}


@pytest.fixture(scope="module")
def http(serve: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a server with a model without infill tokens."""
    path = write_tiny(tmp_path_factory.mktemp("models") / "plain.gguf", infill=False)
    with serve(str(path), "--infill-fallback", "rerank", "--parallel", "4", key=None) as server:
        client = server.http()
        with client:
            yield client


def ranked(http: httpx.Client, count: int, **body: Any) -> list[Json]:
    """The middles that a request without a suffix samples, in the order of the suffix's probability after each."""
    choices = complete(http, prompt=PROMPT, n=count, return_token_ids=True, **SAMPLED | body)["choices"]
    suffix = tokens_of(http, SUFFIX)

    def score(choice: Json) -> float:
        ids = choice["token_ids"]
        middle = ids if choice["finish_reason"] == "length" else ids[: len(tokens_of(http, choice["text"]))]
        given = tokens_of(http, PROMPT) + middle + suffix
        scores = one(http, prompt=given, max_tokens=0, echo=True, logprobs=0)["logprobs"]["token_logprobs"]
        return float(sum(scores[-len(suffix) :]))

    return sorted(choices, key=score, reverse=True)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_middle_under_which_the_suffix_is_most_likely_is_returned(http: httpx.Client, seed: int) -> None:
    best, *others = ranked(http, 4, seed=seed)
    choice = one(http, prompt=PROMPT, suffix=SUFFIX, return_token_ids=True, **SAMPLED | {"seed": seed})
    assert (choice["text"], choice["token_ids"]) == (best["text"], best["token_ids"])
    assert any(other["text"] != best["text"] for other in others)


def test_several_middles_come_in_their_order(http: httpx.Client) -> None:
    expected = [choice["text"] for choice in ranked(http, 5)][:2]
    body = {"prompt": PROMPT, "suffix": SUFFIX, "n": 2, **SAMPLED}
    whole = complete(http, **body)
    assert [choice["text"] for choice in whole["choices"]] == expected
    assert [choice["text"] for choice in joined(stream(http, **body))] == expected
    assert "token_ids" not in whole["choices"][0]
    more = complete(http, **body | {"n": 1, "best_of": 5})
    assert [choice["text"] for choice in more["choices"]] == expected[:1]


def test_the_usage_has_the_cost(http: httpx.Client) -> None:
    prompt, suffix = (len(tokens_of(http, text)) for text in (PROMPT, SUFFIX))
    usage = complete(http, prompt=PROMPT, suffix=SUFFIX, ignore_eos=True, **SAMPLED)["usage"]
    assert usage["prompt_tokens"] == prompt + 4 * suffix
    assert usage["completion_tokens"] == 4 * SAMPLED["max_tokens"]


def test_what_cannot_be_ranked_is_refused_by_name(http: httpx.Client) -> None:
    assert refused(http, "temperature", prompt="a", suffix="b", temperature=0)["param"] == "temperature"
    assert refused(http, "input_extra", prompt="a", suffix="b", input_extra=[{"text": "c"}])["param"] == "input_extra"
    context = http.get("/v1/models").json()["data"][0]["max_model_len"]
    refused(http, prompt="a", suffix="b" * context, max_tokens=1)


def test_infill_uses_the_same_way(http: httpx.Client) -> None:
    body = {"input_prefix": PROMPT, "input_suffix": SUFFIX, "n_predict": 8, "seed": 5, "temperature": 1.2}
    answer = http.post("/infill", json=body | {"samplers": ["temperature"]}).json()
    assert answer["content"] == ranked(http, 4)[0]["text"]
    warm = http.post("/infill", json=body | {"n_predict": 0})
    assert (warm.status_code, warm.json()["content"]) == (200, "")


def test_the_model_says_so(http: httpx.Client) -> None:
    (model,) = http.get("/v1/models").json()["data"]
    assert (model["infill"], model["infill_family"], model["infill_files"]) == (True, "rerank", False)
