"""Numbers sorted into buckets. Knows nothing of what they measure, nor who shows them."""

from __future__ import annotations

from bisect import bisect_left


class Histogram:
    """How many numbers were at most each of `bounds`, and their sum. One thread adds; adding takes no lock."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # the last are above all bounds
        self.sum = 0.0

    def add(self, value: float) -> None:
        """Count one number."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value
