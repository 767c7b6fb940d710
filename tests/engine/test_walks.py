"""Walks over a row of logits: what is compiled agrees with numpy, and both with the definition."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from afterword.engine.core.rows import BLOCK, FILE, Compiled, Plain, Walks

ROWS = arrays.arrays(
    np.float32, st.integers(1, 3 * BLOCK + 9), elements=st.floats(-60, 60, width=32) | st.sampled_from([-np.inf, 0.0])
)


@pytest.fixture(scope="module", params=["plain", "compiled"])
def walks(request) -> Walks:
    if request.param == "plain":
        return Plain()
    if not FILE.exists():
        assert shutil.which("c++") is None, "there is a compiler, so the library should have been built"
        pytest.skip("no C++ compiler built the library")
    return Compiled()


def blocks(row: np.ndarray) -> list[np.ndarray]:
    return [row[start : start + BLOCK] for start in range(0, len(row), BLOCK)]


@given(ROWS)
def test_maxima_are_the_largest_of_each_block(walks, row):
    assert walks.maxima(row).tolist() == [block.max() for block in blocks(row)]


@given(ROWS, st.floats(0.0625, 5, width=32))
def test_exponentials_are_right_to_the_rounding_of_their_argument(walks, row, divisor):
    row[0] = max(row[0], -60)
    shift = row.max()
    weights = np.full_like(row, np.nan)
    sums = walks.exponentials(row, float(shift), divisor, weights)
    apart = (row - shift).astype(np.float64) / divisor
    exact = np.exp(apart)
    bound = exact * (5e-7 - 2e-7 * np.maximum(apart, -100)) + 2e-38
    assert (abs(weights - exact) <= bound).all()
    # Beside the errors of the numbers, the roundings of a sum of 256 that is kept in eight parts: 31 additions and 3.
    roundings = 34 * 2.0**-24
    bounds = [error.sum() + roundings * block.sum() for error, block in zip(blocks(bound), blocks(exact), strict=True)]
    assert (abs(sums - [block.sum() for block in blocks(exact)]) <= bounds).all()
    assert weights[np.argmax(row)] == 1
    assert (weights[np.isneginf(row)] == 0).all()


def test_exponentials_can_be_written_over_the_row(walks):
    row = np.linspace(-20, 0, 700, dtype=np.float32)
    apart = np.empty_like(row)
    sums = walks.exponentials(row, 0.0, 0.7, apart)
    assert (walks.exponentials(row, 0.0, 0.7, row) == sums).all()
    assert (row == apart).all()


@given(ROWS, st.data())
def test_edits_are_as_if_they_stood_in_the_row(walks, row, data):
    ids = np.array(sorted(data.draw(st.sets(st.integers(0, len(row) - 1), max_size=9))), np.int64)
    values = np.array(
        data.draw(st.lists(st.floats(-60, 60, width=32), min_size=len(ids), max_size=len(ids))), np.float32
    )
    edited, as_it_was = row.copy(), row.copy()
    edited[ids] = values
    wanted, found = np.empty_like(row), np.empty_like(row)
    sums = walks.exponentials(edited, 60.0, 1.5, wanted)
    assert (walks.exponentials(row, 60.0, 1.5, found, (ids, values)) == sums).all()
    assert (found == wanted).all()
    assert (row == as_it_was).all()


def test_sums_can_be_had_alone(walks):
    row = np.linspace(-20, 0, 700, dtype=np.float32)
    assert (walks.exponentials(row, 0.0, 0.7, None) == walks.exponentials(row, 0.0, 0.7, row)).all()


@given(ROWS, st.data())
def test_what_is_kept_is_larger_or_as_large_and_before(walks, row, data):
    weights = np.exp(np.minimum(row, 0))
    place = data.draw(st.integers(0, len(row)))
    least = data.draw(st.sampled_from(weights.tolist()) | st.floats(0, 1, width=32))
    kept = np.full_like(weights, np.nan)
    sums = walks.keep(weights, place, least, kept)
    stays = (weights > np.float32(least)) | ((weights == np.float32(least)) & (np.arange(len(weights)) < place))
    assert (kept == np.where(stays, weights, 0)).all()
    np.testing.assert_allclose(sums, [block.astype(np.float64).sum() for block in blocks(kept)], rtol=1e-5)
    assert (walks.keep(weights, place, least, None) == sums).all()


@given(ROWS, st.data())
def test_above_counts_what_is_larger(walks, row, data):
    value = data.draw(st.sampled_from(row.tolist()))
    assert walks.above(row, value) == (row > np.float32(value)).sum()


def test_a_block_has_the_same_sum_in_any_row(walks):
    """So a token's bits do not depend on how long the row is."""
    row = np.random.default_rng(0).normal(0, 3, 5 * BLOCK).astype(np.float32)
    whole = walks.exponentials(row, 9.0, 1.0, np.empty_like(row))
    part = row[2 * BLOCK : 4 * BLOCK].copy()
    assert (walks.exponentials(part, 9.0, 1.0, np.empty_like(part)) == whole[2:4]).all()


def test_threads_change_nothing(walks):
    if isinstance(walks, Plain):
        return
    row = np.random.default_rng(0).normal(0, 3, 100_001).astype(np.float32)
    results = []
    for threads in (1, 3):
        several, weights, kept = Compiled(threads), np.empty_like(row), np.empty_like(row)
        sums = several.exponentials(row, 20.0, 0.7, weights)
        rest = several.keep(weights, 40_000, 1e-9, kept)
        results.append([several.maxima(row), weights, sums, kept, rest])
    assert all((one == three).all() for one, three in zip(*results, strict=True))


def test_a_row_that_is_not_of_numbers_breaks_nothing(walks):
    row = np.full(300, np.nan, np.float32)
    with np.errstate(invalid="ignore"):
        walks.maxima(row)
        walks.exponentials(row, float("nan"), 1.0, row)
        walks.keep(row, 3, 0.5, row)
        assert walks.above(row, 0.0) == 0
