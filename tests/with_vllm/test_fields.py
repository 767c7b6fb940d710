"""Tests of the request fields over vLLM: each changes the result as documented, or is refused by its name."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np
import pytest
from forward_pass import reference

from afterword.engine.core.numpy_kernel import adjusted_row
from afterword.engine.core.sampler_kernel import SampleQuery
from afterword.engine.core.token_counts import TokenCounts
from afterword.engine.protocol import Sampling
from oracle.oracle import Array

END, BEGIN, VOCABULARY = 0, 1, 1000
STORY = "The server keeps every job until it ends, so that"


def ask(http: httpx.Client, **body: Any) -> dict[str, Any]:
    response = http.post("/v1/completions", json={"prompt": STORY, "max_tokens": 8} | body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def ids(http: httpx.Client, **body: Any) -> list[list[int]]:
    """The generated token ids of all choices."""
    return [choice["token_ids"] for choice in ask(http, return_token_ids=True, **body)["choices"]]


def refused(http: httpx.Client, **body: Any) -> dict[str, Any]:
    response = http.post("/v1/completions", json={"prompt": STORY, "max_tokens": 8} | body)
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


def tokenize(http: httpx.Client, text: str, **body: Any) -> list[int]:
    found: list[int] = http.post("/tokenize", json={"prompt": text, **body}).json()["tokens"]
    return found


# ---- log probabilities


def test_log_probabilities_are_those_of_an_independent_forward_pass(http, folder):
    oracle = reference(folder)
    prompt = [BEGIN, *tokenize(http, STORY, add_special_tokens=False)]
    answer = ask(http, prompt=prompt, prompt_logprobs=5, logprobs=5, max_tokens=4, return_token_ids=True, seed=1)
    (choice,) = answer["choices"]
    rows = oracle.log_probs([*prompt, *choice["token_ids"]])
    for position, entries in enumerate(choice["prompt_logprobs"][1:], 1):
        row = rows[position - 1]
        for token, entry in entries.items():
            assert entry["logprob"] == pytest.approx(row[int(token)], abs=1e-3)
            assert entry["rank"] == 1 + int((row > row[int(token)]).sum())
        assert set(map(int, entries)) >= set(np.argsort(-row)[:5].tolist())
    found = choice["logprobs"]["token_logprobs"]
    expected = [rows[len(prompt) - 1 + i][token] for i, token in enumerate(choice["token_ids"])]
    assert found == pytest.approx(expected, abs=1e-3)


def test_log_probabilities_are_those_before_bias_and_temperature(http):
    plain = ask(http, logprobs=0, max_tokens=1, temperature=0)
    (token,) = ids(http, max_tokens=1, temperature=0)[0]
    other = 500 if token != 500 else 501
    forced = ask(http, logprobs=1, max_tokens=1, temperature=2, logit_bias={str(other): 100})["choices"][0]["logprobs"]
    best = plain["choices"][0]["logprobs"]["token_logprobs"][0]
    assert forced["token_logprobs"][0] < best
    assert max(forced["top_logprobs"][0].values()) == pytest.approx(best, abs=1e-4)


def test_scoring_generates_nothing(http):
    answer = ask(http, max_tokens=0, echo=True, logprobs=2)
    (choice,) = answer["choices"]
    assert choice["text"] == STORY
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0
    assert len(choice["logprobs"]["tokens"]) == len(tokenize(http, STORY, add_special_tokens=False))


# ---- sampling


def full_rows(http: httpx.Client, **body: Any) -> tuple[list[int], list[dict[int, float]]]:
    """Greedy tokens, and for each the log probabilities of all tokens, from a second request that is forced to them."""
    (tokens,) = ids(http, **body)
    prompt = [BEGIN, *tokenize(http, STORY, add_special_tokens=False)]
    scored = ask(http, prompt=prompt + tokens, max_tokens=1, prompt_logprobs=1000)["choices"][0]["prompt_logprobs"]
    rows = [{int(token): entry["logprob"] for token, entry in row.items()} for row in scored[len(prompt) :]]
    return tokens, rows


def test_bias_and_penalties_choose_the_tokens_that_afterwords_sampler_chooses(http):
    """600 greedy tokens under random biases and penalties are the best ones of Afterword's own edits."""
    draw = random.Random(5)
    compared = different = 0
    for _ in range(20):
        bias = {str(draw.randrange(VOCABULARY)): draw.uniform(-6, 6) for _ in range(8)}
        sampling = Sampling(
            presence_penalty=draw.choice([0.0, draw.uniform(-2, 2)]),
            frequency_penalty=draw.uniform(-2, 2),
            logit_bias=tuple((int(token), value) for token, value in bias.items()),
        )
        body = {"logit_bias": bias, "temperature": 0, "max_tokens": 30, "ignore_eos": True}
        body |= {name: getattr(sampling, name) for name in ("presence_penalty", "frequency_penalty")}
        tokens, rows = full_rows(http, **body)
        counts = TokenCounts()
        for token, row in zip(tokens, rows, strict=True):
            array = np.array([row[each] for each in range(VOCABULARY)], np.float32)
            query = SampleQuery(sampling, seeds=(0,), generated=counts)
            different += token != int(np.argmax(adjusted_row(array, query)))
            compared += 1
            counts.add(token)
    assert (compared, different) == (600, 0)


@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.2}, {"top_k": 8, "top_p": 0.7}])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_filters_keep_the_same_tokens(http, filters, temperature):
    """All tokens that are drawn are in the set that the filters keep, and the likeliest ones of it are drawn."""
    for prompt in (STORY, "# Changelog", "a b c", "test", "0"):
        row = ask(http, prompt=prompt, max_tokens=1, logprobs=1000, return_token_ids=True)["choices"][0]
        ranked = ask(http, prompt=prompt, max_tokens=1, logprobs=1, temperature=0)["choices"][0]
        assert ranked["logprobs"] is not None
        first = row["token_ids"][0]
        prompt_ids = [BEGIN, *tokenize(http, prompt, add_special_tokens=False), first]
        scored = ask(http, prompt=prompt_ids, max_tokens=1, prompt_logprobs=1000)["choices"][0]["prompt_logprobs"][-1]
        logprobs = np.array([scored[str(token)]["logprob"] for token in range(VOCABULARY)])
        kept = kept_tokens(logprobs / temperature, **filters)
        drawn = {
            tokens[0]
            for tokens in ids(http, prompt=prompt, n=40, max_tokens=1, temperature=temperature, seed=3, **filters)
        }
        assert drawn <= set(kept)
        assert len(drawn) > 1 or len(kept) == 1 or probability(logprobs / temperature, kept) > 0.8


def kept_tokens(logits: Array, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> list[int]:
    """The tokens that the filters keep, most likely first, with a little room at the border for rounding."""
    weights = np.exp(logits - logits.max())
    order = [int(token) for token in np.argsort(-weights, kind="stable") if weights[token] >= min_p * (1 - 1e-4)]
    order = order[: top_k or len(order)]
    shares = np.cumsum(weights[order]) / weights[order].sum()
    return order[: int(np.searchsorted(shares, top_p + 1e-5)) + 1]


def probability(logits: Array, kept: Sequence[int]) -> float:
    """The probability of the most likely of the tokens that are kept."""
    weights = np.exp(logits - logits.max())
    return float(1 / weights[list(kept)].sum())


def test_greedy_choices_are_equal_and_top_p_0_is_greedy(http):
    (greedy,) = ids(http, temperature=0)
    assert ids(http, temperature=0, n=3) == [greedy] * 3
    assert ids(http, top_p=0) == [greedy]
    assert ids(http, temperature=1, top_k=1) == [greedy]


def test_a_seed_gives_the_same_texts_and_each_choice_has_its_own(http):
    first = ids(http, n=4, seed=11, max_tokens=12)
    assert ids(http, n=4, seed=11, max_tokens=12) == first
    assert len({tuple(each) for each in first}) == 4
    assert ids(http, seed=12, max_tokens=12) != first[:1]
    assert ids(http, seed=-(2**63), max_tokens=2)
    assert ids(http, seed=2**63 - 1, max_tokens=2)


def test_temperatures_that_vllm_would_change_are_refused(http):
    error = refused(http, temperature=0.001)
    assert (error["param"], error["type"]) == ("temperature", "invalid_request_error")
    assert ids(http, temperature=0.01)


# ---- ends


def test_an_end_token_stops_and_ignore_eos_does_not(http):
    force = {"logit_bias": {str(END): 100}}
    stopped = ask(http, **force)
    assert stopped["choices"][0]["finish_reason"] == "stop"
    assert ids(http, ignore_eos=True, **force) == [[END] * 8]


def test_stop_token_ids_stop_also_with_ignore_eos(http):
    force = {"logit_bias": {"300": 100}}
    answer = ask(http, stop_token_ids=[300], ignore_eos=True, return_token_ids=True, **force)
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert ids(http, **force) == [[300] * 8]


def test_min_tokens_bans_the_end_tokens_of_the_request_only(http):
    force = {"logit_bias": {str(END): 100}}
    (tokens,) = ids(http, min_tokens=4, **force)
    assert END not in tokens[:4]
    assert tokens[4] == END
    assert ids(http, min_tokens=4, ignore_eos=True, **force) == [[END] * 8], "with ignore_eos EOS is an ordinary token"


def test_stop_strings_end_a_choice_and_its_computation(http):
    text = ask(http, temperature=0, max_tokens=20)["choices"][0]["text"]
    stop = text[len(text) // 2 :][:3]
    answer = ask(http, temperature=0, max_tokens=2000, stop=stop, n=2)
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"stop"}
    assert all(choice["text"] == text[: text.index(stop)] for choice in answer["choices"])
    assert answer["usage"]["completion_tokens"] < 200


def test_best_of_and_streams(http):
    whole = ask(http, temperature=0, n=2, logprobs=1)
    body = {"prompt": STORY, "max_tokens": 8, "temperature": 0, "n": 2, "logprobs": 1, "stream": True}
    texts = ["", ""]
    with http.stream("POST", "/v1/completions", json=body) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    for line in lines:
        for choice in json.loads(line)["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert len(ask(http, best_of=3, n=1, seed=1)["choices"]) == 1


def test_whole_responses_have_the_tokens_of_streams_although_they_come_together(http):
    """Also where the number of tokens is no multiple of those that are reported together."""
    for count in (1, 2, 16, 17, 18, 50):
        body = {"max_tokens": count, "seed": 4, "n": 2, "logprobs": 2, "ignore_eos": True}
        whole = whole_as_streamed(http, **body)
        assert [len(choice["logprobs"]["tokens"]) for choice in whole] == [count, count]
        assert {choice["finish_reason"] for choice in whole} == {"length"}


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({"logit_bias": {str(END): 100}, "min_tokens": 20}, 21),  # the end token is the fourth of its output
        ({"logit_bias": {str(END): 100}, "min_tokens": 16}, 17),  # and here the last
        ({"logit_bias": {"300": 100}, "stop_token_ids": [300], "min_tokens": 20}, 21),
        ({"logit_bias": {"300": 100}, "stop_token_ids": [300], "ignore_eos": True}, 1),
    ],
)
def test_whole_responses_end_at_the_end_token_of_streams(
    http: httpx.Client, fields: dict[str, Any], count: int
) -> None:
    """The end token has no text. It is the last of the reported ids, with nothing after it."""
    whole = whole_as_streamed(http, max_tokens=50, seed=4, n=2, logprobs=2, return_token_ids=True, **fields)
    end = END if str(END) in fields["logit_bias"] else 300
    assert {choice["finish_reason"] for choice in whole} == {"stop"}
    for choice in whole:
        assert (len(choice["token_ids"]), choice["token_ids"].index(end)) == (count, count - 1)


def whole_as_streamed(http: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    """The choices of a whole response. Those of the same request as a stream have the same texts, numbers and ends."""
    whole: list[dict[str, Any]] = ask(http, **body)["choices"]
    texts, columns, ends = ["" for _ in whole], [[] for _ in whole], [None for _ in whole]  # type: ignore[var-annotated]
    request = {"prompt": STORY, **body, "stream": True}
    with http.stream("POST", "/v1/completions", json=request) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    index = choice["index"]
                    texts[index] += choice["text"]
                    columns[index] += (choice["logprobs"] or {}).get("token_logprobs", [])
                    ends[index] = choice["finish_reason"] or ends[index]
    assert [(each["text"], each["finish_reason"]) for each in whole] == list(zip(texts, ends, strict=True))
    for choice, column in zip(whole, columns, strict=True):
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(column, abs=1e-3)
    return whole


# ---- prompts


def test_an_empty_prompt_is_the_start_of_a_document(http):
    assert ids(http, prompt="", temperature=0) == ids(http, prompt=[BEGIN], temperature=0)


def test_a_prompt_that_does_not_fit_is_refused(http):
    context = http.get("/v1/models").json()["data"][0]["max_model_len"]
    assert context == 2047, "one position is kept for the token that vLLM always generates"
    fits = ask(http, prompt=[BEGIN] * context, max_tokens=0, echo=True, logprobs=0)
    assert fits["usage"]["prompt_tokens"] == context
    assert "maximum context length is 2047" in refused(http, prompt=[BEGIN] * 2000, max_tokens=48)["message"]


def test_token_ids_outside_the_vocabulary_are_refused(http):
    assert "Invalid token" in refused(http, prompt=[VOCABULARY])["message"]
    assert refused(http, logit_bias={str(VOCABULARY): 1})["param"] == "logit_bias"
    assert ask(http, prompt=[VOCABULARY - 1], max_tokens=1), "an id without text is still a token"


def test_the_prefix_cache_is_shared_within_a_salt_only(http):
    prompt = "A prefix of many words that no other test has, " * 12
    read = [
        ask(http, prompt=prompt, max_tokens=1, **salt)["usage"]["prompt_tokens_details"]["cached_tokens"]
        for salt in ({}, {}, {"cache_salt": "s"}, {"cache_salt": "s"})
    ]
    assert read[0] == read[2] == 0
    assert read[1] == read[3] > 0


def test_the_prompt_of_several_choices_is_computed_once(http):
    """The first sample goes first, so the others find the prompt in vLLM's cache; it counts once."""
    prompt = "Another prefix of many words that no other test has, " * 12
    answer = ask(http, prompt=prompt, max_tokens=2, n=4)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert answer["usage"]["completion_tokens"] == 8


# ---- tokens


TEXTS = ("Once upon a time", " two  spaces\n\ttab", "naïve café — 日本語 🙂", "<|endoftext|>", "", "\x00\x7f")


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_spell_the_text(http, text):
    found = tokenize(http, text, add_special_tokens=False)
    assert http.post("/detokenize", json={"tokens": found}).json()["prompt"] == text


def test_special_tokens_in_a_text_are_tokens(http):
    assert tokenize(http, "<|endoftext|>", add_special_tokens=False) == [END]
    assert tokenize(http, "a")[0] == BEGIN


def test_infill_uses_the_models_tokens(http):
    (model,) = http.get("/v1/models").json()["data"]
    assert model["infill"] is True
    answer = ask(http, prompt="def add(a, b):", suffix="return c", max_tokens=4)
    assert answer["usage"]["completion_tokens"] <= 4


# ---- load


def test_a_client_that_leaves_stops_the_computation(http):
    body = {"prompt": STORY, "max_tokens": 1900, "ignore_eos": True, "stream": True, "n": 4}
    with http.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())
    deadline = time.monotonic() + 60
    while running(http):
        assert time.monotonic() < deadline, "vLLM goes on"
        time.sleep(0.05)


def running(http: httpx.Client) -> float:
    lines = http.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("afterword:num_requests_running"))


def test_more_samples_than_sequences_are_answered(http):
    answer = ask(http, n=20, max_tokens=4, ignore_eos=True)
    assert [choice["index"] for choice in answer["choices"]] == list(range(20))
    assert answer["usage"]["completion_tokens"] == 80


def test_the_model_states_no_promise(http):
    (model,) = http.get("/v1/models").json()["data"]
    assert model["reproducible"] == "none"
    assert model["system_fingerprint"].startswith("fp_")
    assert math.isfinite(model["created"])
