"""The numpy implementation of `SamplerKernel`, for machines without a compiler. sampler_kernel.cpp computes the same.

The vocabulary is never sorted. The largest logits are searched in the blocks with the largest maxima. The nucleus of
top_p is never built: a token is sampled, and then tested for membership (`_sample_nucleus`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from afterword.engine.core.forward_batch import Logits
from afterword.engine.core.sampler_kernel import (
    BLOCK,
    GREEDY_BELOW,
    Ids,
    LogitsRow,
    Numbers,
    RowQuery,
    RowResult,
    SampleQuery,
    cached_distinct,
)

WeightArray = LogitsRow
"""Exponentials of a logits row, scaled so that the largest is 1. Shape: (vocabulary,).

float32 is exact to 1 in 10^6. Tokens with a weight below 10^-37 are never sampled."""
SumArray = NDArray[np.float64]
"""The sum of the weights of each block. Sums inside a block are float32, which is as exact as the weights are."""

_FIRST_SORTED = 256  # weights of a nucleus that are sorted first; more only if these do not suffice
_BELOW_ONE = 1.0 - 2.0**-53
_ALL = 2**64 - 1


class NumpyKernel:
    """See `SamplerKernel`."""

    @np.errstate(over="ignore", invalid="ignore")  # logits that are not finite also result in a token
    def read(self, rows: Logits, queries: Sequence[RowQuery]) -> list[RowResult]:
        """See `SamplerKernel`."""
        return [_read(row, query) for row, query in zip(rows, queries, strict=True)]

    @np.errstate(over="ignore", invalid="ignore")
    def most_likely(self, row: LogitsRow, count: int) -> tuple[Ids, Numbers]:
        """See `SamplerKernel`."""
        ids = top_ids(row, count)
        return ids, row[ids].astype(np.float64) - _log_total(row)


def adjusted_row(row: LogitsRow, query: SampleQuery) -> LogitsRow:
    """A copy of the row with bias, repetition, frequency and presence penalties and bans applied, in this order."""
    row, sampling = row.copy(), query.sampling
    for token, bias in sampling.logit_bias:
        row[token] += np.float32(bias)
    if sampling.repetition_penalty != 1.0:
        ids = np.union1d(cached_distinct(query.prompt), query.generated.ids)
        factor = np.float32(sampling.repetition_penalty)
        row[ids] = np.where(row[ids] > 0, row[ids] / factor, row[ids] * factor)
    penalties = query.generated.counts * sampling.frequency_penalty + sampling.presence_penalty
    row[query.generated.ids] -= penalties.astype(np.float32)
    row[list(query.banned)] = -np.inf
    if query.mask is not None:
        row[~unpacked(query.mask, len(row))] = -np.inf
    return row


@np.errstate(over="ignore", invalid="ignore")
def processed_row(row: LogitsRow, query: SampleQuery, drawn: Sequence[int]) -> LogitsRow:
    """The logits of the distribution that `query` draws from; -inf for tokens that it leaves out.

    Greedy queries have no temperature and no filters. `drawn`: the tokens that were drawn. They are never left out,
    whatever the rounding of the sum for `top_p`.
    """
    row, sampling = adjusted_row(row, query), query.sampling
    if sampling.temperature < GREEDY_BELOW:
        return row
    weights = _weights(row, sampling.temperature)
    weights[weights < np.float32(sampling.min_p)] = 0
    kept = weights > 0
    if sampling.top_k or sampling.top_p < 1:
        outside = np.ones(len(row), bool)
        outside[_nucleus(weights, sampling.top_k or len(weights), sampling.top_p)] = False
        kept &= ~outside
    kept[list(drawn)] = True
    processed: LogitsRow = np.where(kept, row / np.float32(sampling.temperature), np.float32(-np.inf))
    return processed


def _nucleus(weights: WeightArray, top_k: int, top_p: float) -> Ids:
    """The ids of the `top_k` largest weights, or the fewest of them that have `top_p` of their sum, in any order."""
    most = min(top_k, len(weights))
    least = np.partition(weights, -most)[-most]
    above = np.flatnonzero(weights > least)
    equal = np.flatnonzero(weights == least)[: most - len(above)]
    if top_p >= 1:
        return np.concatenate((above, equal))
    wanted = top_p * (float(weights[above].sum(dtype=np.float64)) + float(least) * len(equal))
    count = _FIRST_SORTED
    while True:
        ids = top_ids(weights, min(count, most))
        reached = np.cumsum(weights[ids], dtype=np.float64)
        if not len(ids) or reached[-1] > wanted or len(ids) == most:  # no id is the largest of numbers that are NaN
            return ids[: int(np.searchsorted(reached, wanted)) + 1]
        count *= 8


def unpacked(mask: NDArray[np.uint32] | NDArray[np.uint8], count: int) -> NDArray[np.bool_]:
    """The first `count` bits of a mask, the lowest bit of each byte first."""
    return np.unpackbits(mask.view(np.uint8), count=count, bitorder="little").astype(bool)


def top_ids(row: LogitsRow, count: int) -> Ids:
    """The ids of the `count` largest logits, largest first. Ties go to the lower id."""
    maxima = np.maximum.reduceat(row, np.arange(0, len(row), BLOCK))
    if count < len(maxima):
        # At least `count` logits are >= the count-th largest block maximum. Only blocks with such a maximum have any.
        least = np.partition(maxima, -count)[-count]
        blocks = np.flatnonzero(maxima >= least)
        ids = (blocks[:, None] * BLOCK + np.arange(BLOCK)).ravel()
        ids = ids[: np.searchsorted(ids, len(row))]
        ids = ids[row[ids] >= least]
    elif count < len(row):
        ids = np.flatnonzero(row >= np.partition(row, -count)[-count])
    else:
        ids = np.arange(len(row))
    return ids[np.argsort(-row[ids], kind="stable")][:count]


def random_number(seed: int, n: int) -> float:
    """The n-th random number in [0, 1) of a seed: number 0 is the seed itself, the others are those of SplitMix64."""
    if n:
        seed = (seed + n * 0x9E3779B97F4A7C15) & _ALL
        seed = ((seed ^ seed >> 30) * 0xBF58476D1CE4E5B9) & _ALL
        seed = ((seed ^ seed >> 27) * 0x94D049BB133111EB) & _ALL
        seed ^= seed >> 31
    return float(seed >> 11) * 2.0**-53


def _read(row: LogitsRow, query: RowQuery) -> RowResult:
    total = _log_total(row) if query.reported else 0.0
    sampled = _sample_ids(adjusted_row(row, query.sample_query), query.sample_query) if query.sample_query else []
    top = top_ids(row, query.top).tolist() if query.top else []
    pairs = [tuple((token, float(row[token]) - total) for token in tokens) for tokens in (top, sampled)]
    asked = tuple(float(row[token]) - total for token in query.asked)
    if query.given is None:
        return RowResult(top=pairs[0], sampled=pairs[1], asked=asked)
    rank = 1 + int(np.count_nonzero(row > row[query.given]))
    return RowResult(pairs[0], float(row[query.given]) - total, rank, pairs[1], asked)


def _sample_ids(row: LogitsRow, query: SampleQuery) -> list[int]:
    sampling, seeds = query.sampling, query.seeds
    weights = _weights(row, sampling.temperature)
    weights[weights < np.float32(sampling.min_p)] = 0
    nucleus_weight = sampling.top_p * float(_block_sums(weights).sum())
    # The most likely token weighs 1, so it is the whole nucleus if that weighs at most 1. NaN: logits are not finite.
    if sampling.temperature < GREEDY_BELOW or not nucleus_weight > 1:
        return [int(np.argmax(row))] * len(seeds)
    if sampling.top_k:
        ids = top_ids(weights, sampling.top_k)
        cumulated = np.cumsum(weights[ids], dtype=np.float64)
        size = int(np.searchsorted(cumulated, sampling.top_p * float(cumulated[-1]))) + 1
        return [int(ids[pick(weights[ids[:size]], random_number(seed, 0))[0]]) for seed in seeds]
    if sampling.top_p >= 1:
        sums = _block_sums(weights)
        return [_pick_by_blocks(weights, sums, random_number(seed, 0)) for seed in seeds]
    return [_sample_nucleus(weights, nucleus_weight, seed) for seed in seeds]


def _sample_nucleus(weights: WeightArray, nucleus_weight: float, seed: int) -> int:
    """Draw a token of the nucleus: the fewest most likely tokens with a total weight of at least `nucleus_weight`.

    Ties go to the lower id. A token is in the nucleus if and only if the tokens before it weigh less than
    `nucleus_weight`. So a token is drawn from all tokens. If it is outside, everything after it is outside too, and
    the next draw is from the tokens before it. The result is distributed as if drawn from the nucleus alone. The mean
    number of draws is at most 1 + ln(1 / top_p).
    """
    for n in itertools.count():
        index = _pick_by_blocks(weights, _block_sums(weights), random_number(seed, n))
        weights = np.where(_order_before(weights, index), weights, np.float32(0))
        if _block_sums(weights).sum() < nucleus_weight:
            break
    return index


def _order_before(weights: WeightArray, index: int) -> NDArray[np.bool_]:
    """A mask of the tokens that come before `index`: those of larger weight, or of equal weight and lower id."""
    before: NDArray[np.bool_] = weights > weights[index]
    before[:index] |= weights[:index] == weights[index]
    return before


def _weights(row: LogitsRow, temperature: float) -> WeightArray:
    # Subtract before the division: the quotient of a large logit and a small temperature has few fractional digits.
    lowered = row - row.max()
    weights: WeightArray = np.exp(lowered / np.float32(max(temperature, GREEDY_BELOW)))
    return weights


def _log_total(row: LogitsRow) -> float:
    total = float(_block_sums(_weights(row, 1.0)).sum())
    return float(row.max()) + math.log(total) if total > 0 else math.nan


def _block_sums(weights: WeightArray) -> SumArray:
    whole = len(weights) // BLOCK * BLOCK
    sums = np.einsum("ij->i", weights[:whole].reshape(-1, BLOCK))  # half the time of `sum` or `add.reduceat`
    rest = weights[whole:]
    return (np.append(sums, rest.sum()) if len(rest) else sums).astype(np.float64)


def pick(weights: NDArray[np.floating], uniform: float) -> tuple[int, float]:
    """Draw an index in proportion to the weights. Also returns the rest of `uniform`, again uniform in [0, 1)."""
    cumulated = np.cumsum(weights, dtype=np.float64)
    target = uniform * float(cumulated[-1])
    index = int(np.searchsorted(cumulated, min(target, np.nextafter(cumulated[-1], 0)), side="right"))
    before = float(cumulated[index - 1]) if index else 0.0
    return index, min((target - before) / float(weights[index]), _BELOW_ONE)


def _pick_by_blocks(weights: WeightArray, sums: SumArray, uniform: float) -> int:
    """Draw an id in proportion to the weights: first its block, then the id in the block."""
    block, rest = pick(sums, uniform)
    start = block * BLOCK
    return start + pick(weights[start : start + BLOCK], rest)[0]
