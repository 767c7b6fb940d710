"""Reading rows of logits: what is compiled agrees with numpy, and both with the definition."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from afterword.engine.core.numpy_kernel import NumpyKernel, random_number
from afterword.engine.core.sampler_kernel import (
    BLOCK,
    LIBRARY,
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
def walks(request) -> SamplerKernel:
    if request.param == "plain":
        return NumpyKernel()
    if not LIBRARY.exists():
        assert shutil.which("c++") is None, "there is a compiler, so the library should have been built"
        pytest.skip("no C++ compiler built the library")
    return CompiledKernel()


def read(kernel: SamplerKernel, row: np.ndarray, task: RowQuery) -> RowResult:
    return kernel.read(row[None], [task])[0]


def drawn(kernel: SamplerKernel, row: np.ndarray, sampling: Sampling, seeds: list[int]) -> list[int]:
    return [token for token, _ in read(kernel, row, RowQuery(draw=SampleQuery(sampling, seeds, TokenCounts()))).drawn]


@given(ROWS, st.integers(1, 4), st.data())
def test_log_probabilities_are_numbers_less_the_log_sum_of_exponentials(walks, row, count, data):
    row[0] = max(row[0], -60)
    rows = np.stack([np.roll(row, turn) for turn in range(count)])
    given = data.draw(st.lists(st.integers(0, len(row) - 1), min_size=count, max_size=count))
    reported = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    tasks = [RowQuery(wanted, given=token) for wanted, token in zip(reported, given, strict=True)]
    for each, found, task in zip(rows, walks.read(rows, tasks), tasks, strict=True):
        exact = np.logaddexp.reduce(each.astype(np.float64)) if task.reported else 0
        # A sum of 256 is kept in eight parts: 31 additions and 3, each rounded; beside that, errors of the numbers.
        assert found.value == pytest.approx(float(each[task.given]) - exact, abs=34 * 2.0**-24 + 5e-7, rel=1e-7)
        assert found.rank == 1 + (each > each[task.given]).sum()


@given(ROWS | ROWS.map(np.round), st.integers(1, 700))
def test_the_likeliest_are_the_head_of_a_stable_sort(walks, row, count):
    expected = sorted(range(len(row)), key=lambda i: (-row[i], i))[:count]
    assert read(walks, row, RowQuery(given=0, top=count)).top == tuple((i, float(row[i])) for i in expected)


def test_the_likeliest_when_all_are_in_one_block(walks):
    row = np.zeros(150_000, np.float32)
    row[1000:1010] = range(1, 11)
    top = read(walks, row, RowQuery(given=0, top=12)).top
    assert [token for token, _ in top] == [*range(1009, 999, -1), 0, 1]


@pytest.mark.parametrize("seed", [0, 2**62, 2**63, 2**64 - 2**40, 2**64 - 1])
@pytest.mark.parametrize("places", [(2, 4), (100, 300), (255, 256), (3, 699)])
def test_what_weighs_nothing_is_never_drawn(walks, seed, places):
    row = np.full(700, -np.inf, np.float32)
    row[list(places)] = 3
    for sampling in (Sampling(1.0), Sampling(1.0, 0.9999), Sampling(1.0, top_k=9)):
        assert drawn(walks, row, sampling, [seed]) == [places[seed >= 2**63]]


def test_draws_are_spread_over_the_row_as_the_weights_are(walks):
    """Evenly spaced numbers give every token its share, nearly to the draw."""
    row = np.log(np.tile(np.array([1e-9, 0.5, 0.25, 1.0], np.float32), 200))
    draws = 50_000
    for sampling in (Sampling(1.0), Sampling(1.0, min_p=0.3)):
        seeds = [int((i + 0.5) / draws * 2**64) for i in range(draws)]
        shares = np.bincount(drawn(walks, row, sampling, seeds), minlength=len(row)) / draws
        weights = np.where(np.exp(row) >= sampling.min_p, np.exp(row), 0)
        np.testing.assert_allclose(shares, weights / weights.sum(), atol=2 / draws)


@pytest.mark.skipif(not LIBRARY.exists(), reason="no C++ compiler built the library")
@pytest.mark.parametrize("sampling", FILTERS, ids=str)
def test_both_draw_the_same_but_where_rounding_decides(sampling):
    row = np.random.default_rng(0).normal(0, 3, 5000).astype(np.float32)
    seeds = np.random.default_rng(1).integers(0, 2**64, 2000, np.uint64).tolist()
    plain, compiled = (drawn(each, row, sampling, seeds) for each in (NumpyKernel(), CompiledKernel()))
    assert sum(a != b for a, b in zip(plain, compiled, strict=True)) < 5


def test_a_block_has_the_same_sum_in_any_row(walks):
    """So a token's bits do not depend on how long the row is, or on what is beside it."""
    row = np.random.default_rng(0).normal(0, 3, 5 * BLOCK).astype(np.float32)
    row[: 2 * BLOCK] = row[4 * BLOCK :] = -1000  # weighs nothing
    part = row[2 * BLOCK : 4 * BLOCK].copy()
    assert read(walks, row, RowQuery(True, given=2 * BLOCK)) == read(walks, part, RowQuery(True, given=0))


@pytest.mark.skipif(not LIBRARY.exists(), reason="no C++ compiler built the library")
def test_threads_change_nothing(team):
    row = np.random.default_rng(0).normal(0, 3, 100_001).astype(np.float32)
    seeds = list(range(0, 2**64, 2**58))
    tasks = [RowQuery(True, 5, 7, SampleQuery(each, seeds, TokenCounts([3, 99, 3]))) for each in FILTERS]
    rows = np.stack([np.roll(row, turn) for turn in range(len(tasks))])
    together = CompiledKernel(1).read(rows, tasks)
    assert CompiledKernel(3).read(rows, tasks) == CompiledKernel(3, team).read(rows, tasks) == together
    alone = [CompiledKernel(3, team).read(each[None], [task])[0] for each, task in zip(rows, tasks, strict=True)]
    assert alone == together


@pytest.mark.parametrize("sampling", FILTERS, ids=str)
@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_of_numbers_breaks_nothing(walks, sampling, broken):
    everywhere = [np.full(length, broken, np.float32) for length in (1, 100, 300)]
    for row in (*everywhere, np.append(np.zeros(300, np.float32), np.float32(broken))):
        found = read(walks, row, RowQuery(True, 9, 0, SampleQuery(sampling, [2**63], TokenCounts())))
        assert not math.isinf(found.value)
        assert {token for token, _ in (*found.top, *found.drawn)} <= set(range(len(row)))
        assert 1 <= found.rank <= 2


def test_nothing_is_found_where_nothing_is_wanted(walks):
    row = np.zeros(300, np.float32)
    assert walks.read(np.stack([row, row]), [RowQuery(), RowQuery(given=3)]) == [RowResult(), RowResult((), 0.0, 1)]


@pytest.mark.skipif(not LIBRARY.exists(), reason="no C++ compiler built the library")
def test_ids_beyond_the_row_are_not_written_to():
    """Whoever asks has been told so before; memory must not depend on it."""
    rows = np.zeros((3, 300), np.float32)
    biased = Sampling(0.0, repetition_penalty=2.0, presence_penalty=1.0, logit_bias=((300, 9.0), (-1, 9.0), (7, 1.0)))
    draw = SampleQuery(biased, [0], TokenCounts([300, 10**9]), prompt=(-5, 400), banned=(301,))
    assert [each.drawn for each in CompiledKernel().read(rows, [RowQuery(), RowQuery(draw=draw), RowQuery()])] == [
        (),
        ((7, 0.0),),
        (),
    ]
    assert not rows.any()


@given(st.lists(st.integers(0, 400), max_size=300))
def test_a_tally_counts(tokens):
    token_counts = TokenCounts(tokens)
    assert dict(zip(token_counts.ids.tolist(), token_counts.counts.tolist(), strict=True)) == {
        each: tokens.count(each) for each in tokens
    }
    assert token_counts.addresses == (token_counts.ids.ctypes.data, token_counts.counts.ctypes.data)


@given(st.integers(0, 2**64 - 1), st.integers(0, 20))
def test_a_seed_gives_numbers(seed, n):
    value = random_number(seed, n)
    assert 0 <= value < 1
    assert value == random_number(seed, n)
    assert value != random_number(seed, n + 1)


def test_the_numbers_of_a_seed_do_not_change():
    """The first is the seed; those that follow are what SplitMix64 gives (its author's first numbers from 0)."""
    assert random_number(2**63, 0) == 0.5
    assert [random_number(0, n) for n in (1, 2)] == [
        (x >> 11) * 2.0**-53 for x in (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4)
    ]
