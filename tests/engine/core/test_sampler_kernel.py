"""The sampler kernels: compiled and numpy, compared with each other and with the definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from afterword.engine.core.numpy_kernel import NumpyKernel, random_number
from afterword.engine.core.sampler_kernel import (
    BLOCK,
    CompiledKernel,
    RowQuery,
    RowResult,
    SampleQuery,
    SamplerKernel,
)
from afterword.engine.core.token_counts import TokenCounts
from afterword.engine.protocol import Sampling

ROWS = arrays.arrays(
    np.float32, st.integers(1, 3 * BLOCK + 9), elements=st.floats(-60, 60, width=32) | st.sampled_from([-np.inf, 0.0])
)
FILTERS = [Sampling(0.0), Sampling(1.0), Sampling(0.7, 0.9), Sampling(1.3, 0.5, 7), Sampling(2.0, min_p=0.1)]


@pytest.fixture(scope="module", params=["plain", "compiled"])
def sampler_kernel(request) -> SamplerKernel:
    if request.param == "plain":
        return NumpyKernel()
    request.getfixturevalue("compiled_kernels")
    return CompiledKernel()


def read(kernel: SamplerKernel, row: np.ndarray, query: RowQuery) -> RowResult:
    return kernel.read(row[None], [query])[0]


def drawn(kernel: SamplerKernel, row: np.ndarray, sampling: Sampling, seeds: list[int]) -> list[int]:
    return [
        token
        for token, _ in read(kernel, row, RowQuery(sample_query=SampleQuery(sampling, seeds, TokenCounts()))).sampled
    ]


@given(ROWS, st.integers(1, 4), st.data())
def test_log_probabilities_are_logits_minus_the_log_sum_of_exponentials(sampler_kernel, row, count, data):
    row[0] = max(row[0], -60)
    rows = np.stack([np.roll(row, turn) for turn in range(count)])
    given = data.draw(st.lists(st.integers(0, len(row) - 1), min_size=count, max_size=count))
    reported = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    queries = [RowQuery(wanted, given=token) for wanted, token in zip(reported, given, strict=True)]
    for each, found, query in zip(rows, sampler_kernel.read(rows, queries), queries, strict=True):
        exact = np.logaddexp.reduce(each.astype(np.float64)) if query.reported else 0
        # A sum of 256 is kept in eight lanes: 31 additions and 3, each rounded. The weights have errors too.
        assert found.value == pytest.approx(float(each[query.given]) - exact, abs=34 * 2.0**-24 + 5e-7, rel=1e-7)
        assert found.rank == 1 + (each > each[query.given]).sum()


@given(ROWS | ROWS.map(np.round), st.integers(1, 700))
def test_the_top_tokens_are_the_head_of_a_stable_sort(sampler_kernel, row, count):
    expected = sorted(range(len(row)), key=lambda i: (-row[i], i))[:count]
    assert read(sampler_kernel, row, RowQuery(given=0, top=count)).top == tuple((i, float(row[i])) for i in expected)


def test_the_top_tokens_when_all_are_in_one_block(sampler_kernel):
    row = np.zeros(150_000, np.float32)
    row[1000:1010] = range(1, 11)
    top = read(sampler_kernel, row, RowQuery(given=0, top=12)).top
    assert [token for token, _ in top] == [*range(1009, 999, -1), 0, 1]


@pytest.mark.parametrize("seed", [0, 2**62, 2**63, 2**64 - 2**40, 2**64 - 1])
@pytest.mark.parametrize("places", [(2, 4), (100, 300), (255, 256), (3, 699)])
def test_tokens_of_weight_zero_are_never_drawn(sampler_kernel, seed, places):
    row = np.full(700, -np.inf, np.float32)
    row[list(places)] = 3
    for sampling in (Sampling(1.0), Sampling(1.0, 0.9999), Sampling(1.0, top_k=9)):
        assert drawn(sampler_kernel, row, sampling, [seed]) == [places[seed >= 2**63]]


def test_draws_follow_the_weights(sampler_kernel):
    """Evenly spaced seeds draw each token in proportion to its weight, to about one draw."""
    row = np.log(np.tile(np.array([1e-9, 0.5, 0.25, 1.0], np.float32), 200))
    draws = 50_000
    for sampling in (Sampling(1.0), Sampling(1.0, min_p=0.3)):
        seeds = [int((i + 0.5) / draws * 2**64) for i in range(draws)]
        shares = np.bincount(drawn(sampler_kernel, row, sampling, seeds), minlength=len(row)) / draws
        weights = np.where(np.exp(row) >= sampling.min_p, np.exp(row), 0)
        np.testing.assert_allclose(shares, weights / weights.sum(), atol=2 / draws)


@pytest.mark.usefixtures("compiled_kernels")
@pytest.mark.parametrize("sampling", FILTERS, ids=str)
def test_both_kernels_draw_the_same_except_where_rounding_decides(sampling):
    row = np.random.default_rng(0).normal(0, 3, 5000).astype(np.float32)
    seeds = np.random.default_rng(1).integers(0, 2**64, 2000, np.uint64).tolist()
    plain, compiled = (drawn(each, row, sampling, seeds) for each in (NumpyKernel(), CompiledKernel()))
    assert sum(a != b for a, b in zip(plain, compiled, strict=True)) < 5


@pytest.mark.parametrize("reported", [True, False])
def test_asked_ids_have_the_values_of_the_top_tokens(sampler_kernel, reported):
    rows = np.random.default_rng(0).normal(0, 3, (3, 2000)).astype(np.float32)
    ids = tuple(np.random.default_rng(1).permutation(2000).tolist())
    queries = [RowQuery(reported, top=2000, given=0, asked=ids[:count]) for count in (2000, 0, 7)]
    for found, query in zip(sampler_kernel.read(rows, queries), queries, strict=True):
        values = dict(found.top)
        assert found.asked == tuple(values[token] for token in query.asked)


def test_a_block_has_the_same_sum_in_any_row(sampler_kernel):
    """So the bits of a token do not depend on the length of the row or on other blocks."""
    row = np.random.default_rng(0).normal(0, 3, 5 * BLOCK).astype(np.float32)
    row[: 2 * BLOCK] = row[4 * BLOCK :] = -1000  # weighs nothing
    part = row[2 * BLOCK : 4 * BLOCK].copy()
    assert read(sampler_kernel, row, RowQuery(True, given=2 * BLOCK)) == read(
        sampler_kernel, part, RowQuery(True, given=0)
    )


@pytest.mark.usefixtures("compiled_kernels")
def test_the_number_of_threads_changes_no_result(thread_pool):
    row = np.random.default_rng(0).normal(0, 3, 100_001).astype(np.float32)
    seeds = list(range(0, 2**64, 2**58))
    queries = [RowQuery(True, 5, 7, SampleQuery(each, seeds, TokenCounts([3, 99, 3]))) for each in FILTERS]
    rows = np.stack([np.roll(row, turn) for turn in range(len(queries))])
    together = CompiledKernel(1).read(rows, queries)
    assert CompiledKernel(3).read(rows, queries) == CompiledKernel(3, thread_pool).read(rows, queries) == together
    alone = [
        CompiledKernel(3, thread_pool).read(each[None], [query])[0] for each, query in zip(rows, queries, strict=True)
    ]
    assert alone == together


MASKED_FILTERS = [
    *FILTERS,
    Sampling(0.8, 0.9, presence_penalty=0.5, repetition_penalty=1.3, logit_bias=((5, 3.0), (700, -2.0))),
]


@pytest.mark.parametrize("sampling", MASKED_FILTERS, ids=str)
@pytest.mark.parametrize("share", [0.002, 0.3, 1.0])
def test_a_mask_has_the_effect_of_bans_of_all_other_tokens(sampler_kernel, sampling, share):
    generator = np.random.default_rng(7)
    row = generator.normal(0, 3, (1, 1000)).astype(np.float32)
    allowed = generator.random(1000) < share
    allowed[generator.integers(0, 1000)] = True
    mask = np.packbits(np.pad(allowed, (0, 24)), bitorder="little").view(np.uint32)
    counts, seeds, before = TokenCounts([3, 99, 3]), list(range(64)), row.copy()
    banned = tuple(np.flatnonzero(~allowed).tolist())
    (masked,) = sampler_kernel.read(row, [RowQuery(True, 5, 7, SampleQuery(sampling, seeds, counts, (4, 5), (), mask))])
    assert np.array_equal(row, before)
    (expected,) = sampler_kernel.read(row, [RowQuery(True, 5, 7, SampleQuery(sampling, seeds, counts, (4, 5), banned))])
    assert masked == expected
    assert all(allowed[token] for token, _ in masked.sampled)
    (alone,) = sampler_kernel.read(row, [RowQuery(sample_query=SampleQuery(sampling, seeds, counts, (4, 5), (), mask))])
    assert [token for token, _ in alone.sampled] == [token for token, _ in masked.sampled]


def test_a_mask_beyond_the_row_is_ignored(sampler_kernel):
    row = np.zeros((1, 40), np.float32)
    query = SampleQuery(Sampling(), list(range(50)), TokenCounts([]), (), (), np.full(9, 2**32 - 1, np.uint32))
    (found,) = sampler_kernel.read(row, [RowQuery(sample_query=query)])
    assert {token for token, _ in found.sampled} <= set(range(40))


@pytest.mark.parametrize("sampling", FILTERS, ids=str)
@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_rows_with_nan_or_infinity_give_valid_tokens(sampler_kernel, sampling, broken):
    everywhere = [np.full(length, broken, np.float32) for length in (1, 100, 300)]
    for row in (*everywhere, np.append(np.zeros(300, np.float32), np.float32(broken))):
        found = read(sampler_kernel, row, RowQuery(True, 9, 0, SampleQuery(sampling, [2**63], TokenCounts())))
        assert not math.isinf(found.value)
        assert {token for token, _ in (*found.top, *found.sampled)} <= set(range(len(row)))
        assert 1 <= found.rank <= 2


def test_an_empty_query_has_an_empty_result(sampler_kernel):
    row = np.zeros(300, np.float32)
    assert sampler_kernel.read(np.stack([row, row]), [RowQuery(), RowQuery(given=3)]) == [
        RowResult(),
        RowResult((), 0.0, 1),
    ]


@pytest.mark.usefixtures("compiled_kernels")
def test_ids_beyond_the_row_are_not_written_to():
    """Requests are checked before; memory safety must not depend on that check."""
    rows = np.zeros((3, 300), np.float32)
    biased = Sampling(0.0, repetition_penalty=2.0, presence_penalty=1.0, logit_bias=((300, 9.0), (-1, 9.0), (7, 1.0)))
    draw = SampleQuery(biased, [0], TokenCounts([300, 10**9]), prompt=(-5, 400), banned=(301,))
    assert [
        each.sampled for each in CompiledKernel().read(rows, [RowQuery(), RowQuery(sample_query=draw), RowQuery()])
    ] == [
        (),
        ((7, 0.0),),
        (),
    ]
    assert not rows.any()


@given(st.lists(st.integers(0, 400), max_size=300))
def test_token_counts(tokens):
    token_counts = TokenCounts(tokens)
    assert dict(zip(token_counts.ids.tolist(), token_counts.counts.tolist(), strict=True)) == {
        each: tokens.count(each) for each in tokens
    }
    assert token_counts.addresses == (token_counts.ids.ctypes.data, token_counts.counts.ctypes.data)


@given(st.integers(0, 2**64 - 1), st.integers(0, 20))
def test_random_numbers_are_in_range_and_repeatable(seed, n):
    value = random_number(seed, n)
    assert 0 <= value < 1
    assert value == random_number(seed, n)
    assert value != random_number(seed, n + 1)


def test_the_random_numbers_of_a_seed_do_not_change():
    """Number 0 is the seed itself; the next ones are SplitMix64's (the reference values for the seed 0)."""
    assert random_number(2**63, 0) == 0.5
    assert [random_number(0, n) for n in (1, 2)] == [
        (x >> 11) * 2.0**-53 for x in (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4)
    ]
