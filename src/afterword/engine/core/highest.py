"""The highest of many numbers, and the fewest of the highest that have a share of a sum. Not all of them are sorted."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from afterword.engine.core.sampler_kernel import Ids, Numbers

_GROUP = 64  # numbers of which the highest is compared first
_FIRST_SORTED = 256  # numbers that are sorted first; more only if these do not suffice


def highest(numbers: Numbers, count: int) -> Ids:
    """The indexes of the highest numbers in descending order: at least `count`, if there are as many.

    Of equal numbers the one with the lower index comes first. No number may be NaN; minus infinity is a number too.
    """
    if count >= len(numbers):
        return np.argsort(-numbers, kind="stable")
    found = np.flatnonzero(numbers >= _limit(numbers, count))
    found = found[numbers[found] >= np.partition(numbers[found], -count)[-count]]
    order: Ids = found[np.argsort(-numbers[found], kind="stable")]
    return order


def _limit(numbers: Numbers, count: int) -> float:
    """A limit that at least `count` numbers reach, and few more: the `count`-th of the highest numbers of groups."""
    groups = len(numbers) // _GROUP
    if count > groups:
        return -math.inf
    maxima = numbers[: groups * _GROUP].reshape(_GROUP, groups).max(axis=0)
    return float(np.partition(maxima, -count)[-count])


def fewest(numbers: Numbers, weights: Numbers, wanted: float, side: Literal["left", "right"], least: int = 0) -> Ids:
    """The indexes of the highest numbers, as few as have at least (left) or more than (right) `wanted` of all weights.

    At least `least`, if there are as many.
    """
    count, total = max(_FIRST_SORTED, least), weights.sum()
    while True:
        order = highest(numbers, count)
        reached = np.cumsum(weights[order] / total)
        if reached[-1] > wanted or len(order) == len(numbers):
            return order[: max(int(np.searchsorted(reached, wanted, side)) + 1, least)]
        count *= 8


def fewest_of_part(numbers: Numbers, shares: Numbers, wanted: float, error: float, least: int = 0) -> Ids | None:
    """As `fewest` of numbers of which only the highest are given. None if the result is not certain.

    `shares`: of the weight of all numbers. `error`: how far their sums may be from those that `fewest` computes.
    """
    count = max(_FIRST_SORTED, least)
    while True:
        order = highest(numbers, count)
        reached = np.cumsum(shares[order])
        if reached[-1] > wanted + error:
            break
        if len(order) == len(numbers):
            return None
        count *= 8
    size = int(np.searchsorted(reached, wanted + error, "right"))
    is_certain = len(order) >= least and not (size and reached[size - 1] >= wanted - error)
    return order[: max(size + 1, least)] if is_certain else None
