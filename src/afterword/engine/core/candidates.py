"""The tokens that a sampler chain may still draw, with their logits, and what samplers compute from them. Pure.

`core.whole_row.WholeRow` has the same methods for all tokens of a row, of which most samplers keep few.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import msgspec
import numpy as np
from numpy.typing import NDArray

from afterword.engine.core.highest import fewest, highest
from afterword.engine.core.sampler_kernel import Ids, Numbers

Change = Callable[[Numbers, NDArray[np.bool_]], Numbers]
"""Changes logits. Its arguments are the logits of those among some ids that are candidates, and a mask of these ids."""

MARGIN = 1e-3
"""Between two logits: far more than their rounding."""


class Candidates(msgspec.Struct, frozen=True):
    """The tokens that may be drawn, in ascending order of their ids, with their logits. There is at least one."""

    ids: Ids
    logits: Numbers

    def keep(self, kept: NDArray[np.bool_] | Ids) -> Candidates:
        """The candidates of a mask or at indexes. At least one must be kept."""
        indexes = np.flatnonzero(kept) if kept.dtype == bool else np.sort(kept)
        return Candidates(self.ids[indexes], self.logits[indexes])

    def all(self) -> Candidates:
        """The candidates as arrays."""
        return self

    def changed(self, ids: Ids, change: Change) -> Candidates:
        """Change the logits of the candidates among `ids`, which are distinct."""
        places = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        found = self.ids[places] == ids
        logits = self.logits.copy()
        logits[places[found]] = change(logits[places[found]], found)
        return Candidates(self.ids, logits)

    def tempered(self, temperature: float) -> Candidates:
        """Divide the logits by the temperature. The largest becomes 0."""
        return Candidates(self.ids, (self.logits - self.logits.max()) / temperature)

    def top(self, count: int) -> Candidates:
        """Keep the `count` largest logits. Ties go to the lower id."""
        return self.keep(highest(self.logits, count)[:count])

    def heavy(self, fraction: float, least: int = 0) -> Candidates:
        """Keep tokens with at least this fraction of the highest probability, and at least `least` tokens.

        Few exponentials of others are computed.
        """
        largest = self.logits.max()
        near = np.flatnonzero(self.logits >= largest + math.log(fraction) - MARGIN)
        kept = near[np.exp(self.logits[near] - largest) >= fraction]
        return self.top(least) if len(kept) < least else self.keep(kept)

    def nucleus(self, wanted: float, least: int = 0) -> Candidates:
        """Keep the fewest most likely tokens with a probability of at least `wanted`, and at least `least` tokens."""
        return self.keep(fewest(self.logits, self.weights, wanted, "left", least))

    def typical(self, wanted: float, least: int = 0) -> Candidates:
        """Keep the fewest tokens with a probability of more than `wanted`, those nearest to the entropy first.

        The distance of a token is that of its negative log probability. Ties go to the lower id.
        """
        candidates = self.keep(self.probabilities > 0)
        weights = candidates.weights
        p = weights / weights.sum()
        distance = np.abs(-np.log(p) - entropy(p))
        return candidates.keep(fewest(-distance, weights, wanted, "right", least))

    def within_sigma(self, sigmas: float) -> Candidates:
        """Keep the logits within `sigmas` standard deviations of the largest."""
        return self.keep(self.logits >= self.logits.max() - sigmas * self.logits.std())

    def without_top(self, threshold: float, least: int = 0) -> Candidates:
        """Remove the tokens of at least this probability but the least likely of them, if `least` tokens remain."""
        p = self.probabilities
        likely = np.flatnonzero(p >= threshold)
        if len(likely) < 2 or len(p) - len(likely) + 1 < least:
            return self
        kept = np.ones(len(p), bool)
        kept[likely] = False
        kept[likely[len(likely) - 1 - int(np.argmin(p[likely][::-1]))]] = True  # of equal ones the last is kept
        return self.keep(kept)

    def expected(self, limit: float) -> Candidates:
        """Keep the tokens whose surprise, in bits, is at most the limit; at least the most likely one."""
        p = self.probabilities
        kept = -np.log2(p) <= limit
        return self.keep(kept if kept.any() else np.array([np.argmax(p)]))

    def drawn(self, numbers: Numbers) -> list[int]:
        """Draw an id with each of these random numbers from 0 to 1."""
        cumulated = np.cumsum(self.weights)
        drawn: list[int] = self.ids[np.searchsorted(cumulated, targets(numbers, cumulated[-1]), side="right")].tolist()
        return drawn

    @property
    def weights(self) -> Numbers:
        """Exponentials of the logits. The largest is 1."""
        weights: Numbers = np.exp(self.logits - self.logits.max())
        return weights

    @property
    def probabilities(self) -> Numbers:
        weights = self.weights
        probabilities: Numbers = weights / weights.sum()
        return probabilities


@lru_cache(4)
def all_ids(vocabulary: int) -> Ids:
    """The ids of a vocabulary. The result must not be changed."""
    ids = np.arange(vocabulary)
    ids.flags.writeable = False
    return ids


def targets(numbers: Numbers, total: np.float64) -> Numbers:
    """The shares of a sum of weights that random numbers stand for. Each is less than the sum."""
    found: Numbers = np.minimum(numbers * total, np.nextafter(total, 0))
    return found


def entropy(p: Numbers) -> float:
    """The entropy of probabilities, in nats."""
    positive = p[p > 0]
    return -float((positive * np.log(positive)).sum())
