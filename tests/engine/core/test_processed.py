"""Processed log probabilities: those of the distribution that a token is drawn from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from afterword.engine.core import numpy_kernel
from afterword.engine.core.numpy_kernel import NumpyKernel, adjusted_row, processed_row, top_ids
from afterword.engine.core.sampler import Sampler, SampleTokens, ScoreQuery, make_kernel
from afterword.engine.core.sampler_kernel import SampleQuery, cached_distinct
from afterword.engine.core.token_counts import TokenCounts
from afterword.engine.protocol import Job, Sampling
from afterword.engine.token_row import ReportedAt

SIZE = 40
CASES = [
    Sampling(temperature=0.7),
    Sampling(temperature=1.3, top_p=0.6),
    Sampling(temperature=0.9, top_k=7),
    Sampling(temperature=0.9, top_k=7, top_p=0.5),
    Sampling(min_p=0.2),
    Sampling(temperature=0.8, min_p=0.05, top_p=0.8, logit_bias=((3, 4.0), (9, -100.0))),
    Sampling(temperature=0.0, top_p=0.1, presence_penalty=1.5, repetition_penalty=1.2),
]


def logits() -> Any:
    return np.random.default_rng(3).normal(0, 2, SIZE).astype(np.float32)


def reference(row: Any, sampling: Sampling, generated: list[int], prompt: tuple[int, ...]) -> dict[int, float]:
    """Log probabilities in float64 of the tokens that can be drawn."""
    values = {token: float(value) for token, value in enumerate(row)}
    for token, bias in sampling.logit_bias:
        values[token] += bias
    for token in {*generated, *prompt} if sampling.repetition_penalty != 1 else ():
        value = values[token]
        values[token] = value / sampling.repetition_penalty if value > 0 else value * sampling.repetition_penalty
    for token in set(generated):
        values[token] -= sampling.presence_penalty + sampling.frequency_penalty * generated.count(token)
    order = sorted(values, key=lambda token: (-values[token], token))
    if sampling.temperature:
        values = {token: value / sampling.temperature for token, value in values.items()}
        weights = {token: np.exp(values[token] - values[order[0]]) for token in order}
        order = [token for token in order if weights[token] >= sampling.min_p]
        order = order[: sampling.top_k or None]
        total, passed, kept = sum(weights[token] for token in order), 0.0, []
        for token in order:
            kept.append(token)
            passed += weights[token]
            if passed >= sampling.top_p * total:
                break
        order = kept
    total = np.log(sum(np.exp(values[token]) for token in order))
    return {token: values[token] - total for token in order}


@pytest.mark.parametrize("sampling", CASES, ids=str)
@pytest.mark.parametrize("kernel", [make_kernel(), NumpyKernel()], ids=lambda each: type(each).__name__)
def test_processed_numbers_are_those_of_the_distribution(kernel: Any, sampling: Sampling) -> None:
    row, prompt = logits(), (1, 2, 3)
    counts = TokenCounts()
    for token in (5, 5, 6):
        counts.add(token)
    job = Job(prompt, 3, 8, sampling, (), bytes(16), alternatives=SIZE, processed=True)
    raw = Job(prompt, 3, 8, sampling, (), bytes(16), alternatives=SIZE)
    found, plain = (
        Sampler(kernel).read(row[None], [SampleTokens(each, [0, 1, 2], 3, counts)])[0] for each in (job, raw)
    )
    assert [token.id for token in found] == [token.id for token in plain], "the mode draws no other tokens"
    wanted = reference(row, sampling, [5, 5, 6], prompt)
    for token in found:
        assert token.logprob == pytest.approx(wanted[token.id], abs=1e-4)
        assert token.logprob == dict(token.top)[token.id]
        assert {other for other, value in token.top if value > -np.inf} == set(wanted)
        for other, value in token.top:
            assert value == pytest.approx(wanted.get(other, -np.inf), abs=1e-4)


def test_only_the_rows_of_such_jobs_are_processed() -> None:
    rows = np.stack([logits()] * 3)
    sampling = Sampling(temperature=0.5)
    processed = Job((1,), 1, 8, sampling, (), bytes(16), alternatives=2, processed=True)
    lists = Job(
        (1,), 1, 8, sampling, (), bytes(16), alternatives=1, processed=True, reported_at=ReportedAt((), ((7,),))
    )
    queries = [
        ScoreQuery(4, 2),
        SampleTokens(processed, [0], 0, TokenCounts()),
        SampleTokens(lists, [0], 0, TokenCounts()),
    ]
    score, first, second = (tokens[0] for tokens in Sampler().read(rows, queries))
    assert score == Sampler().read(rows[:1], [ScoreQuery(4, 2)])[0][0]
    assert first.logprob == second.logprob
    wanted = reference(rows[0], sampling, [], ())
    assert second.top == ((7, pytest.approx(wanted[7], abs=1e-4)),)


def test_a_drawn_token_is_never_left_out() -> None:
    query = SampleQuery(Sampling(top_p=0.01), [1], TokenCounts())
    assert np.isfinite(processed_row(logits(), query, [17])[17])


@pytest.mark.parametrize("sampling", CASES, ids=str)
def test_sorting_few_weights_first_keeps_the_same_tokens(monkeypatch: pytest.MonkeyPatch, sampling: Sampling) -> None:
    row = logits()
    row[4:8] = row[20]  # ties
    query = SampleQuery(sampling, [1], TokenCounts(), prompt=(1, 2))
    whole = processed_row(row, query, [17])
    monkeypatch.setattr(numpy_kernel, "_FIRST_SORTED", 1)
    assert (processed_row(row, query, [17]) == whole).all()


def test_a_vocabulary_is_not_sorted_for_a_few_likely_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    row = np.random.default_rng(5).normal(0, 6, 20_000).astype(np.float32)
    sorted_counts = []

    def recorded(weights: Any, count: int) -> Any:
        sorted_counts.append(count)
        return top_ids(weights, count)

    monkeypatch.setattr(numpy_kernel, "top_ids", recorded)
    for sampling in (Sampling(top_p=0.9), Sampling(top_k=10_000), Sampling(top_k=10_000, top_p=0.9)):
        processed_row(row, SampleQuery(sampling, [1], TokenCounts()), [17])
    assert max(sorted_counts) <= 256


@pytest.mark.parametrize("sampling", CASES, ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_are_processed_too(sampling: Sampling, value: float) -> None:
    """The engine ends their jobs after it has read all rows."""
    row = logits()
    row[3:30] = value
    processed_row(row, SampleQuery(sampling, [1], TokenCounts(), prompt=(1, 2)), [17])
    row[:] = value
    processed_row(row, SampleQuery(sampling, [1], TokenCounts(), prompt=(1, 2)), [17])


def test_the_tokens_of_a_prompt_are_sorted_once() -> None:
    query = SampleQuery(Sampling(repetition_penalty=1.2), [1], TokenCounts(), prompt=(3, 1, 4, 1, 5, 9, 2, 6, 5))
    adjusted_row(logits(), query)
    hits = cached_distinct.cache_info().hits
    adjusted_row(logits(), query)
    assert cached_distinct.cache_info().hits == hits + 1


def test_the_rows_of_other_jobs_are_read_together() -> None:
    counts = []

    class Recorded(NumpyKernel):
        def read(self, rows: Any, queries: Any) -> Any:
            counts.append(len(rows))
            return super().read(rows, queries)

    job = Job((1,), 1, 8, Sampling(), (), bytes(16), alternatives=2, processed=True)
    queries = [ScoreQuery(4, 2), ScoreQuery(5, 2), SampleTokens(job, [0], 0, TokenCounts()), ScoreQuery(6, 2)]
    Sampler(Recorded()).read(np.stack([logits()] * 4), queries)
    assert counts == [4, 1]
