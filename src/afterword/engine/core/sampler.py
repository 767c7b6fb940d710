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
from afterword.engine.core.numpy_kernel import NumpyKernel, processed_row
from afterword.engine.core.repetitions import Repetitions
from afterword.engine.core.row_scan import ScanKernel
from afterword.engine.core.sampler_chain import ChainQuery, sample_chain
from afterword.engine.core.sampler_kernel import (
    LIBRARY,
    CompiledKernel,
    LogitsRow,
    RowQuery,
    RowResult,
    SampleQuery,
    SamplerKernel,
)
from afterword.engine.core.token_counts import TokenCounts
from afterword.engine.protocol import Job, Token
from afterword.engine.token_row import TokenRow, is_packed


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
    """Request the log probability and rank of a given token, and the `alternatives` most likely tokens.

    `reported`: ids to report instead of the most likely ones.
    """

    token: int
    alternatives: int
    reported: tuple[int, ...] = ()


class SampleTokens(msgspec.Struct, frozen=True):
    """Request the next token of each of a job's `samples`, which share a logits row and their `generated` tokens.

    `position`: the number of generated tokens. Samples share a row only for their first token. `repetitions`, `limits`,
    `recent`: see `ChainQuery`; one list of limits for each sample. `mask`: one bit for each token that may be sampled;
    it already leaves out `Job.banned`, and end tokens that come too early. None: every token may be sampled.
    `excluded`: tokens that were taken back at this place.
    """

    job: Job
    samples: Sequence[int]
    position: int
    generated: TokenCounts
    repetitions: Repetitions | None = None
    limits: Sequence[list[float]] = ()
    mask: NDArray[np.uint32] | None = None
    excluded: tuple[int, ...] = ()
    recent: tuple[int, ...] = ()

    @property
    def seeds(self) -> list[int]:
        """The seed of each sample's next token."""
        return [seed_of(self.job.key, sample, self.position) for sample in self.samples]

    @property
    def reported(self) -> tuple[int, ...]:
        """The ids that are reported instead of the most likely ones."""
        if self.job.reported_at is None:
            return self.job.reported
        lists = self.job.reported_at.generated
        return lists[self.position] if self.position < len(lists) else ()

    @property
    def banned(self) -> tuple[int, ...]:
        if self.mask is not None:
            return ()
        early = self.job.end_tokens if self.position < self.job.min_tokens else ()
        return (*early, *self.job.banned, *self.excluded)

    @property
    def sample_query(self) -> SampleQuery:
        """The same for the kernel, or for the samplers of a chain."""
        return SampleQuery(self.job.sampling, self.seeds, self.generated, self.job.prompt, self.banned, self.mask)


TokenQuery = ScoreQuery | SampleTokens | None


class Sampler:
    """Samples and scores tokens. Results depend on the arguments of `read` alone. One thread calls it."""

    def __init__(self, kernel: SamplerKernel | None = None) -> None:
        self._kernel = kernel or make_kernel()
        self._scan = ScanKernel() if isinstance(self._kernel, CompiledKernel) else None

    def read(self, logits: Logits, queries: Sequence[TokenQuery]) -> list[list[Token]]:
        """Answer one query for each row of `logits: (n, vocabulary)`. Returns the tokens of each query."""
        found = self._read(logits, queries)
        return [
            self._processed(row, query, tokens) if isinstance(query, SampleTokens) and _is_processed(query) else tokens
            for row, query, tokens in zip(logits, queries, found, strict=True)
        ]

    def _processed(self, row: LogitsRow, query: SampleTokens, tokens: list[Token]) -> list[Token]:
        """The tokens with the numbers of the distribution that they were drawn from."""
        if not tokens:
            return []
        processed = processed_row(row, query.sample_query, [token.id for token in tokens])
        reported, job = query.reported, query.job
        wanted = RowQuery(
            reported=True,
            top=_top_count(job.alternatives or 0, job.reported or job.reported_at),
            asked=(*(token.id for token in tokens), *reported),
        )
        (found,) = self._kernel.read(processed[None], [wanted])
        top = _top(found, reported)
        values = found.asked[: len(tokens)]
        plain = [Token(token.id, value, top) for token, value in zip(tokens, values, strict=True)]
        return _with_row(query, plain, processed)

    def _read(self, logits: Logits, queries: Sequence[TokenQuery]) -> list[list[Token]]:
        chosen = [_chosen_by_chain(row, query, self._scan) for row, query in zip(logits, queries, strict=True)]
        found = self._kernel.read(logits, list(map(_row_query, queries, chosen)))
        tokens = [_tokens(*each) for each in zip(queries, chosen, found, strict=True)]
        return [_with_row(*each) for each in zip(queries, tokens, logits, strict=True)]

    def packed(self, row: TokenRow) -> TokenRow:
        """The most likely tokens of a row that has the logits of the whole vocabulary; other rows as they are."""
        if row.ids:
            return row
        logits = np.frombuffer(row.values, np.float32)
        ids, values = self._kernel.most_likely(logits, min(row.count, len(logits)))
        return TokenRow(len(ids), values.tobytes(), ids.astype(np.int32).tobytes())


def _is_processed(query: SampleTokens) -> bool:
    return query.job.processed and query.job.alternatives is not None


def _chosen_by_chain(row: LogitsRow, query: TokenQuery, kernel: ScanKernel | None) -> list[int] | None:
    """The tokens of samples with a chain of samplers, which the kernel does not have; None for all others."""
    if not isinstance(query, SampleTokens) or query.job.sampling.chain is None:
        return None
    known = (query.repetitions, query.limits, query.recent)
    return sample_chain(row, ChainQuery(query.sample_query, query.position, *known), kernel)


def _row_query(query: TokenQuery, chosen: list[int] | None) -> RowQuery:
    match query:
        case ScoreQuery(token, alternatives, reported):
            return RowQuery(reported=True, top=_top_count(alternatives, reported), given=token, asked=reported)
        case SampleTokens(job):
            is_reported = job.alternatives is not None
            asked = (*(chosen or ()), *query.reported) if is_reported else ()
            top = _top_count(job.alternatives or 0, job.reported or job.reported_at)
            sample_query = None if chosen is not None else query.sample_query
            return RowQuery(reported=is_reported, top=top, sample_query=sample_query, asked=asked)
        case None:
            return RowQuery()


def _top_count(alternatives: int, chosen: object) -> int:
    """How many of the most likely ids the kernel returns: none where others are `chosen`, or where they are packed."""
    return 0 if chosen or is_packed(alternatives) else alternatives


def _with_row(query: TokenQuery, tokens: list[Token], row: LogitsRow) -> list[Token]:
    """The tokens with the logits of the whole vocabulary, where their alternatives are packed when they are sent."""
    match query:
        case ScoreQuery(_, count, reported) if is_packed(count, reported):
            logits = TokenRow(count, row.tobytes())
        case SampleTokens(job) if is_packed(job.alternatives, job.reported or job.reported_at):
            logits = TokenRow(job.alternatives or 0, row.tobytes())
        case _:
            return tokens
    return [msgspec.structs.replace(token, row=logits) for token in tokens]


def _tokens(query: TokenQuery, chosen: list[int] | None, found: RowResult) -> list[Token]:
    match query:
        case ScoreQuery(token, _, reported):
            return [Token(token, found.value, _top(found, reported), found.rank)]
        case SampleTokens(job) if job.alternatives is None:
            return [Token(token) for token in chosen or ()] or [Token(token) for token, _ in found.sampled]
        case _:
            sampled = found.sampled if chosen is None else zip(chosen, found.asked, strict=False)
            top = _top(found, query.reported) if query else ()
            return [Token(token, value, top) for token, value in sampled]


def _top(found: RowResult, reported: tuple[int, ...]) -> tuple[tuple[int, float], ...]:
    """The alternatives: the reported ids, which are the last that were asked for, or else the most likely ids."""
    return tuple(zip(reported, found.asked[-len(reported) :], strict=True)) if reported else found.top
