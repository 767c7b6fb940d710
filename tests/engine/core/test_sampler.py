"""Tests of the sampler against simple float64 reference implementations."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afterword.engine.core import numpy_kernel, sampler
from afterword.engine.core.numpy_kernel import NumpyKernel, random_number
from afterword.engine.core.sampler import Sampler, SampleTokens, ScoreQuery
from afterword.engine.core.sampler_kernel import CompiledKernel, RowQuery, SampleQuery
from afterword.engine.core.token_counts import TokenCounts
from afterword.engine.protocol import Job, Sampling, Token

KEY = b"k" * 16


@pytest.fixture(scope="module", autouse=True, params=["compiled", "numpy"])
def kernel(request) -> Iterator[None]:
    if request.param == "compiled":
        request.getfixturevalue("compiled_kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "make_kernel", {"numpy": NumpyKernel, "compiled": CompiledKernel}[request.param])
        yield


VOCABULARY = 151_936
EIGHT = np.array([2.0, 1.5, 1.0, 0.0, -1.0, -1.0, 0.5, 1.9], np.float32)

rows = st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=700).map(lambda row: np.array(row, np.float32))
spaced_rows = rows.map(lambda row: np.round(row, 3))  # filters treat logits as equal if their weights have equal digits
tied_rows = st.lists(st.integers(-3, 3), min_size=2, max_size=700).map(lambda row: np.array(row, np.float32))


def sampling(**fields: object) -> Sampling:
    return Sampling(**fields)  # type: ignore[arg-type]


def job(wanted: Sampling, **fields: object) -> Job:
    return Job(prompt=(0,), samples=1, max_tokens=1, sampling=wanted, end_tokens=(), key=KEY, **fields)  # type: ignore[arg-type]


def sampled(row: np.ndarray, job: Job, samples: Iterable[int], position: int = 0, generated: Iterable[int] = ()):
    (tokens,) = Sampler().read(row[None].copy(), [SampleTokens(job, list(samples), position, TokenCounts(generated))])
    return tokens


def scored(rows: np.ndarray, tokens: list[int], alternatives: int) -> list[Token]:
    return [token for (token,) in Sampler().read(rows.copy(), [ScoreQuery(token, alternatives) for token in tokens])]


def drawn(row: np.ndarray, wanted: Sampling, draws: int, position: int = 0) -> list[int]:
    return [token.id for token in sampled(row, job(wanted), range(draws), position)]


def probabilities(row: np.ndarray, wanted: Sampling) -> np.ndarray:
    """The expected distribution: temperature, min_p, top_k, top_p, in float64 and with a sort. Shape: (vocabulary,)."""
    weights = np.exp((row.astype(np.float64) - float(row.max())) / wanted.temperature)
    order = [i for i in sorted(range(len(row)), key=lambda i: (-row[i], i)) if weights[i] >= wanted.min_p]
    order = order[: wanted.top_k or None]
    mass = weights[order].sum()
    before = np.cumsum(weights[order]) - weights[order]
    kept = [i for i, likelier in zip(order, before, strict=True) if likelier < wanted.top_p * mass or i == order[0]]
    result = np.zeros(len(row))
    result[kept] = weights[kept] / weights[kept].sum()
    return result


def deviation(chosen: list[int], expected: np.ndarray) -> float:
    """How many standard deviations chi-square lies above its mean. All rare tokens count as one."""
    counts = np.bincount(chosen, minlength=len(expected)).astype(np.float64)
    assert not counts[expected == 0].any(), "a token that the filters exclude"
    expected = expected * len(chosen)
    rare = expected < 2
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], max(expected[rare].sum(), 1e-9))
    freedom = len(counts) - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


def wide(sharpness: float, size: int = 1000) -> np.ndarray:
    """A random row; the default size is several blocks and a part of one."""
    return np.random.default_rng(5).normal(0, sharpness, size).astype(np.float32)


FILTERS = [
    sampling(),
    sampling(temperature=0.7),
    sampling(temperature=1.8),
    sampling(top_p=0.9, temperature=0.8),
    sampling(top_p=0.5),
    sampling(top_p=0.05),
    sampling(min_p=0.2),
    sampling(top_k=3),
    sampling(min_p=0.1, top_p=0.8),
    sampling(top_k=5, top_p=0.7),
    sampling(min_p=0.05, top_k=6, top_p=0.9, temperature=1.3),
]


@pytest.mark.parametrize("row", [EIGHT, wide(0.5), wide(4.0)], ids=["eight", "flat", "peaked"])
@pytest.mark.parametrize("wanted", FILTERS, ids=str)
def test_draws_follow_the_distribution(row, wanted):
    assert (
        deviation(drawn(row, wanted, 20_000), probabilities(row, wanted)) < 4
    )  # the key is fixed, so the result is too


@pytest.mark.parametrize(
    ("wanted", "other"),
    [
        (sampling(), sampling(temperature=1.3)),
        (sampling(top_p=0.9), sampling(top_p=0.9, temperature=1.3)),
        (sampling(top_k=5), sampling(top_k=5, temperature=1.3)),
    ],
)
def test_the_deviation_of_a_wrong_distribution_is_large(wanted, other):
    """The test above can fail: here the same draws are compared with another temperature."""
    assert deviation(drawn(EIGHT, wanted, 4000), probabilities(EIGHT, other)) > 4


@settings(max_examples=60)
@given(
    st.one_of(spaced_rows, tied_rows),
    st.sampled_from([0.3, 1.0, 2.0]),
    st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.999, 1.0]),
    st.sampled_from([0, 1, 3, 40, 2000]),
    st.sampled_from([0.0, 0.3, 1.0]),
)
def test_only_what_the_filters_keep_is_drawn(row, temperature, top_p, top_k, min_p):
    loose = sampling(temperature=temperature, top_p=min(top_p + 1e-5, 1.0), top_k=top_k, min_p=min_p * (1 - 1e-5))
    allowed = probabilities(row, loose) > 0
    wanted = sampling(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    assert all(allowed[token] for token in drawn(row, wanted, 20))


@pytest.mark.parametrize(("top_p", "kept"), [(0.0, 1), (0.0009, 1), (0.0011, 2), (0.4999, 500), (0.5001, 501)])
def test_among_equals_the_nucleus_takes_the_lower_ids(top_p, kept):
    row = np.zeros(1000, np.float32)
    chosen = drawn(row, sampling(top_p=top_p), 100 + 4 * kept)
    assert max(chosen) < kept
    assert len(set(chosen)) > 0.9 * kept


def test_among_equals_top_k_takes_the_lower_ids():
    assert set(drawn(np.zeros(1000, np.float32), sampling(top_k=7), 300)) == set(range(7))


@pytest.mark.parametrize("wanted", [sampling(), sampling(top_p=0.9), sampling(top_k=9), sampling(min_p=0.1)], ids=str)
def test_all_mass_on_one_token(wanted):
    row = np.full(700, -np.inf, np.float32)
    row[650] = 3.0
    assert drawn(row, wanted, 50) == [650] * 50


def test_a_nucleus_in_a_whole_vocabulary():
    row = wide(2.0, VOCABULARY)
    weights = np.exp(row.astype(np.float64))
    for top_p in (0.001, 0.3, 0.9):
        for token in drawn(row, sampling(top_p=top_p), 10):
            assert weights[row > row[token]].sum() < top_p * weights.sum() * (1 + 1e-6)


@given(rows)
def test_zero_temperature_takes_the_likeliest_and_ties_go_to_the_lower_id(row):
    best = max(range(len(row)), key=lambda i: (row[i], -i))
    for temperature in (0.0, 1e-5, 1e-300):
        assert drawn(row, sampling(temperature=temperature), 2) == [best, best]


def test_zero_temperature_applies_penalties():
    row = np.array([5.0, 4.0, 4.0], np.float32)
    wanted = job(sampling(temperature=0.0, presence_penalty=1.5))
    assert sampled(row, wanted, [0], 1, [0]) == [Token(1)]
    assert row[0] == 5


@pytest.mark.parametrize("temperature", [0.0002, 0.001, 0.01])
def test_small_temperatures_keep_their_precision(temperature):
    row = np.array([30.0, 30.0 - temperature, 0.0], np.float32)
    gap = (float(row[0]) - float(row[1])) / temperature
    share = drawn(row, sampling(temperature=temperature), 4000).count(0) / 4000
    assert share == pytest.approx(1 / (1 + math.exp(-gap)), abs=0.02)


@given(st.binary(min_size=1, max_size=16), st.integers(0, 200), st.integers(0, 10**6))
def test_a_seed_depends_on_its_arguments_alone(key, sample, position):
    seed = sampler.seed_of(key, sample, position)
    assert 0 <= seed < 2**64
    assert seed == sampler.seed_of(key, sample, position)
    assert seed != sampler.seed_of(key, sample + 1, position)
    assert seed != sampler.seed_of(key, sample, position + 1)


def test_seeds_do_not_change():
    assert random_number(sampler.seed_of(KEY, 1, 2), 0) == 0.45604927273710116


def test_a_draw_does_not_depend_on_earlier_or_concurrent_draws():
    flat, peaked = wide(0.5), wide(4.0)
    wanted = job(sampling(top_p=0.6, temperature=0.8), alternatives=3)
    third = np.pad(EIGHT, (0, len(flat) - len(EIGHT)))
    rows, others = np.stack([flat, peaked, third]), [job(sampling()), job(sampling(min_p=0.5))]
    together = sampled(flat, wanted, range(30), 4, [7, 7])
    used = Sampler()
    for sample in reversed(range(30)):
        beside = [SampleTokens(each, (sample,), 9, TokenCounts()) for each in others]
        found = used.read(rows, [SampleTokens(wanted, (sample,), 4, TokenCounts([7, 7])), *beside])
        assert found[0] == [together[sample]]
    assert (rows == np.stack([flat, peaked, third])).all()  # the kernel restored the rows


def adjusted(
    row: list[float] | np.ndarray, wanted: Sampling, prompt: list[int], generated: list[int], banned: list[int]
):
    return numpy_kernel.adjusted_row(
        np.array(row, np.float32), SampleQuery(wanted, [], TokenCounts(generated), tuple(prompt), tuple(banned))
    )


def test_penalties_follow_the_documented_formula():
    row = np.zeros(6, np.float32)
    wanted = sampling(presence_penalty=0.5, frequency_penalty=0.25)
    assert adjusted(row, wanted, [0, 2], [4, 1, 4, 4], []).tolist() == [0, -0.75, 0, 0, -1.25, 0]


def test_the_repetition_penalty_applies_to_tokens_of_prompt_and_sample():
    row = [2.0, -2.0, 2.0, -2.0]
    assert adjusted(row, sampling(repetition_penalty=2.0), [0, 0, 1], [1] * 5, []).tolist() == [1, -4, 2, -2]


ids = st.integers(0, 19)


@given(
    st.lists(st.floats(-30, 30, width=32), min_size=20, max_size=20),
    st.dictionaries(ids, st.floats(-100, 100)),
    st.tuples(st.lists(ids), st.lists(ids), st.lists(ids, max_size=3, unique=True)),
    st.tuples(st.sampled_from([0.0, 0.5, -2.0]), st.sampled_from([0.0, 0.3]), st.sampled_from([1.0, 1.5, 0.8])),
)
def test_adjustments_are_applied_in_order(row, bias, tokens, strengths):
    """Compare with the definition. A greedy draw takes the most likely token of the adjusted row, which is restored."""
    prompt, generated, banned = tokens
    presence, frequency, repetition = strengths
    expected = [value + bias.get(token, 0.0) for token, value in enumerate(row)]
    for token in {*prompt, *generated}:
        expected[token] *= 1 / repetition if expected[token] > 0 else repetition
    for token, times in Counter(generated).items():
        expected[token] -= presence + frequency * times
    for token in banned:
        expected[token] = -math.inf
    wanted = Sampling(0.0, 1.0, 0, 0.0, presence, frequency, repetition, tuple(bias.items()))
    found = adjusted(row, wanted, prompt, generated, banned)
    assert found.tolist() == pytest.approx(expected, abs=1e-3)
    query = SampleQuery(wanted, [0], TokenCounts(generated), tuple(prompt), tuple(banned))
    rows = np.array([row], np.float32)
    ((token, value),) = sampler.make_kernel().read(rows, [RowQuery(sample_query=query)])[0].sampled
    assert token == int(found.argmax())
    assert value == np.float32(row[token])
    assert (rows == np.array([row], np.float32)).all()


def test_end_tokens_are_never_sampled_before_min_tokens():
    row = np.array([9.0, 5.0, 0.0], np.float32)
    for wanted in (sampling(), sampling(temperature=0.0), sampling(top_p=0.9), sampling(top_k=2)):
        waiting = Job((0,), 1, 9, wanted, (0, 1), KEY, min_tokens=5, alternatives=1)
        tokens = sampled(row, waiting, range(20), 4)
        assert {token.id for token in tokens} == {2}
        assert tokens[0].top[0][0] == 0  # reported alternatives are those of the unmodified row
        assert sampled(row, waiting, [0], 5)[0].id != 2


@pytest.mark.parametrize("temperature", [0.0, 0.2, 2.0])
def test_logit_bias_forces_or_bans_tokens(temperature):
    row = np.array([5.0, 4.0, 0.0], np.float32)
    assert set(drawn(row, sampling(temperature=temperature, logit_bias=((2, 100.0),)), 200)) == {2}
    assert 0 not in drawn(row, sampling(temperature=temperature, logit_bias=((0, -100.0),)), 200)


def test_draws_with_bias_follow_the_adjusted_distribution():
    row = wide(1.0)
    top = int(row.argmax())
    wanted = sampling(temperature=0.8, top_p=0.9, logit_bias=((3, 4.0), (top, -100.0)))
    edited = row.copy()
    edited[[3, top]] += np.array([4.0, -100.0], np.float32)
    assert deviation(drawn(row, wanted, 3000), probabilities(edited, sampling(temperature=0.8, top_p=0.9))) < 4


@given(st.one_of(rows, tied_rows), st.data())
def test_log_probabilities_are_the_log_softmax_of_the_row(row, data):
    token = data.draw(st.integers(0, len(row) - 1))
    exact = row.astype(np.float64)
    expected = exact - exact.max() - math.log(np.exp(exact - exact.max()).sum())
    (found,) = scored(row[None], [token], 3)
    assert found.id == token
    assert found.logprob == pytest.approx(expected[token], abs=1e-6)
    assert found.rank == 1 + sum(row > row[token])
    top = dict(found.top)
    assert list(top) == sorted(range(len(row)), key=lambda i: (-row[i], i))[:3]
    assert list(top.values()) == pytest.approx([expected[i] for i in top], abs=1e-6)
    assert top.get(token, found.logprob) == found.logprob  # the same float, not one close to it


@pytest.mark.parametrize("sharpness", [0.0, 0.1, 2.0, 8.0])
def test_log_probabilities_in_a_whole_vocabulary(sharpness):
    row = wide(sharpness, VOCABULARY)
    exact = row.astype(np.float64)
    total = exact.max() + math.log(np.exp(exact - exact.max()).sum())
    assert scored(row[None], [7], 0)[0].logprob == pytest.approx(exact[7] - total, abs=1e-6)


@pytest.mark.parametrize(
    "wanted", [sampling(), sampling(temperature=0.7), sampling(temperature=0.0), sampling(min_p=0.5)], ids=str
)
def test_a_sampled_token_is_reported_as_it_would_be_scored(wanted):
    """Sampling parameters do not change the reported floats."""
    row = wide(3.0)
    for token in sampled(row, job(wanted, alternatives=5), range(20), 0, [1]):
        (found,) = scored(row[None], [token.id], 5)
        assert token == Token(found.id, found.logprob, found.top)


def test_nothing_is_reported_unless_requested():
    assert sampled(EIGHT, job(sampling()), [0])[0].logprob is None
    assert sampled(EIGHT, job(sampling(), alternatives=0), [0])[0].top == ()


@pytest.mark.parametrize("size", [1, 24, 255, 256, 257, 5000, 50_257])
def test_the_bits_of_a_result_depend_on_no_other_row_and_on_no_address(size):
    matrix = np.random.default_rng(1).normal(0, 3, (7, size)).astype(np.float32)
    tokens = [size // 2] * 7
    together = scored(matrix, tokens, 5)
    assert scored(matrix[3:5], tokens[3:5], 5) == together[3:5]
    shifted = np.empty(size + 3, np.float32)
    for index, row in enumerate(matrix):
        for offset in range(3):
            shifted[offset : offset + size] = row
            assert scored(shifted[None, offset : offset + size], tokens[:1], 5) == [together[index]]


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("wanted", [*FILTERS, sampling(temperature=0.0), sampling(logit_bias=((1, 3.0),))], ids=str)
def test_a_row_that_is_not_finite_gives_a_token_and_no_exception(broken, wanted):
    for row in (np.full(300, broken, np.float32), np.append(wide(1.0, 300), np.float32(broken))):
        token = sampled(row, job(wanted, alternatives=2), [0])[0]
        assert 0 <= token.id < len(row)
        scored(row[None], [0], 2)
