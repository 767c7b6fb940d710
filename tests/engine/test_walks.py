"""Walks over rows of logits: what is compiled agrees with numpy, and both with the definition."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from afterword.engine.core.plain import Plain, number
from afterword.engine.core.rows import BLOCK, FILE, Compiled, Walks
from afterword.engine.core.sampler import UNCHANGED
from afterword.engine.protocol import Sampling

NUMBERS = st.floats(-60, 60, width=32)
ROWS = arrays.arrays(np.float32, st.integers(1, 3 * BLOCK + 9), elements=NUMBERS | st.sampled_from([-np.inf, 0.0]))


@pytest.fixture(scope="module", params=["plain", "compiled"])
def walks(request) -> Walks:
    if request.param == "plain":
        return Plain()
    if not FILE.exists():
        assert shutil.which("c++") is None, "there is a compiler, so the library should have been built"
        pytest.skip("no C++ compiler built the library")
    return Compiled()


def maxima(row: np.ndarray) -> np.ndarray:
    return np.array([row[start : start + BLOCK].max() for start in range(0, len(row), BLOCK)], np.float32)


@given(ROWS, st.integers(1, 4), st.data())
def test_a_survey_tells_maxima_and_log_sums_of_exponentials(walks, row, count, data):
    row[0] = max(row[0], -60)
    rows = np.stack([np.roll(row, turn) for turn in range(count)])
    summed = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    found, totals = walks.survey(rows, summed)
    for index, (total, wanted) in enumerate(zip(totals, summed, strict=True)):
        assert (found[index] == maxima(rows[index])).all()
        exact = np.logaddexp.reduce(rows[index].astype(np.float64))
        assert total == pytest.approx(exact if wanted else math.nan, abs=1e-6, rel=1e-7, nan_ok=True)


@given(ROWS, st.data())
def test_above_counts_what_is_larger(walks, row, data):
    value = data.draw(st.sampled_from(row.tolist()))
    assert walks.above(row, maxima(row), value) == (row > np.float32(value)).sum()


@given(ROWS | ROWS.map(np.round), st.integers(1, 700))
def test_likeliest_is_the_head_of_a_stable_sort(walks, row, count):
    expected = sorted(range(len(row)), key=lambda i: (-row[i], i))[:count]
    assert walks.likeliest(row, maxima(row), count).tolist() == expected


def test_likeliest_when_all_are_in_one_block(walks):
    row = np.zeros(150_000, np.float32)
    row[1000:1010] = range(1, 11)
    assert walks.likeliest(row, maxima(row), 12).tolist() == [*range(1009, 999, -1), 0, 1]


FILTERS = [Sampling(0.0), Sampling(1.0), Sampling(0.7, 0.9), Sampling(1.3, 0.5, 7), Sampling(2.0, min_p=0.1)]


@given(ROWS, st.sampled_from(FILTERS), st.data())
def test_edits_are_as_if_they_stood_in_the_row(walks, row, sampling, data):
    ids = np.array(sorted(data.draw(st.sets(st.integers(0, len(row) - 1), max_size=9))), np.int64)
    values = np.array(data.draw(st.lists(NUMBERS, min_size=len(ids), max_size=len(ids))), np.float32)
    row[0] = max(row[0], -60)
    edited, as_it_was = row.copy(), row.copy()
    edited[ids] = values
    drawn = walks.draw(row, maxima(row), (ids, values), sampling, range(0, 2**64, 2**60))
    assert drawn == walks.draw(edited, maxima(edited), UNCHANGED, sampling, range(0, 2**64, 2**60))
    assert (row == as_it_was).all()


@pytest.mark.parametrize("seed", [0, 2**62, 2**63, 2**64 - 2**40, 2**64 - 1])
@pytest.mark.parametrize("places", [(2, 4), (100, 300), (255, 256), (3, 699)])
def test_what_weighs_nothing_is_never_drawn(walks, seed, places):
    row = np.full(700, -np.inf, np.float32)
    row[list(places)] = 3
    for sampling in (Sampling(1.0), Sampling(1.0, 0.9999), Sampling(1.0, top_k=9)):
        assert walks.draw(row, maxima(row), UNCHANGED, sampling, [seed]) == [places[seed >= 2**63]]


def test_draws_are_spread_over_the_row_as_the_weights_are(walks):
    """Evenly spaced numbers give every token its share, nearly to the draw."""
    row = np.log(np.tile(np.array([1e-9, 0.5, 0.25, 1.0], np.float32), 200))
    draws = 50_000
    for sampling in (Sampling(1.0), Sampling(1.0, min_p=0.3)):
        seeds = [int((i + 0.5) / draws * 2**64) for i in range(draws)]
        shares = np.bincount(walks.draw(row, maxima(row), UNCHANGED, sampling, seeds), minlength=len(row)) / draws
        weights = np.where(np.exp(row) >= sampling.min_p, np.exp(row), 0)
        np.testing.assert_allclose(shares, weights / weights.sum(), atol=2 / draws)


@pytest.mark.skipif(not FILE.exists(), reason="no C++ compiler built the library")
@pytest.mark.parametrize("sampling", FILTERS, ids=str)
def test_both_draw_the_same_but_where_rounding_decides(sampling):
    row = np.random.default_rng(0).normal(0, 3, 5000).astype(np.float32)
    seeds = np.random.default_rng(1).integers(0, 2**64, 2000, np.uint64).tolist()
    plain, compiled = (each.draw(row, maxima(row), UNCHANGED, sampling, seeds) for each in (Plain(), Compiled()))
    assert sum(a != b for a, b in zip(plain, compiled, strict=True)) < 5


def test_a_block_has_the_same_sum_in_any_row(walks):
    """So a token's bits do not depend on how long the row is, or on what is beside it."""
    row = np.random.default_rng(0).normal(0, 3, 5 * BLOCK).astype(np.float32)
    row[: 2 * BLOCK] = row[4 * BLOCK :] = -1000  # weighs nothing
    part = row[2 * BLOCK : 4 * BLOCK].copy()
    assert walks.survey(row[None], [True])[1] == walks.survey(part[None], [True])[1]


@pytest.mark.skipif(not FILE.exists(), reason="no C++ compiler built the library")
def test_threads_change_nothing():
    row = np.random.default_rng(0).normal(0, 3, 100_001).astype(np.float32)
    results = []
    for threads in (1, 3):
        several = Compiled(threads)
        found, totals = several.survey(np.stack([row, row[::-1]]), [True, True])
        draws = [several.draw(row, found[0], UNCHANGED, each, range(0, 2**64, 2**58)) for each in FILTERS]
        results.append((found.tolist(), totals, draws))
    assert results[0] == results[1]


@pytest.mark.parametrize("sampling", FILTERS, ids=str)
@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_of_numbers_breaks_nothing(walks, sampling, broken):
    for row in (np.full(300, broken, np.float32), np.append(np.zeros(300, np.float32), np.float32(broken))):
        with np.errstate(invalid="ignore"):
            found, totals = walks.survey(row[None], [True])
            assert not math.isinf(totals[0])
            assert walks.above(row, found[0], 1.0) in (0, np.isposinf(row).sum())
            assert set(walks.likeliest(row, found[0], 9)) <= set(range(301))
            assert 0 <= walks.draw(row, found[0], UNCHANGED, sampling, [2**63])[0] < len(row)


@given(st.integers(0, 2**64 - 1), st.integers(0, 20))
def test_a_seed_gives_numbers(seed, n):
    value = number(seed, n)
    assert 0 <= value < 1
    assert value == number(seed, n)
    assert value != number(seed, n + 1)


def test_the_numbers_of_a_seed_do_not_change():
    """The first is the seed; those that follow are what SplitMix64 gives (its author's first numbers from 0)."""
    assert number(2**63, 0) == 0.5
    assert [number(0, n) for n in (1, 2)] == [(x >> 11) * 2.0**-53 for x in (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4)]
