"""All tokens of a row of logits for a sampler chain, without an array of them. Pure.

`WholeRow` has the methods of `Candidates`, and each returns the same, bit for bit. A method finds the few tokens that
may be kept (`core.row_scan`), and `Candidates` decides among them. Where a decision depends on a sum over the
vocabulary, another order of its additions would change its last bits. So such a decision is only made where an error of
`_ERROR` cannot change it. Otherwise, as for samplers without a method here, `WholeRow.all` makes the arrays.
"""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np

from afterword.engine.core.candidates import MARGIN, Candidates, Change, all_ids, targets
from afterword.engine.core.highest import fewest_of_part
from afterword.engine.core.row_scan import RowScan
from afterword.engine.core.sampler_kernel import BLOCK, Ids, Numbers

_ERROR = 1e-9
"""More than the errors of all shares, entropies and deviations here and in `Candidates`.

The longest running sum there has as many additions as tokens: 3 x 10^-11 for 262,144 tokens. The others have fewer.
"""
_DEPTHS = (3.0, 6.0, 12.0)
"""How far below the largest logit tokens are searched that may belong to a nucleus, divided by the temperature."""
_MOST_BITS = 900.0  # of surprise; probabilities with more are rounded to few bits, or to 0
_NO_IDS, _NO_NUMBERS = np.zeros(0, np.int64), np.zeros(0, np.float64)


class WholeRow:
    """The tokens of a row whose logits are above minus infinity.

    `unchanged`: the scan of the row. `ids`: distinct, ascending; those that have other logits, which are `logits`.
    `temperature`: by which all are to be divided, as in `Candidates.tempered`; None: they are not.
    """

    def __init__(
        self,
        unchanged: RowScan,
        ids: Ids = _NO_IDS,
        logits: Numbers = _NO_NUMBERS,
        temperature: float | None = None,
    ) -> None:
        self._unchanged, self._row, self._ids, self._logits = unchanged, unchanged.row, ids, logits
        self._temperature, self._scale = temperature, temperature or 1.0

    # ---- samplers that are computed for any number of tokens

    def changed(self, ids: Ids, change: Change) -> WholeRow | Candidates:
        """See `Candidates.changed`."""
        if self._temperature is not None:
            return self.all().changed(ids, change)
        found = (ids >= 0) & (ids < len(self._row))
        known = ids[found]
        return self.replaced(known, change(self._current(known), found))

    def replaced(self, ids: Ids, logits: Numbers) -> WholeRow:
        """Replace the logits of these ids, which are distinct; of minus infinity, to remove tokens."""
        if len(self._ids):
            kept = ~np.isin(self._ids, ids)
            ids, logits = np.concatenate((self._ids[kept], ids)), np.concatenate((self._logits[kept], logits))
        order = np.argsort(ids, kind="stable")
        return WholeRow(self._unchanged, ids[order], logits[order])

    def tempered(self, temperature: float) -> WholeRow | Candidates:
        """See `Candidates.tempered`."""
        if self._temperature is not None:
            return self.all().tempered(temperature)
        return WholeRow(self._unchanged, self._ids, self._logits, temperature)

    def without_top(self, threshold: float, least: int = 0) -> WholeRow | Candidates:
        """See `Candidates.without_top`."""
        if self._temperature is not None or least > 1 or threshold * self._total < _ERROR:
            return self.all().without_top(threshold, least)
        found = self._near(-math.log(threshold * self._total))
        p = found.weights / self._total
        likely = np.flatnonzero(p >= threshold)
        if _is_near(p, threshold).any():
            return self.all().without_top(threshold, least)
        if len(likely) < 2:
            return self
        logits = found.logits[likely]
        lowest = logits[p[likely] <= p[likely].min() * (1 + _ERROR)]
        if lowest.min() < lowest.max():
            return self.all().without_top(threshold, least)
        removed = np.delete(found.ids[likely], np.flatnonzero(logits == lowest[0])[-1])
        return self.replaced(removed, np.full(len(removed), -math.inf))

    def drawn(self, numbers: Numbers) -> list[int]:
        """See `Candidates.drawn`."""
        weights = self._block_weights.copy()
        np.add.at(weights, self._ids // BLOCK, self._changed_weights)
        cumulated = np.cumsum(weights)
        drawn = [self._find(target, cumulated) for target in targets(numbers, cumulated[-1])]
        return drawn if None not in drawn else self.all().drawn(numbers)  # type: ignore[return-value]  # no None

    def _find(self, target: float, cumulated: Numbers) -> int | None:
        """The id at which the cumulated weights exceed `target`; None where it is not certain."""
        block = int(np.searchsorted(cumulated, target, "right"))
        ids = np.arange(block * BLOCK, min((block + 1) * BLOCK, len(self._row)))
        weights = np.exp((self._current(ids) - self.largest) / self._scale)
        reached = np.cumsum(weights) + (cumulated[block - 1] if block else 0.0)
        place, error = int(np.searchsorted(reached, target, "right")), _ERROR * cumulated[-1]
        before = reached[place - 1] if place else reached[0] - weights[0]
        if place == len(ids) or reached[place] - target <= error or (target - before <= error and (block or place)):
            return None
        return int(ids[place])

    # ---- samplers that keep few tokens

    def top(self, count: int) -> Candidates:
        """See `Candidates.top`."""
        if count > len(self._scan.largest):
            return self.all().top(count)
        # At least `count` logits reach the count-th of the largest logits of blocks.
        return self._above(float(np.partition(self._scan.largest, -count)[-count])).top(count)

    def heavy(self, fraction: float, least: int = 0) -> Candidates:
        """See `Candidates.heavy`."""
        found = self._near(-math.log(fraction))
        return found.heavy(fraction, least) if len(found.ids) >= least else self.top(least)

    def nucleus(self, wanted: float, least: int = 0) -> Candidates:
        """See `Candidates.nucleus`."""
        for depth in _DEPTHS:
            found = self._near(depth)
            kept = fewest_of_part(found.logits, found.weights / self._total, wanted, _ERROR, least)
            if kept is not None:
                return found.keep(kept)
        return self.all().nucleus(wanted, least)

    def typical(self, wanted: float, least: int = 0) -> Candidates:
        """See `Candidates.typical`."""
        for depth in _DEPTHS if least <= 1 else ():
            found = self._near(depth)
            distance = np.abs(self._log_total - self._entropy - (found.logits - found.logits.max()))
            kept = fewest_of_part(-distance, found.weights / self._total, wanted, _ERROR)
            if kept is not None:
                last, farther = distance[kept[-1]], self._log_total - self._entropy + depth
                alike = found.logits[_is_near(distance, last)]  # tokens that rounding may order in another way
                if last < farther - _ERROR and alike.min() == alike.max():
                    return found.keep(kept)
        return self.all().typical(wanted, least)

    def within_sigma(self, sigmas: float) -> Candidates:
        """See `Candidates.within_sigma`."""
        count, total, _ = self._moments(self.largest)
        mean = self.largest + total / count
        count, total, squares = self._moments(mean)
        width = sigmas * math.sqrt(squares / count - (total / count) ** 2) / self._scale
        found = self._near(width)
        limit = found.logits.max() - width
        if (np.abs(found.logits - limit) <= _ERROR * (width + abs(self.largest) / self._scale)).any():
            return self.all().within_sigma(sigmas)
        return found.keep(found.logits >= limit)

    def expected(self, limit: float) -> Candidates:
        """See `Candidates.expected`."""
        if limit > _MOST_BITS:
            return self.all().expected(limit)
        found = self._near(limit * math.log(2) - self._log_total)
        surprise = (self._log_total - (found.logits - found.logits.max())) / math.log(2)
        kept = surprise <= limit
        if not kept.any() or _is_near(surprise, limit).any():
            return self.all().expected(limit)
        return found.keep(kept)

    # ---- the row

    def all(self) -> Candidates:
        """The same as arrays."""
        logits = self._row.astype(np.float64)
        logits[self._ids] = self._logits
        ids = all_ids(len(logits))
        if logits.min() == -math.inf:
            ids = np.flatnonzero(logits > -math.inf)
            logits = logits[ids]
        return self._divided(Candidates(ids, logits))

    @cached_property
    def largest(self) -> float:
        """The largest logit before the division by the temperature."""
        changed = float(self._logits.max()) if len(self._logits) else -math.inf
        return max(float(self._scan.largest.max()), changed)

    @cached_property
    def _scan(self) -> RowScan:
        return self._unchanged.without(self._ids) if len(self._ids) else self._unchanged

    def _current(self, ids: Ids) -> Numbers:
        """The logits of these ids, before the division."""
        logits = self._row[ids].astype(np.float64)
        if len(self._ids):
            places = np.minimum(np.searchsorted(self._ids, ids), len(self._ids) - 1)
            found = self._ids[places] == ids
            logits[found] = self._logits[places[found]]
        return logits

    def _divided(self, candidates: Candidates) -> Candidates:
        return candidates if self._temperature is None else candidates.tempered(self._temperature)

    def _near(self, depth: float) -> Candidates:
        """The tokens whose logits are at most `depth` below the largest, and maybe few others; at least that one."""
        limit = self.largest - (max(depth, 0.0) + 2 * MARGIN) * self._scale
        return self._above(float(np.nextafter(np.float32(limit), np.float32(-math.inf))))

    def _above(self, limit: float) -> Candidates:
        """The tokens whose logits, before the division, are at least `limit`. It must not exceed the largest."""
        ids = self._scan.above(limit)
        logits = self._row[ids].astype(np.float64)
        kept = np.flatnonzero((self._logits >= limit) & (self._logits > -math.inf))
        if len(kept):
            ids, logits = np.concatenate((ids, self._ids[kept])), np.concatenate((logits, self._logits[kept]))
            order = np.argsort(ids, kind="stable")
            ids, logits = ids[order], logits[order]
        return self._divided(Candidates(ids, logits))

    def _moments(self, around: float) -> Numbers:
        """See `RowScan.moments`, with the changed logits."""
        changed = self._logits[self._logits > -math.inf] - around
        moments: Numbers = self._scan.moments(around) + np.array([len(changed), changed.sum(), (changed**2).sum()])
        return moments

    @cached_property
    def _sums(self) -> tuple[Numbers, float]:
        return self._scan.weights(self.largest, 1 / self._scale)

    @property
    def _block_weights(self) -> Numbers:
        return self._sums[0]

    @cached_property
    def _changed_weights(self) -> Numbers:
        weights: Numbers = np.exp((self._logits - self.largest) / self._scale)
        return weights

    @cached_property
    def _total(self) -> float:
        """The sum of the weights of all tokens. The largest is 1."""
        return float(self._block_weights.sum() + self._changed_weights.sum())

    @property
    def _log_total(self) -> float:
        return math.log(self._total)

    @property
    def _entropy(self) -> float:
        """The entropy of the probabilities, in nats."""
        weights = self._changed_weights
        positive = weights[weights > 0]
        products = self._sums[1] + float((positive * np.log(positive)).sum())
        return self._log_total - products / self._total


def _is_near(numbers: Numbers, number: float) -> np.ndarray:
    return np.abs(numbers - number) <= _ERROR
