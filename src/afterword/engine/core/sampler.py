"""Turns logits rows into tokens and log probabilities. Pure: seeds are arguments.

Reported log probabilities are those of the unmodified logits row, before bias, penalties, temperature and filters. The
expensive computations over whole rows are in `core.sampler_kernel`.
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


def make_kernel(threads: int = 1, thread_pool: int | None = None) -> SamplerKernel:
    """The fastest available kernel. `thread_pool`: see `CompiledKernel`."""
    return CompiledKernel(threads, thread_pool) if LIBRARY.exists() else NumpyKernel()


def finite_rows(logits: Logits) -> NDArray[np.bool_]:
    """For each row, whether a token can be sampled: no NaN, no plus infinity, not all minus infinity. Shape: (n,)."""
    found: NDArray[np.bool_] = np.isfinite(logits.max(axis=1))
    return found


def seed_of(key: bytes, sample: int, position: int) -> int:
    """A 64-bit seed that depends on the arguments alone. `position`: number of tokens that the sample has generated.

    The sampler keeps no random state, so neither load nor order can change a sampled token.
    """
    digest = hashlib.blake2b(struct.pack("<2Q", sample, position), digest_size=8, key=key).digest()
    return int.from_bytes(digest, "little")


class ScoreQuery(msgspec.Struct, frozen=True):
    """Request the log probability and rank of a given token, and the `alternatives` most likely tokens."""

    token: int
    alternatives: int


class SampleTokens(msgspec.Struct, frozen=True):
    """Request the next token of each of a job's `samples`, which share a logits row and their `generated` tokens.

    `position`: the number of generated tokens. Samples share a row only for their first token. `mask`: one bit for each
    token that may be sampled; it already leaves out end tokens that come too early. None: every token may be sampled.
    """

    job: Job
    samples: Sequence[int]
    position: int
    generated: TokenCounts
    mask: NDArray[np.uint32] | None = None


TokenQuery = ScoreQuery | SampleTokens | None


class Sampler:
    """Samples and scores tokens. Results depend on the arguments of `read` alone. One thread calls it."""

    def __init__(self, kernel: SamplerKernel | None = None) -> None:
        self._kernel = kernel or make_kernel()

    def read(self, logits: Logits, queries: Sequence[TokenQuery]) -> list[list[Token]]:
        """Answer one query for each row of `logits: (n, vocabulary)`. Returns the tokens of each query."""
        found = self._kernel.read(logits, [_row_query(query) for query in queries])
        return [_tokens(query, each) for query, each in zip(queries, found, strict=True)]


def _row_query(query: TokenQuery) -> RowQuery:
    match query:
        case ScoreQuery(token, alternatives):
            return RowQuery(reported=True, top=alternatives, given=token)
        case SampleTokens(job, samples, position, generated, mask):
            seeds = [seed_of(job.key, sample, position) for sample in samples]
            banned = job.end_tokens if position < job.min_tokens and mask is None else ()
            sample_query = SampleQuery(job.sampling, seeds, generated, job.prompt, banned, mask)
            return RowQuery(reported=job.alternatives is not None, top=job.alternatives or 0, sample_query=sample_query)
        case None:
            return RowQuery()


def _tokens(query: TokenQuery, found: RowResult) -> list[Token]:
    match query:
        case ScoreQuery(token):
            return [Token(token, found.value, found.top, found.rank)]
        case SampleTokens(job) if job.alternatives is None:
            return [Token(token) for token, _ in found.sampled]
        case _:
            return [Token(token, value, found.top) for token, value in found.sampled]
