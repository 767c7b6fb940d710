"""Samples tokens with samplers or an order of samplers that the sampler's kernel does not have.

The samplers are llama-server's, in numpy and float64, one function for each. `SamplerChain.order` has their order. A
request that needs none of them is sampled by the kernel. Pure, apart from what Mirostat and adaptive-p remember
(`ChainQuery.limits`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import msgspec
import numpy as np
from numpy.typing import NDArray

from afterword.engine.core.highest import fewest, highest
from afterword.engine.core.numpy_kernel import pick, random_number, unpacked
from afterword.engine.core.repetitions import Repetitions
from afterword.engine.core.sampler_kernel import (
    GREEDY_BELOW,
    Ids,
    LogitsRow,
    Numbers,
    SampleQuery,
    cached_distinct,
)
from afterword.engine.protocol import INFILL_MIN_P, Dry, SamplerChain

_MIROSTAT_TOKENS = 100  # most likely tokens from which Mirostat 1 estimates the distribution, as in llama.cpp
_LARGEST_EXPONENT = 88.7228391  # logarithm of the largest float32: llama.cpp limits DRY's powers by it
_ADAPTIVE_WIDTH, _ADAPTIVE_PEAK, _ADAPTIVE_SHARPNESS = 0.3, 5.0, 10.0  # constants of llama.cpp's adaptive-p
_MAX_CACHED = 256  # prompts, as in `sampler_kernel`
_MARGIN = 1e-3  # between two logits, far more than their rounding


class ChainQuery(msgspec.Struct, frozen=True):
    """Sample one id for each seed of `sample`.

    `repetitions`: those of the text before the token, for DRY. `limits`: for each seed, Mirostat's limits (`mu`) or
    adaptive-p's mean probabilities before each token of the sample, by position, of which those up to `position` are
    known. The one after the drawn token is written behind them. So a token of a draft that was rejected leaves nothing
    behind: its limit is written again. `recent`: see `Sequence.recent`.
    """

    sample: SampleQuery
    position: int = 0
    repetitions: Repetitions | None = None
    limits: Sequence[list[float]] = ()
    recent: tuple[int, ...] = ()

    @property
    def chain(self) -> SamplerChain:
        chain = self.sample.sampling.chain
        assert chain is not None, "without a chain the kernel samples"
        return chain


def first_limit(chain: SamplerChain) -> float | None:
    """What Mirostat or adaptive-p remembers before the first token of a sample; None without them."""
    if chain.mirostat:
        return 2 * chain.mirostat_tau
    return chain.adaptive_target if chain.adaptive_target >= 0 else None


class Candidates(msgspec.Struct, frozen=True):
    """The tokens that may be drawn, in ascending order of their ids, with their logits. There is at least one."""

    ids: Ids
    logits: Numbers

    def keep(self, kept: NDArray[np.bool_] | Ids) -> Candidates:
        """The candidates of a mask or at indexes. At least one must be kept."""
        indexes = np.flatnonzero(kept) if kept.dtype == bool else np.sort(kept)
        return Candidates(self.ids[indexes], self.logits[indexes])

    def changed(self, ids: Ids, change: Callable[[Numbers, NDArray[np.bool_]], Numbers]) -> Candidates:
        """Change the logits of the candidates among `ids`. `change` gets these logits and a mask of those of `ids`."""
        places = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        found = self.ids[places] == ids
        logits = self.logits.copy()
        logits[places[found]] = change(logits[places[found]], found)
        return Candidates(self.ids, logits)

    def heavy(self, least: float) -> Ids:
        """The indexes of the candidates with at least this weight. Few exponentials of others are computed."""
        largest = self.logits.max()
        near = np.flatnonzero(self.logits >= largest + math.log(least) - _MARGIN)
        heavy: Ids = near[np.exp(self.logits[near] - largest) >= least]
        return heavy

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


@np.errstate(all="ignore")
def sample_chain(row: LogitsRow, query: ChainQuery) -> list[int]:
    """Sample an id for each seed from a row of logits. A row that is not finite also results in ids."""
    seeds = query.sample.seeds
    if not np.isfinite(row.max()):
        for limits in query.limits:
            limits[query.position + 1 :] = limits[query.position :][:1]
        return [int(np.argmax(row))] * len(seeds)
    order = query.chain.order
    shared = order.index("xtc") if "xtc" in order else len(order)
    candidates = _applied(order[:shared], _first_candidates(row, query), query)
    chosen = [0] * len(seeds)
    for indexes, excludes in _xtc_outcomes(query):
        kept = exclude_top_choices(candidates, query.chain) if excludes else candidates
        kept = _applied(order[shared + 1 :], kept, query)
        for index, token in zip(indexes, _drawn(kept, query, indexes, len(row)), strict=True):
            chosen[index] = token
    return chosen


def _applied(names: Sequence[str], candidates: Candidates, query: ChainQuery) -> Candidates:
    for name in names:
        candidates = _SAMPLERS[name](candidates, query)
    return candidates


def _xtc_outcomes(query: ChainQuery) -> list[tuple[list[int], bool]]:
    """The indexes of the seeds for which XTC excludes tokens, and of the others. The seeds of a group share work."""
    chain, seeds = query.chain, query.sample.seeds
    everything = list(range(len(seeds)))
    if "xtc" not in chain.order or not chain.xtc_probability or chain.xtc_threshold > 0.5:
        return [(everything, False)]
    groups: dict[bool, list[int]] = {True: [], False: []}
    for index in everything:
        groups[random_number(seeds[index], 1) < chain.xtc_probability].append(index)  # number 0 draws the token
    return [(indexes, excludes) for excludes, indexes in groups.items() if indexes]


def _drawn(candidates: Candidates, query: ChainQuery, indexes: list[int], vocabulary: int) -> list[int]:
    """Draw a token for each of these seeds."""
    if query.chain.mirostat:
        return [_draw_mirostat(candidates, query, index, vocabulary) for index in indexes]
    if query.chain.adaptive_target >= 0:
        return [_draw_adaptive(candidates, query, index) for index in indexes]
    cumulated = np.cumsum(candidates.weights)
    numbers = np.array([random_number(query.sample.seeds[index], 0) for index in indexes])
    targets = np.minimum(numbers * cumulated[-1], np.nextafter(cumulated[-1], 0))  # less than the sum of all weights
    drawn: list[int] = candidates.ids[np.searchsorted(cumulated, targets, side="right")].tolist()
    return drawn


def _first_candidates(row: LogitsRow, query: ChainQuery) -> Candidates:
    """All tokens that may be sampled, after bias. Without any, those that a grammar allows, or the most likely one.

    A grammar that allows only logits of minus infinity refuses the most likely one, so the sample ends with an error.
    """
    logits = row.astype(np.float64)
    for token, bias in query.sample.sampling.logit_bias:
        logits[token] += bias
    if not query.chain.allowed and not query.sample.banned and query.sample.mask is None and row.min() > -math.inf:
        return Candidates(_all_ids(len(row)), logits)
    mask = logits > -math.inf
    if query.chain.allowed:
        mask &= unpacked(np.frombuffer(query.chain.allowed, np.uint8), len(row))
    banned = [token for token in query.sample.banned if mask[token]]
    mask[banned] = False
    if query.chain.allowed and banned and not mask.any():
        # Requests whose fields leave no token are refused, so a banned text has excluded the last ones. Drawing the
        # latest of them shows that none is left.
        mask[banned[-1]] = True
    if query.sample.mask is not None:
        fitting = unpacked(query.sample.mask, len(row))
        mask = mask & fitting if (mask & fitting).any() else fitting & (logits > -math.inf)
    ids = np.flatnonzero(mask) if mask.any() else np.array([np.argmax(row)])
    return Candidates(ids, logits[ids])


@lru_cache(4)
def _all_ids(vocabulary: int) -> Ids:
    ids = np.arange(vocabulary)
    ids.flags.writeable = False
    return ids


# ---- the samplers


def penalties(candidates: Candidates, query: ChainQuery) -> Candidates:
    """Repetition, frequency and presence penalties, as in the kernel, or with a window as in llama.cpp."""
    sampling, generated = query.sample.sampling, query.sample.generated
    if query.chain.last_n is not None:
        return _windowed_penalties(candidates, query)
    if (factor := sampling.repetition_penalty) != 1.0:
        seen = np.union1d(cached_distinct(query.sample.prompt), generated.ids)
        candidates = candidates.changed(seen, lambda x, _: np.where(x > 0, x / factor, x * factor))
    if not sampling.frequency_penalty and not sampling.presence_penalty:
        return candidates
    lowered = generated.counts * sampling.frequency_penalty + sampling.presence_penalty
    return candidates.changed(generated.ids, lambda x, found: x - lowered[found])


def _windowed_penalties(candidates: Candidates, query: ChainQuery) -> Candidates:
    sampling = query.sample.sampling
    ids, counts = _counts(query.recent) if query.recent else _all_counts(query)
    factor, lowered = sampling.repetition_penalty, counts * sampling.frequency_penalty + sampling.presence_penalty
    return candidates.changed(ids, lambda x, found: np.where(x > 0, x / factor, x * factor) - lowered[found])


def _counts(tokens: tuple[int, ...]) -> tuple[Ids, Ids]:
    """The distinct tokens in ascending order, and how often each occurs."""
    return np.unique(np.array(tokens, np.int64), return_counts=True)


_prompt_counts = lru_cache(_MAX_CACHED)(_counts)


def _all_counts(query: ChainQuery) -> tuple[Ids, Ids]:
    """The distinct tokens of prompt and sample, and how often each occurs."""
    prompt, generated = _prompt_counts(query.sample.prompt), query.sample.generated
    ids = np.union1d(prompt[0], generated.ids)
    counts = np.zeros(len(ids), np.int64)
    for some, times in (prompt, (generated.ids, generated.counts)):
        counts[np.searchsorted(ids, some)] += times
    return ids, counts


def dry(candidates: Candidates, query: ChainQuery) -> Candidates:
    """DRY: see `engine.protocol.Dry`."""
    settings = query.chain.dry
    if settings is None or query.repetitions is None:
        return candidates
    ids, lengths = query.repetitions.continuations()
    if not len(ids):
        return candidates
    penalty = settings.multiplier * settings.base ** _dry_exponents(settings, lengths)
    return candidates.changed(ids, lambda x, found: x - penalty[found])


def _dry_exponents(settings: Dry, lengths: Ids) -> Numbers:
    exponents = (lengths - settings.allowed_length).astype(np.float64)
    most = int(_LARGEST_EXPONENT / math.log(settings.base)) if settings.base > 1.000001 else 0
    return np.minimum(exponents, most) if most else exponents


def top_n_sigma(candidates: Candidates, query: ChainQuery) -> Candidates:
    """Keep the logits within `top_n_sigma` standard deviations of the largest."""
    if query.chain.top_n_sigma <= 0:
        return candidates
    logits = candidates.logits
    return candidates.keep(logits >= logits.max() - query.chain.top_n_sigma * logits.std())


def top_k(candidates: Candidates, query: ChainQuery) -> Candidates:
    """Keep the `top_k` largest logits. Ties go to the lower id."""
    count = query.sample.sampling.top_k
    return candidates.keep(highest(candidates.logits, count)[:count]) if count else candidates


def top_p(candidates: Candidates, query: ChainQuery) -> Candidates:
    """Keep the fewest most likely tokens with a probability of at least `top_p`. Ties go to the lower id."""
    wanted = query.sample.sampling.top_p
    if wanted >= 1:
        return candidates
    return candidates.keep(fewest(candidates.logits, candidates.weights, wanted, "left", query.chain.min_keep))


def typical(candidates: Candidates, query: ChainQuery) -> Candidates:
    """Keep the fewest tokens with a probability of more than `typical_p`, those nearest to the entropy first.

    The distance of a token is that of its negative log probability. Ties go to the lower id.
    """
    if query.chain.typical_p >= 1:
        return candidates
    candidates = candidates.keep(candidates.probabilities > 0)
    weights = candidates.weights
    p = weights / weights.sum()
    distance = np.abs(-np.log(p) - _entropy(p))
    return candidates.keep(fewest(-distance, weights, query.chain.typical_p, "right", query.chain.min_keep))


def min_p(candidates: Candidates, query: ChainQuery) -> Candidates:
    """Keep tokens with at least this fraction of the highest probability, and at least `min_keep`."""
    if not query.sample.sampling.min_p:
        return candidates
    kept, least = candidates.heavy(query.sample.sampling.min_p), query.chain.min_keep
    if len(kept) < least:
        return candidates.keep(highest(candidates.logits, least)[:least])
    return candidates.keep(kept)


def infill(candidates: Candidates, _: ChainQuery) -> Candidates:
    """`min_p` with `INFILL_MIN_P`, in place of llama.cpp's sampler `infill`."""
    return candidates.keep(candidates.heavy(INFILL_MIN_P))


def exclude_top_choices(candidates: Candidates, chain: SamplerChain) -> Candidates:
    """XTC, where it excludes: remove all tokens of at least `xtc_threshold` but the least likely of them."""
    p = candidates.probabilities
    likely = np.flatnonzero(p >= chain.xtc_threshold)
    if len(likely) < 2 or len(p) - len(likely) + 1 < chain.min_keep:
        return candidates
    kept = np.ones(len(p), bool)
    kept[likely] = False
    kept[likely[len(likely) - 1 - int(np.argmin(p[likely][::-1]))]] = True  # of equal ones the last is the least likely
    return candidates.keep(kept)


def temperature(candidates: Candidates, query: ChainQuery) -> Candidates:
    """Divide by the temperature. With `dynatemp_range` it depends on the entropy of the candidates."""
    chain, value = query.chain, query.sample.sampling.temperature
    if chain.dynatemp_range > 0 and not chain.mirostat:
        if len(candidates.ids) == 1:
            return candidates
        low, high = max(0.0, value - chain.dynatemp_range), value + chain.dynatemp_range
        share = _entropy(candidates.probabilities) / math.log(len(candidates.ids))
        value = low + (high - low) * share**chain.dynatemp_exponent
    if value < GREEDY_BELOW:
        return candidates.keep(np.array([np.argmax(candidates.logits)]))
    return Candidates(candidates.ids, (candidates.logits - candidates.logits.max()) / value)


_SAMPLERS: dict[str, Callable[[Candidates, ChainQuery], Candidates]] = {
    "penalties": penalties,
    "dry": dry,
    "top_n_sigma": top_n_sigma,
    "top_k": top_k,
    "typ_p": typical,
    "top_p": top_p,
    "min_p": min_p,
    "temperature": temperature,
    "infill": infill,
}


# ---- Mirostat and adaptive-p


def _draw_mirostat(candidates: Candidates, query: ChainQuery, index: int, vocabulary: int) -> int:
    """Draw a token, and write the limit for the next one."""
    chain, limits = query.chain, query.limits[index]
    limit = limits[query.position]
    kept = mirostat_1(candidates, limit, vocabulary) if chain.mirostat == 1 else mirostat_2(candidates, limit)
    p = kept.probabilities
    place = pick(p, random_number(query.sample.seeds[index], 0))[0]
    surprise = -math.log2(p[place])
    limits[query.position + 1 :] = [limit - chain.mirostat_eta * (surprise - chain.mirostat_tau)]
    return int(kept.ids[place])


def _draw_adaptive(candidates: Candidates, query: ChainQuery, index: int) -> int:
    """Draw a token near the target, and write the mean probability of the drawn tokens, the last ones weighted most.

    The probability at which the weights are highest lies as far on the other side of the target as the mean.
    """
    chain, means = query.chain, query.limits[index]
    mean = means[query.position]
    p = candidates.probabilities
    wanted = min(max(2 * chain.adaptive_target - mean, 0.0), 1.0)
    distance = np.abs(p - wanted) / _ADAPTIVE_WIDTH
    near = Candidates(candidates.ids, _ADAPTIVE_PEAK - _ADAPTIVE_SHARPNESS * distance**2 / (1 + distance))
    place = pick(near.probabilities, random_number(query.sample.seeds[index], 0))[0]
    drawn = float(p[place])
    means[query.position + 1 :] = [chain.adaptive_decay * mean + (1 - chain.adaptive_decay) * drawn]
    return int(candidates.ids[place])


def mirostat_1(candidates: Candidates, limit: float, vocabulary: int) -> Candidates:
    """Keep as many most likely tokens as the limit of surprise allows, under Zipf's law with an estimated exponent."""
    order = highest(candidates.logits, _MIROSTAT_TOKENS)[:_MIROSTAT_TOKENS]
    if len(order) < 2:
        return candidates
    logits = candidates.logits[order]
    places = np.arange(1, len(order), dtype=np.float64)
    gaps = np.log((places + 1) / places)
    exponent = float((gaps * (logits[:-1] - logits[1:])).sum() / (gaps * gaps).sum())
    excess = exponent - 1
    # for an exponent of 1 the quotient is that of its limit
    zeta = excess / -math.expm1(-excess * math.log(vocabulary)) if excess else 1 / math.log(vocabulary)
    count = np.float64(zeta * np.exp2(limit)) ** (1 / np.float64(exponent))
    most = len(candidates.ids)
    kept = max(int(min(count, most)), 1) if math.isfinite(count) else most
    return candidates.keep(highest(candidates.logits, kept)[:kept])


def mirostat_2(candidates: Candidates, limit: float) -> Candidates:
    """Keep the tokens whose surprise, in bits, is at most the limit; at least the most likely one."""
    p = candidates.probabilities
    kept = -np.log2(p) <= limit
    return candidates.keep(kept if kept.any() else np.array([np.argmax(p)]))


def _entropy(p: Numbers) -> float:
    """The entropy of probabilities, in nats."""
    positive = p[p > 0]
    return -float((positive * np.log(positive)).sum())
