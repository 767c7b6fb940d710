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

from afterword.engine.core.forward_batch import Logits
from afterword.engine.core.numpy_kernel import NumpyKernel
from afterword.engine.core.sampler_kernel import (
    LIBRARY,
    CompiledKernel,
    RowQuery,
    RowResult,
    SampleQuery,
    SamplerKernel,
)
from afterword.engine.core.token_counts import TokenCounts
from afterword.engine.protocol import Job, Token


def make_kernel(threads: int = 1, team: int | None = None) -> SamplerKernel:
    """The fastest there is; see `CompiledKernel`."""
    return CompiledKernel(threads, team) if LIBRARY.exists() else NumpyKernel()


def finite_rows(logits: Logits) -> NDArray[np.bool_]:
    """Of each row whether a token can be chosen: no NaN, no infinity, and not all minus infinity."""
    found: NDArray[np.bool_] = np.isfinite(logits.max(axis=1))
    return found


def seed_of(key: bytes, sample: int, position: int) -> int:
    """64 bits that depend on nothing but their arguments: `position` counts a sample's generated tokens.

    No state means that neither load nor order can change a draw.
    """
    digest = hashlib.blake2b(struct.pack("<2Q", sample, position), digest_size=8, key=key).digest()
    return int.from_bytes(digest, "little")


class ScoreQuery(msgspec.Struct, frozen=True):
    """A given token is to be told about, with its rank and the `alternatives` likeliest."""

    token: int
    alternatives: int


class SampleTokens(msgspec.Struct, frozen=True):
    """The next token of each of a job's `samples` is wanted, which have the same row and the same `generated` tokens.

    `position` is how many these are. Samples share a row at their first token; later each comes alone.
    """

    job: Job
    samples: Sequence[int]
    position: int
    generated: TokenCounts


TokenQuery = ScoreQuery | SampleTokens | None


class Sampler:
    """What it returns depends on its arguments alone. One thread calls it."""

    def __init__(self, rows: SamplerKernel | None = None) -> None:
        self._rows = rows or make_kernel()

    def read(self, logits: Logits, asks: Sequence[TokenQuery]) -> list[list[Token]]:
        """The tokens that each row of a pass (n, vocabulary) is asked for."""
        found = self._rows.read(logits, [_row_query(ask) for ask in asks])
        return [_tokens(ask, each) for ask, each in zip(asks, found, strict=True)]


def _row_query(ask: TokenQuery) -> RowQuery:
    match ask:
        case ScoreQuery(token, alternatives):
            return RowQuery(reported=True, top=alternatives, given=token)
        case SampleTokens(job, samples, position, generated):
            seeds = [seed_of(job.key, sample, position) for sample in samples]
            banned = job.end_tokens if position < job.min_tokens else ()
            draw = SampleQuery(job.sampling, seeds, generated, job.prompt, banned)
            return RowQuery(reported=job.alternatives is not None, top=job.alternatives or 0, draw=draw)
        case None:
            return RowQuery()


def _tokens(ask: TokenQuery, found: RowResult) -> list[Token]:
    match ask:
        case ScoreQuery(token):
            return [Token(token, found.value, found.top, found.rank)]
        case SampleTokens(job) if job.alternatives is None:
            return [Token(token) for token, _ in found.drawn]
        case _:
            return [Token(token, value, found.top) for token, value in found.drawn]
