"""The highest numbers and the fewest with a share, compared with sorting everything, also where many are equal."""

from __future__ import annotations

import numpy as np
import pytest

from afterword.engine.core.highest import fewest, highest

ROWS = {
    "different": np.random.default_rng(1).normal(0, 3, 30_001),
    "many equal": np.random.default_rng(2).integers(0, 9, 30_000).astype(float),
    "all equal": np.zeros(10_000),
    "few": np.random.default_rng(3).normal(0, 3, 70),
    "one": np.zeros(1),
    "mostly minus infinity": np.where(np.arange(5_000) % 37 == 5, np.arange(5_000.0) % 11, -np.inf),
    "one is finite": np.where(np.arange(640) == 600, 1.0, -np.inf),
    "63": np.random.default_rng(4).integers(0, 9, 63).astype(float),
    "64": np.random.default_rng(5).integers(0, 9, 64).astype(float),
    "65": np.random.default_rng(6).integers(0, 9, 65).astype(float),
    "highest at the end": np.arange(5_000.0),
}


@pytest.mark.parametrize("count", [1, 2, 40, 63, 64, 65, 256, 470, 20_000])
@pytest.mark.parametrize("name", ROWS)
def test_the_highest_are_those_of_a_stable_sort(name: str, count: int) -> None:
    numbers = ROWS[name]
    found = highest(numbers, count)
    assert len(found) >= min(count, len(numbers))
    assert found.tolist() == np.argsort(-numbers, kind="stable")[: len(found)].tolist()


@pytest.mark.parametrize("wanted", [0.0, 0.05, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("name", ROWS)
def test_the_fewest_have_the_wanted_share(name: str, wanted: float) -> None:
    numbers = ROWS[name]
    weights = np.exp(numbers - numbers.max())
    order = np.argsort(-numbers, kind="stable")
    reached = np.cumsum(weights[order] / weights.sum())
    at_least, more = (int(np.searchsorted(reached, wanted, side)) + 1 for side in ("left", "right"))
    assert fewest(numbers, weights, wanted, "left").tolist() == order[:at_least].tolist()
    assert fewest(numbers, weights, wanted, "right").tolist() == order[:more].tolist()
    assert fewest(numbers, weights, wanted, "left", 12).tolist() == order[: max(at_least, 12)].tolist()
