"""From rows of logits to tokens and log probabilities. Randomness is an argument.

Order: bias, penalties, bans, temperature, then the filters (min_p, top_k, top_p). The log probabilities that are
reported are those of the unmodified row: what the model believes, not what was asked of it.

The vocabulary is never sorted. Its few largest values are looked for in the blocks with the largest maxima, and the
nucleus of top_p is never built: a token is drawn, and then asked whether it belongs there (`plain._from_nucleus`).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from afterword.engine.core.batch import Logits
from afterword.engine.core.plain import Plain
from afterword.engine.core.rows import FILE, Compiled, Edits, Ids, Row, Walks
from afterword.engine.protocol import Job, Sampling, Token

_NONE = np.empty(0, np.int64)
UNCHANGED: Edits = (_NONE, np.empty(0, np.float32))


def walks(threads: int = 1) -> Walks:
    """The fastest there is."""
    return Compiled(threads) if FILE.exists() else Plain()


def seed_of(key: bytes, sample: int, position: int) -> int:
    """64 bits that depend on nothing but their arguments: `position` counts a sample's generated tokens.

    No state means that neither load nor order can change a draw.
    """
    digest = hashlib.blake2b(struct.pack("<2Q", sample, position), digest_size=8, key=key).digest()
    return int.from_bytes(digest, "little")


def edits(
    logits: Logits, sampling: Sampling, prompt: Sequence[int], counts: Mapping[int, int], banned: Sequence[int]
) -> Edits:
    """What bias, penalties and bans, in this order, make of a row.

    `counts` are the sample's generated tokens. Only the repetition penalty looks at the prompt.
    """
    repeats, penalizes = sampling.repetition_penalty != 1.0, sampling.presence_penalty or sampling.frequency_penalty
    generated = np.fromiter(counts, np.int64, len(counts)) if repeats or penalizes else _NONE
    seen = _distinct(tuple(prompt)) if repeats else _NONE
    biased, biases = zip(*sampling.logit_bias, strict=True) if sampling.logit_bias else ((), ())
    if not (len(generated) or len(seen) or biased or banned):
        return UNCHANGED
    ids = np.unique(np.concatenate((generated, seen, np.array((*biased, *banned), np.int64))))
    values = logits[ids]
    if biased:
        np.add.at(values, np.searchsorted(ids, biased), biases)
    at = np.searchsorted(ids, generated)
    if repeats:
        both = np.concatenate((at, np.searchsorted(ids, seen)))
        factor = np.float32(sampling.repetition_penalty)
        values[both] = np.where(values[both] > 0, values[both] / factor, values[both] * factor)
    if penalizes:
        times = np.fromiter(counts.values(), np.float64, len(counts))
        values[at] -= (times * sampling.frequency_penalty + sampling.presence_penalty).astype(np.float32)
    values[np.searchsorted(ids, banned)] = -np.inf
    return ids, values


@lru_cache(maxsize=256)  # as many as there can be sequences: it is asked for at each of their tokens
def _distinct(prompt: tuple[int, ...]) -> Ids:
    return np.unique(np.array(prompt, np.int64))


@dataclass(frozen=True, slots=True)
class Look:
    """What is known of a row (vocabulary,): the largest of each block, and the log of its sum of exponentials.

    `total` is not a number where nobody wants to know log probabilities.
    """

    row: Logits
    maxima: Row
    total: float


class Sampler:
    """What it returns depends on its arguments alone. One thread calls it."""

    def __init__(self, rows: Walks | None = None) -> None:
        self._rows = rows or walks()

    @np.errstate(over="ignore", invalid="ignore")  # whatever a broken model gives, a token comes out
    def look(self, logits: Logits, reported: Sequence[bool]) -> list[Look]:
        """At all rows of a pass (n, vocabulary) at once. Of those `reported`, log probabilities can be told."""
        maxima, totals = self._rows.survey(logits, reported)
        return [Look(*each) for each in zip(logits, maxima, totals, strict=True)]

    def score(self, looks: Iterable[Look], tokens: Iterable[int], alternatives: int) -> list[Token]:
        """Given tokens with their ranks and the `alternatives` likeliest: each row is for one of them."""
        return [
            Token(
                token,
                float(look.row[token]) - look.total,
                self._top(look, alternatives),
                1 + self._rows.above(look.row, look.maxima, float(look.row[token])),
            )
            for look, token in zip(looks, tokens, strict=True)
        ]

    @np.errstate(over="ignore", invalid="ignore")
    def sample(
        self, look: Look, job: Job, samples: Sequence[int], position: int, counts: Mapping[int, int]
    ) -> list[Token]:
        """The next token of each of a job's `samples`, which have the same row and the same `counts`.

        `position` is how many tokens they have generated, `counts` how often each. Samples share a row at their first
        token; later each comes alone.
        """
        banned = job.ends if position < job.min_tokens else ()
        changed = edits(look.row, job.sampling, job.prompt, counts, banned)
        seeds = [seed_of(job.key, sample, position) for sample in samples]
        chosen = self._rows.draw(look.row, look.maxima, changed, job.sampling, seeds)
        if job.alternatives is None:
            return [Token(token) for token in chosen]
        top = self._top(look, job.alternatives)
        return [Token(token, float(look.row[token]) - look.total, top) for token in chosen]

    def _top(self, look: Look, count: int) -> tuple[tuple[int, float], ...]:
        """The `count` likeliest tokens with their log probabilities."""
        if not count:
            return ()
        ids = self._rows.likeliest(look.row, look.maxima, count)
        logits = look.row[ids].tolist()
        return tuple((token, logit - look.total) for token, logit in zip(ids.tolist(), logits, strict=True))
