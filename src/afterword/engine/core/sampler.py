"""From rows of logits to tokens and log probabilities. Randomness is an argument.

The log probabilities that are reported are those of the unmodified row: what the model believes, not what was asked of
it. What is costly is in rows.py.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from afterword.engine.core.batch import Logits
from afterword.engine.core.plain import Plain
from afterword.engine.core.rows import FILE, Compiled, Draw, Found, Task, Walks
from afterword.engine.core.tally import Tally
from afterword.engine.protocol import Job, Token


def walks(threads: int = 1, team: int | None = None) -> Walks:
    """The fastest there is; see `Compiled`."""
    return Compiled(threads, team) if FILE.exists() else Plain()


def finite(logits: Logits) -> NDArray[np.bool_]:
    """Of each row whether a token can be chosen: no NaN, no infinity, and not all minus infinity."""
    found: NDArray[np.bool_] = np.isfinite(logits.max(axis=1))
    return found


def seed_of(key: bytes, sample: int, position: int) -> int:
    """64 bits that depend on nothing but their arguments: `position` counts a sample's generated tokens.

    No state means that neither load nor order can change a draw.
    """
    digest = hashlib.blake2b(struct.pack("<2Q", sample, position), digest_size=8, key=key).digest()
    return int.from_bytes(digest, "little")


class Score(msgspec.Struct, frozen=True):
    """A given token is to be told about, with its rank and the `alternatives` likeliest."""

    token: int
    alternatives: int


class Sample(msgspec.Struct, frozen=True):
    """The next token of each of a job's `samples` is wanted, which have the same row and the same `generated` tokens.

    `position` is how many these are. Samples share a row at their first token; later each comes alone.
    """

    job: Job
    samples: Sequence[int]
    position: int
    generated: Tally


Ask = Score | Sample | None


class Sampler:
    """What it returns depends on its arguments alone. One thread calls it."""

    def __init__(self, rows: Walks | None = None) -> None:
        self._rows = rows or walks()

    def read(self, logits: Logits, asks: Sequence[Ask]) -> list[list[Token]]:
        """The tokens that each row of a pass (n, vocabulary) is asked for."""
        found = self._rows.read(logits, [_task(ask) for ask in asks])
        return [_tokens(ask, each) for ask, each in zip(asks, found, strict=True)]


def _task(ask: Ask) -> Task:
    match ask:
        case Score(token, alternatives):
            return Task(reported=True, top=alternatives, given=token)
        case Sample(job, samples, position, generated):
            seeds = [seed_of(job.key, sample, position) for sample in samples]
            banned = job.ends if position < job.min_tokens else ()
            draw = Draw(job.sampling, seeds, generated, job.prompt, banned)
            return Task(reported=job.alternatives is not None, top=job.alternatives or 0, draw=draw)
        case None:
            return Task()


def _tokens(ask: Ask, found: Found) -> list[Token]:
    match ask:
        case Score(token):
            return [Token(token, found.value, found.top, found.rank)]
        case Sample(job) if job.alternatives is None:
            return [Token(token) for token, _ in found.drawn]
        case _:
            return [Token(token, value, found.top) for token, value in found.drawn]
