"""The sampler against float64 references that are too slow and too simple to be wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afterword.engine.core import sampler
from afterword.engine.protocol import Sampling

rows = st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=700).map(lambda row: np.array(row, np.float32))


def sampling(**fields: object) -> Sampling:
    return Sampling(**fields)  # type: ignore[arg-type]


def reference_probabilities(row: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    scaled = row.astype(np.float64) / temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    order = sorted(range(len(row)), key=lambda i: (-probabilities[i], i))
    kept, mass = [], 0.0
    for index in order:
        kept.append(index)
        mass += probabilities[index]
        if mass >= top_p:
            break
    result = np.zeros(len(row))
    result[kept] = probabilities[kept] / probabilities[kept].sum()
    return result


@given(rows, st.data())
def test_log_probabilities_are_the_log_softmax_of_the_row(row, data):
    token = data.draw(st.integers(0, len(row) - 1))
    exact = row.astype(np.float64)
    expected = exact[token] - exact.max() - math.log(np.exp(exact - exact.max()).sum())
    reported = sampler.report(row, token, 3)
    assert reported.logprob == pytest.approx(expected, abs=1e-5)
    top = dict(reported.top)
    assert list(top) == sorted(range(len(row)), key=lambda i: (-row[i], i))[:3]
    assert top.get(token, reported.logprob) == reported.logprob  # the same float, not one close to it


@given(rows)
def test_zero_temperature_takes_the_likeliest_and_ties_go_to_the_lower_id(row):
    best = max(range(len(row)), key=lambda i: (row[i], -i))
    for temperature in (0.0, 1e-5, 1e-300):
        assert sampler.choose(row, sampling(temperature=temperature), 0.99) == best


@settings(max_examples=60)
@given(rows, st.sampled_from([0.3, 1.0, 2.0]), st.sampled_from([0.0, 0.1, 0.9, 0.999]))
def test_only_the_nucleus_is_drawn_from(row, temperature, top_p):
    allowed = reference_probabilities(row, temperature, max(top_p - 1e-9, 0)) > 0
    for draw in np.linspace(0, 1, 23, endpoint=False):
        assert allowed[sampler.choose(row, sampling(temperature=temperature, top_p=top_p), float(draw))]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.5, 0.8), (1.0, 0.5)])
def test_draws_follow_the_distribution(temperature, top_p):
    row = np.array([2.0, 1.5, 1.0, 0.0, -1.0, -1.0, 0.5, 1.9], np.float32)
    draws = 40_000
    chosen = [
        sampler.choose(row, sampling(temperature=temperature, top_p=top_p), sampler.uniform(b"key", 0, i))
        for i in range(draws)
    ]
    counts = np.bincount(chosen, minlength=len(row))
    expected = reference_probabilities(row, temperature, top_p) * draws
    assert not counts[expected == 0].any()
    live = expected > 0
    chi_square = float(((counts[live] - expected[live]) ** 2 / expected[live]).sum())
    assert chi_square < 30  # 7 degrees of freedom: 1 in 10,000; the key is fixed, so this never flickers


def test_a_wrong_distribution_would_be_noticed():
    """The test above can fail: the same draws against another temperature."""
    row = np.array([2.0, 1.5, 1.0, 0.0, -1.0, -1.0, 0.5, 1.9], np.float32)
    draws = 40_000
    chosen = [sampler.choose(row, sampling(), sampler.uniform(b"key", 0, i)) for i in range(draws)]
    expected = reference_probabilities(row, 1.1, 1.0) * draws
    counts = np.bincount(chosen, minlength=len(row))
    assert float(((counts - expected) ** 2 / expected).sum()) > 30


@given(st.binary(min_size=1, max_size=16), st.integers(0, 200), st.integers(0, 10**6))
def test_uniform_depends_on_its_arguments_alone(key, sample, position):
    value = sampler.uniform(key, sample, position)
    assert 0 <= value < 1
    assert value == sampler.uniform(key, sample, position)
    assert value != sampler.uniform(key, sample + 1, position)
    assert value != sampler.uniform(key, sample, position + 1)


def test_penalties_follow_the_documented_formula():
    row = np.zeros(6, np.float32)
    wanted = sampling(presence_penalty=0.5, frequency_penalty=0.25)
    adjusted = sampler.adjusted(row, wanted, (0, 2), {1: 1, 4: 3}, ())
    assert adjusted.tolist() == [0, -0.75, 0, 0, -1.25, 0]
    assert not row.any()  # what is reported is the unmodified row


def test_the_repetition_penalty_weakens_what_the_prompt_or_the_sample_has():
    row = np.array([2.0, -2.0, 2.0, -2.0], np.float32)
    assert sampler.adjusted(row, sampling(repetition_penalty=2.0), (0, 0, 1), {1: 5}, ()).tolist() == [1, -4, 2, -2]


def test_banned_tokens_are_never_chosen():
    row = np.array([9.0, 5.0, 0.0], np.float32)
    adjusted = sampler.adjusted(row, sampling(), (), {}, (0, 1))
    assert {sampler.choose(adjusted, sampling(), draw) for draw in (0.0, 0.5, 0.999999)} == {2}
    assert row[0] == 9


def test_bias_forces_or_bans():
    row = np.array([5.0, 4.0, 0.0], np.float32)

    def chosen(token: int, bias: float, temperature: float, draw: float = 0.5) -> int:
        wanted = sampling(temperature=temperature, logit_bias=((token, bias),))
        return sampler.choose(sampler.adjusted(row, wanted, (), {}, ()), wanted, draw)

    assert chosen(2, 100.0, temperature=0.0) == 2
    assert chosen(0, -100.0, temperature=0.0) == 1
    assert {chosen(2, 100.0, temperature=2.0, draw=draw) for draw in (0.001, 0.5, 0.999999)} == {2}


@given(rows, st.sampled_from([1, 3, 40, 2000]), st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([0.5, 1.0]))
def test_filters_keep_what_their_definitions_keep(row, top_k, min_p, top_p):
    """min_p against the likeliest, then the top_k of those, then the nucleus of these."""
    weights = np.exp(row.astype(np.float64) - float(row.max()))
    order = [i for i in sorted(range(len(row)), key=lambda i: (-weights[i], i)) if weights[i] >= min_p][:top_k]
    cumulated = np.cumsum(weights[order])
    kept = {i for i, before in zip(order, [0, *cumulated[:-1]], strict=True) if before < top_p * cumulated[-1] + 1e-12}
    wanted = sampling(top_k=top_k, min_p=min_p, top_p=top_p)
    for draw in np.linspace(0, 1, 11, endpoint=False):
        assert sampler.choose(row, wanted, float(draw)) in kept


@given(rows, st.integers(1, 700))
def test_likeliest_is_the_head_of_a_stable_sort(row, count):
    expected = sorted(range(len(row)), key=lambda i: (-row[i], i))[:count]
    assert sampler.likeliest(row, min(count, len(row))).tolist() == expected
