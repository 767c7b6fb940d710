"""Samples tokens with samplers or an order of samplers that the sampler's kernel does not have.

The samplers are llama-server's, in numpy and float64, one function for each. `SamplerChain.order` has their order. A
request that needs none of them is sampled by the kernel. What samplers compute is in `core.candidates` and, for all
tokens of a row, in `core.whole_row`. Pure, apart from what Mirostat and adaptive-p remember
(`ChainQuery.limits`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import msgspec
import numpy as np
from numpy.typing import NDArray

from afterword.engine.core.candidates import Candidates, all_ids, entropy
from afterword.engine.core.highest import highest
from afterword.engine.core.numpy_kernel import pick, random_number, unpacked
from afterword.engine.core.repetitions import Repetitions
from afterword.engine.core.row_scan import RowScan, ScanKernel
from afterword.engine.core.sampler_kernel import (
    GREEDY_BELOW,
    Ids,
    LogitsRow,
    Numbers,
    SampleQuery,
    cached_distinct,
)
from afterword.engine.core.whole_row import WholeRow
from afterword.engine.protocol import INFILL_MIN_P, Dry, SamplerChain

_MIROSTAT_TOKENS = 100  # most likely tokens from which Mirostat 1 estimates the distribution, as in llama.cpp
_LARGEST_EXPONENT = 88.7228391  # logarithm of the largest float32: llama.cpp limits DRY's powers by it
_ADAPTIVE_WIDTH, _ADAPTIVE_PEAK, _ADAPTIVE_SHARPNESS = 0.3, 5.0, 10.0  # constants of llama.cpp's adaptive-p
_MAX_CACHED = 256  # prompts, as in `sampler_kernel`


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


Tokens = Candidates | WholeRow
"""All that may be drawn. Methods of the two have the same results."""


@np.errstate(all="ignore")
def sample_chain(row: LogitsRow, query: ChainQuery, kernel: ScanKernel | None = None) -> list[int]:
    """Sample an id for each seed from a row of logits. A row that is not finite also results in ids.

    `kernel` makes it faster and changes no result. It changes the row and restores it.
    """
    seeds = query.sample.seeds
    if not np.isfinite(row.max()):
        for limits in query.limits:
            limits[query.position + 1 :] = limits[query.position :][:1]
        return [int(np.argmax(row))] * len(seeds)
    order = query.chain.order
    shared = order.index("xtc") if "xtc" in order else len(order)
    tokens = _applied(order[:shared], _first_tokens(row, query, kernel), query)
    chosen = [0] * len(seeds)
    for indexes, excludes in _xtc_outcomes(query):
        kept = exclude_top_choices(tokens, query.chain) if excludes else tokens
        kept = _applied(order[shared + 1 :], kept, query)
        for index, token in zip(indexes, _drawn(kept, query, indexes, len(row)), strict=True):
            chosen[index] = token
    return chosen


def _applied(names: Sequence[str], tokens: Tokens, query: ChainQuery) -> Tokens:
    for name in names:
        tokens = _SAMPLERS[name](tokens, query)
    return tokens


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


def _drawn(tokens: Tokens, query: ChainQuery, indexes: list[int], vocabulary: int) -> list[int]:
    """Draw a token for each of these seeds."""
    if query.chain.mirostat:
        return [_draw_mirostat(tokens, query, index, vocabulary) for index in indexes]
    if query.chain.adaptive_target >= 0:
        return [_draw_adaptive(tokens.all(), query, index) for index in indexes]
    return tokens.drawn(np.array([random_number(query.sample.seeds[index], 0) for index in indexes]))


def _first_tokens(row: LogitsRow, query: ChainQuery, kernel: ScanKernel | None) -> Tokens:
    """As `_first_candidates`; with a kernel without arrays of all tokens, unless none of them may be sampled."""
    if kernel is None:
        return _first_candidates(row, query)
    fitting = row
    if query.chain.allowed:
        fitting = np.where(_allowed(query, len(row)), fitting, np.float32(-np.inf))
    if query.sample.mask is not None:
        fitting = np.where(unpacked(query.sample.mask, len(row)), fitting, np.float32(-np.inf))
    tokens = WholeRow(RowScan(kernel, fitting))
    if bias := query.sample.sampling.logit_bias:
        ids = np.array([token for token, _ in bias], np.int64)
        tokens = tokens.replaced(ids, fitting[ids].astype(np.float64) + [number for _, number in bias])
    if query.sample.banned:
        ids = cached_distinct(query.sample.banned)
        tokens = tokens.replaced(ids, np.full(len(ids), -math.inf))
    are_excluded = fitting is not row or query.sample.banned
    return _first_candidates(row, query) if are_excluded and tokens.largest == -math.inf else tokens


def _first_candidates(row: LogitsRow, query: ChainQuery) -> Candidates:
    """All tokens that may be sampled, after bias. Without any, those that a grammar allows, or the most likely one.

    A grammar that allows only logits of minus infinity refuses the most likely one, so the sample ends with an error.
    """
    logits = row.astype(np.float64)
    for token, bias in query.sample.sampling.logit_bias:
        logits[token] += bias
    if not query.chain.allowed and not query.sample.banned and query.sample.mask is None and row.min() > -math.inf:
        return Candidates(all_ids(len(row)), logits)
    mask = logits > -math.inf
    if query.chain.allowed:
        mask &= _allowed(query, len(row))
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


def _allowed(query: ChainQuery, vocabulary: int) -> NDArray[np.bool_]:
    """A mask of the tokens that the request allows."""
    return unpacked(np.frombuffer(query.chain.allowed, np.uint8), vocabulary)


# ---- the samplers


def penalties(tokens: Tokens, query: ChainQuery) -> Tokens:
    """Repetition, frequency and presence penalties, as in the kernel, or with a window as in llama.cpp."""
    sampling, generated = query.sample.sampling, query.sample.generated
    if query.chain.last_n is not None:
        return _windowed_penalties(tokens, query)
    if (factor := sampling.repetition_penalty) != 1.0:
        seen = np.union1d(cached_distinct(query.sample.prompt), generated.ids)
        tokens = tokens.changed(seen, lambda x, _: np.where(x > 0, x / factor, x * factor))
    if not sampling.frequency_penalty and not sampling.presence_penalty:
        return tokens
    lowered = generated.counts * sampling.frequency_penalty + sampling.presence_penalty
    return tokens.changed(generated.ids, lambda x, found: x - lowered[found])


def _windowed_penalties(tokens: Tokens, query: ChainQuery) -> Tokens:
    sampling = query.sample.sampling
    ids, counts = _counts(query.recent) if query.recent else _all_counts(query)
    factor, lowered = sampling.repetition_penalty, counts * sampling.frequency_penalty + sampling.presence_penalty
    return tokens.changed(ids, lambda x, found: np.where(x > 0, x / factor, x * factor) - lowered[found])


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


def dry(tokens: Tokens, query: ChainQuery) -> Tokens:
    """DRY: see `engine.protocol.Dry`."""
    settings = query.chain.dry
    if settings is None or query.repetitions is None:
        return tokens
    ids, lengths = query.repetitions.continuations()
    if not len(ids):
        return tokens
    penalty = settings.multiplier * settings.base ** _dry_exponents(settings, lengths)
    return tokens.changed(ids, lambda x, found: x - penalty[found])


def _dry_exponents(settings: Dry, lengths: Ids) -> Numbers:
    exponents = (lengths - settings.allowed_length).astype(np.float64)
    most = int(_LARGEST_EXPONENT / math.log(settings.base)) if settings.base > 1.000001 else 0
    return np.minimum(exponents, most) if most else exponents


def top_n_sigma(tokens: Tokens, query: ChainQuery) -> Tokens:
    """Keep the logits within `top_n_sigma` standard deviations of the largest."""
    sigmas = query.chain.top_n_sigma
    return tokens.within_sigma(sigmas) if sigmas > 0 else tokens


def top_k(tokens: Tokens, query: ChainQuery) -> Tokens:
    """Keep the `top_k` largest logits."""
    count = query.sample.sampling.top_k
    return tokens.top(count) if count else tokens


def top_p(tokens: Tokens, query: ChainQuery) -> Tokens:
    """Keep the fewest most likely tokens with a probability of at least `top_p`."""
    wanted = query.sample.sampling.top_p
    return tokens.nucleus(wanted, query.chain.min_keep) if wanted < 1 else tokens


def typical(tokens: Tokens, query: ChainQuery) -> Tokens:
    """Keep the fewest tokens with a probability of more than `typical_p`, those nearest to the entropy first."""
    wanted = query.chain.typical_p
    return tokens.typical(wanted, query.chain.min_keep) if wanted < 1 else tokens


def min_p(tokens: Tokens, query: ChainQuery) -> Tokens:
    """Keep tokens with at least this fraction of the highest probability, and at least `min_keep`."""
    fraction = query.sample.sampling.min_p
    return tokens.heavy(fraction, query.chain.min_keep) if fraction else tokens


def infill(tokens: Tokens, _: ChainQuery) -> Tokens:
    """`min_p` with `INFILL_MIN_P`, in place of llama.cpp's sampler `infill`."""
    return tokens.heavy(INFILL_MIN_P)


def exclude_top_choices(tokens: Tokens, chain: SamplerChain) -> Tokens:
    """XTC, where it excludes: remove all tokens of at least `xtc_threshold` but the least likely of them."""
    return tokens.without_top(chain.xtc_threshold, chain.min_keep)


def temperature(tokens: Tokens, query: ChainQuery) -> Tokens:
    """Divide by the temperature. With `dynatemp_range` it depends on the entropy of the candidates."""
    chain, value = query.chain, query.sample.sampling.temperature
    if chain.dynatemp_range > 0 and not chain.mirostat:
        tokens = tokens.all()
        if len(tokens.ids) == 1:
            return tokens
        low, high = max(0.0, value - chain.dynatemp_range), value + chain.dynatemp_range
        share = entropy(tokens.probabilities) / math.log(len(tokens.ids))
        value = low + (high - low) * share**chain.dynatemp_exponent
    return tokens.top(1) if value < GREEDY_BELOW else tokens.tempered(value)


_SAMPLERS: dict[str, Callable[[Tokens, ChainQuery], Tokens]] = {
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


def _draw_mirostat(tokens: Tokens, query: ChainQuery, index: int, vocabulary: int) -> int:
    """Draw a token, and write the limit for the next one."""
    chain, limits = query.chain, query.limits[index]
    limit = limits[query.position]
    kept = mirostat_1(tokens.all(), limit, vocabulary) if chain.mirostat == 1 else tokens.expected(limit)
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
    return candidates.top(kept)
