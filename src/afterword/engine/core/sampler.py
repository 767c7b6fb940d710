"""From rows of logits to tokens and log probabilities. Randomness is an argument.

Order: bias, penalties, bans, temperature, then the filters (min_p, top_k, top_p). The log probabilities that are
reported are those of the unmodified row: what the model believes, not what was asked of it.

The vocabulary is never sorted. Its few largest values are looked for in the blocks with the largest maxima, and the
nucleus of top_p is never built: a token is drawn, and then asked whether it belongs there (`Sampler._from_nucleus`).
"""

from __future__ import annotations

import hashlib
import itertools
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from afterword.engine.core.batch import Logits
from afterword.engine.core.rows import BLOCK, UNCHANGED, Edits, Plain, Sums, Walks, stays, walks
from afterword.engine.protocol import Job, Sampling, Token

Weights = NDArray[np.float32]
"""A row of exponentials, the largest 1. In float32: exact to 1 in 10^6; what weighs below 10^-37 is never drawn."""
Draws = Callable[[int], float]
"""The n-th number in [0, 1) for one token. Most tokens need the first (0) alone."""

GREEDY_BELOW = 1e-4
"""Temperatures below this are greedy: dividing by them would leave one token with all the mass anyway."""
_BELOW_ONE = 1.0 - 2.0**-53


def uniform(key: bytes, sample: int, position: int, attempt: int = 0) -> float:
    """A number in [0, 1) that depends on nothing but its arguments: a counter-based generator.

    `position` counts a sample's generated tokens, `attempt` the numbers drawn for one of them. No state means that
    neither load nor order can change a draw.
    """
    counters = (sample, position, attempt) if attempt else (sample, position)
    digest = hashlib.blake2b(struct.pack(f"<{len(counters)}Q", *counters), digest_size=8, key=key).digest()
    return float(int.from_bytes(digest, "little") >> 11) * 2.0**-53


def edits(
    logits: Logits, sampling: Sampling, prompt: Sequence[int], counts: Mapping[int, int], banned: Sequence[int]
) -> Edits:
    """What bias, penalties and bans, in this order, make of a row.

    `counts` are the sample's generated tokens. Only the repetition penalty looks at the prompt.
    """
    biased = [token for token, _ in sampling.logit_bias]
    repeated = (*prompt, *counts) if sampling.repetition_penalty != 1.0 else ()
    penalized = counts if sampling.presence_penalty or sampling.frequency_penalty else {}
    if not (biased or repeated or penalized or banned):
        return UNCHANGED
    ids = np.array(sorted({*biased, *repeated, *penalized, *banned}), np.int64)
    values = logits[ids]
    if biased:
        np.add.at(values, np.searchsorted(ids, biased), [bias for _, bias in sampling.logit_bias])
    if repeated:
        at = np.searchsorted(ids, repeated)
        factor = np.float32(sampling.repetition_penalty)
        values[at] = np.where(values[at] > 0, values[at] / factor, values[at] * factor)
    if penalized:
        times = np.fromiter(penalized.values(), np.float64, len(penalized))
        penalties = times * sampling.frequency_penalty + sampling.presence_penalty
        values[np.searchsorted(ids, list(penalized))] -= penalties.astype(np.float32)
    values[np.searchsorted(ids, banned)] = -np.inf
    return ids, values


class Sampler:
    """Owner of scratch memory for one row; one thread calls it. What it returns depends on its arguments alone.

    The memory is kept because fresh pages cost more than the arithmetic that is done in them. Rows are taken one by
    one: at the size of a vocabulary, taking several at once saves nothing, and a row's bits cannot depend on others.
    """

    def __init__(self, rows: Walks | None = None) -> None:
        self._rows = rows or walks()
        self._weights = np.empty(0, np.float32)

    @np.errstate(over="ignore", invalid="ignore")  # whatever a broken model gives, a token comes out
    def score(self, logits: Logits, tokens: Iterable[int], alternatives: int) -> list[Token]:
        """Given tokens with their ranks and the `alternatives` likeliest: row i of (n, vocabulary) is for token i."""
        self._fit(logits.shape[1])
        scored = []
        for row, token in zip(logits, tokens, strict=True):
            maxima = self._rows.maxima(row)
            highest = float(maxima.max())
            total = _log_total(highest, self._rows.exponentials(row, highest, 1.0, None))
            rank = 1 + self._rows.above(row, float(row[token]))
            scored.append(Token(token, float(row[token]) - total, _top(row, maxima, alternatives, total), rank))
        return scored

    @np.errstate(over="ignore", invalid="ignore")
    def sample(
        self, logits: Logits, job: Job, samples: Sequence[int], position: int, counts: Mapping[int, int]
    ) -> list[Token]:
        """The next token of each of a job's `samples`, which have the same row (vocabulary,) and the same `counts`.

        `position` is how many tokens they have generated, `counts` how often each. Samples share a row at their first
        token; later each comes alone.
        """
        self._fit(len(logits))
        sampling = job.sampling
        changed = edits(logits, sampling, job.prompt, counts, job.ends if position < job.min_tokens else ())
        maxima = self._rows.maxima(logits)
        highest = float(maxima.max())
        as_it_is = sampling.temperature == 1.0 and not len(changed[0])
        total, sums = None, None
        if job.alternatives is not None:
            sums = self._rows.exponentials(logits, highest, 1.0, self._weights if as_it_is else None)
            total = _log_total(highest, sums)
        if sampling.temperature < GREEDY_BELOW:
            chosen = [self._likeliest(logits, changed)] * len(samples)
        else:
            if sums is None or not as_it_is:
                highest = _highest(logits, maxima, changed)
                # The shift comes before the division: a quotient by a small temperature has few digits after its point.
                sums = self._rows.exponentials(logits, highest, sampling.temperature, self._weights, changed)
            draws = [partial(uniform, job.key, sample, position) for sample in samples]
            chosen = self._choose(sampling, sums, draws)
        if total is None:
            return [Token(token) for token in chosen]
        top = _top(logits, maxima, job.alternatives or 0, total)
        return [Token(token, float(logits[token]) - total, top) for token in chosen]

    def _fit(self, vocabulary: int) -> None:
        """Make room for a row of this length."""
        if len(self._weights) != vocabulary:
            self._weights = np.empty(vocabulary, np.float32)

    def _likeliest(self, row: Logits, changed: Edits) -> int:
        """The likeliest token; ties go to the lower id."""
        ids, values = changed
        if len(ids):
            np.copyto(self._weights, row)
            self._weights[ids] = values
            row = self._weights
        return int(np.argmax(row))

    def _choose(self, sampling: Sampling, sums: Sums, draws: Sequence[Draws]) -> list[int]:
        """A token for each of `draws`, in proportion to the weights that the filters leave. Changes the weights."""
        weights = self._weights
        if sampling.min_p:
            sums = self._rows.keep(weights, len(weights), sampling.min_p, weights)
        wanted = sampling.top_p * float(sums.sum())
        if not wanted > 1.0:  # the likeliest token weighs 1 and is all of the nucleus; or the row is not of numbers
            return [int(np.argmax(weights))] * len(draws)
        if sampling.top_k:
            ids = likeliest(weights, sampling.top_k, self._rows)
            cumulated = np.cumsum(weights[ids], dtype=np.float64)
            size = int(np.searchsorted(cumulated, sampling.top_p * float(cumulated[-1]))) + 1
            few = weights[ids[:size]]
            return [int(ids[_pick(few, draw(0))[0]]) for draw in draws]
        if sampling.top_p >= 1.0:
            return [_pick_by_blocks(weights, sums, draw(0), len(weights), 0.0) for draw in draws]
        return [self._from_nucleus(sums, wanted, draw) for draw in draws]

    def _from_nucleus(self, sums: Sums, wanted: float, draw: Draws) -> int:
        """A token of the nucleus: the fewest likeliest tokens that weigh `wanted` together; ties go to the lower id.

        A token is in the nucleus if and only if those before it weigh less than `wanted`. So draw from all tokens; if
        the token is outside, so is everything after it: draw again from those before it. What is returned is
        distributed as if only the nucleus had been drawn from, after 1 + ln(1 / top_p) draws on average at most.
        """
        weights = self._weights
        place, least = len(weights), 0.0  # at first, all
        for attempt in itertools.count():
            place = _pick_by_blocks(weights, sums, draw(attempt), place, least)
            least = float(weights[place])
            sums = self._rows.keep(weights, place, least, None)
            if sums.sum() < wanted:
                break
        return place


def likeliest(values: NDArray[np.float32], count: int, rows: Walks | None = None) -> NDArray[np.int64]:
    """Ids of the `count` largest values, largest first; ties go to the lower id."""
    return _likeliest(values, (rows or Plain()).maxima(values), count)


def _highest(row: Logits, maxima: NDArray[np.float32], changed: Edits) -> float:
    """The largest of a row with its edits; `maxima` are of its blocks without them."""
    ids, values = changed
    highest = float(maxima.max())
    if not len(ids):
        return highest
    largest = float(values.max())
    if float(row[ids].max()) < highest:
        return max(highest, largest)
    edited = ids // BLOCK
    others = maxima.copy()
    others[edited] = -np.inf
    largest = max(largest, float(others.max()))
    # Of the edited blocks few, mostly one, had anything larger.
    for block in sorted(set(edited[maxima[edited] > largest].tolist())):
        inside = row[block * BLOCK : (block + 1) * BLOCK].copy()
        inside[ids[edited == block] - block * BLOCK] = -np.inf
        largest = max(largest, float(inside.max()))
    return largest


def _log_total(highest: float, sums: Sums) -> float:
    """Natural log of the sum of a row's exponentials."""
    total = float(sums.sum())
    return highest + (math.log(total) if total > 0 else math.nan)


def _likeliest(values: NDArray[np.float32], maxima: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """`likeliest`, where the maxima of the blocks are known."""
    if count < len(maxima):
        # At least `count` values reach the count-th largest maximum, and only blocks that reach it have any.
        least = np.partition(maxima, -count)[-count]
        blocks = np.flatnonzero(maxima >= least)
        ids = (blocks[:, None] * BLOCK + np.arange(BLOCK)).ravel()
        ids = ids[: np.searchsorted(ids, len(values))]
        ids = ids[values[ids] >= least]
    elif count < len(values):
        ids = np.flatnonzero(values >= np.partition(values, -count)[-count])
    else:
        ids = np.arange(len(values))
    return ids[np.argsort(-values[ids], kind="stable")][:count]


def _top(row: Logits, maxima: NDArray[np.float32], count: int, total: float) -> tuple[tuple[int, float], ...]:
    """The `count` likeliest tokens with their log probabilities."""
    if not count:
        return ()
    ids = _likeliest(row, maxima, count)
    return tuple((token, logit - total) for token, logit in zip(ids.tolist(), row[ids].tolist(), strict=True))


def _pick(weights: NDArray[np.floating], draw: float) -> tuple[int, float]:
    """Index drawn in proportion to the weights, and what is left of the draw: uniform in [0, 1) and unused."""
    cumulated = np.cumsum(weights, dtype=np.float64)
    target = draw * float(cumulated[-1])
    index = int(np.searchsorted(cumulated, target, side="right"))
    before = float(cumulated[index - 1]) if index else 0.0
    return index, min((target - before) / float(weights[index]), _BELOW_ONE)


def _pick_by_blocks(weights: Weights, sums: Sums, draw: float, place: int, least: float) -> int:
    """Id drawn in proportion to the weights of `stays`: first its block, then the id in the block."""
    block, rest = _pick(sums, draw)
    start = block * BLOCK
    inside = weights[start : start + BLOCK]
    return start + _pick(inside * stays(inside, place - start, least), rest)[0]
