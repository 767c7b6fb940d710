"""A histogram for metrics. It does not depend on the metric or on the export format."""

from __future__ import annotations

from bisect import bisect_left


class Histogram:
    """Counts values in buckets with the upper bounds `bounds`, and sums them. One thread adds values without a lock."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # the last bucket is for values above all bounds
        self.sum = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """Add a value, `times` times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times
