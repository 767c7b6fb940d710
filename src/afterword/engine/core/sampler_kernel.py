"""The sampler's computations over whole logits rows, with as few passes over memory as possible.

`CompiledKernel` calls sampler_kernel.cpp if a compiler built it; `core.numpy_kernel` is the slower alternative. One
call reads all rows of a forward pass, because a call costs as much time as its arithmetic.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from afterword.engine.core.forward_batch import Logits
from afterword.engine.core.token_counts import TokenCounts
from afterword.engine.kernels.compiled import KERNELS, library
from afterword.engine.protocol import Sampling

LogitsRow = NDArray[np.float32]
Ids = NDArray[np.int64]
Numbers = NDArray[np.float64]

BLOCK = 256
"""Logits per block. The kernels keep the maximum and the sum of each block, so that later steps can skip blocks."""
GREEDY_BELOW = 1e-4
"""Temperatures below this are greedy: after a division by them, one token would have all the probability anyway."""
LIBRARY = library(KERNELS / "sampler_kernel.cpp")
_MAX_CACHED = 256  # arrays; as many as there can be sequences, because each token of a sequence needs its array


class SampleQuery(msgspec.Struct, frozen=True):
    """Sample one id for each seed: bias, penalties, bans, temperature, then the filters min_p, top_k, top_p.

    `generated`: the sample's tokens so far. `banned`: ids that are never sampled. `prompt`: for the repetition penalty.
    `mask`: one bit for each id that may be sampled, the lowest bit of the first word first, at least one of them set.
    """

    sampling: Sampling
    seeds: Sequence[int]
    generated: TokenCounts
    prompt: tuple[int, ...] = ()
    banned: tuple[int, ...] = ()
    mask: NDArray[np.uint32] | None = None


class RowQuery(msgspec.Struct, frozen=True):
    """The request for one logits row.

    `reported`: return log probabilities. `top`: number of most likely ids to return. `given`: the id to be scored.
    `sample_query`: the ids to be sampled. `asked`: ids of the vocabulary whose values are returned.
    """

    reported: bool = False
    top: int = 0
    given: int | None = None
    sample_query: SampleQuery | None = None
    asked: tuple[int, ...] = ()


class RowResult(msgspec.Struct, frozen=True):
    """The result for one logits row. Values are those of the unmodified row; without meaning if it is not finite.

    `top`, `sampled`: pairs of id and log probability. `value`, `rank`: log probability and rank of the given id; rank 1
    is the most likely id. `asked`: the values of the asked ids. Without `reported`, all values are logits instead of
    log probabilities.
    """

    top: tuple[tuple[int, float], ...] = ()
    value: float = 0.0
    rank: int = 0
    sampled: tuple[tuple[int, float], ...] = ()
    asked: tuple[float, ...] = ()


class SamplerKernel(Protocol):
    """A function over logits rows, compiled or in numpy."""

    def read(self, rows: Logits, queries: Sequence[RowQuery]) -> list[RowResult]:
        """Answer one query for each row of `rows: (n, vocabulary)`. Weights are exact to 1 in 10^6, 0 below 10^-37.

        The most likely ids come first; ties go to the lower id. The kernel may modify rows during the call and restores
        them before it returns.
        """
        ...

    def most_likely(self, row: LogitsRow, count: int) -> tuple[Ids, Numbers]:
        """The `count` most likely ids, at most the vocabulary, in the order of `RowResult.top`, and their log
        probabilities: those that `read` returns.
        """
        ...


def distinct(ids: tuple[int, ...]) -> Ids:
    """The distinct ids in ascending order."""
    return np.unique(np.array(ids, np.int64))


_AT, _COUNT, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class NativeRowQuery(ctypes.Structure):
    """The same struct as in sampler_kernel.cpp."""

    _fields_ = [
        *((name, _COUNT) for name in ("reported", "given", "top_count")),
        *(("seeds", _AT), ("seeds_count", _COUNT)),
        *((name, _DOUBLE) for name in ("temperature", "top_p", "min_p")),
        ("top_k", _COUNT),
        *((name, _DOUBLE) for name in ("presence", "frequency", "repetition")),
        *(("generated", _AT), ("generated_count", _COUNT), ("times", _AT)),
        *(("seen", _AT), ("seen_count", _COUNT)),
        *(("biased", _AT), ("biased_count", _COUNT), ("biases", _AT)),
        *(("banned", _AT), ("banned_count", _COUNT), ("mask", _AT), ("mask_count", _COUNT)),
        *(("asked", _AT), ("asked_count", _COUNT)),
        *(("value", _DOUBLE), ("rank", _COUNT)),
        *((name, _AT) for name in ("top", "top_values", "sampled", "sampled_values", "asked_values")),
    ]


class CompiledKernel:
    """The kernel of sampler_kernel.cpp. Up to `threads` threads share the rows, or the blocks of a single row.

    `thread_pool`: the address of the function that runs them on threads (`Run` in parallel.hpp); None: the calling
    thread does all of it.
    """

    def __init__(self, threads: int = 1, thread_pool: int | None = None) -> None:
        native = ctypes.CDLL(str(LIBRARY))
        native.row_query_size.restype = _COUNT
        assert native.row_query_size() == ctypes.sizeof(NativeRowQuery)
        self._read = native.rows_read
        self._read.argtypes = (_AT, _COUNT, _COUNT, _AT, ctypes.c_int, _AT)
        self._threads = threads, thread_pool

    def read(self, rows: Logits, queries: Sequence[RowQuery]) -> list[RowResult]:
        """See `SamplerKernel`."""
        count, length = rows.shape
        tops = [min(query.top, length) for query in queries]
        seeds = np.array(
            [seed for query in queries if query.sample_query for seed in query.sample_query.seeds], np.uint64
        )
        top, sampled = _ResultMemory(sum(tops)), _ResultMemory(len(seeds))
        asked_ids = np.array([token for query in queries for token in query.asked], np.int64)
        asked = _ResultMemory(len(asked_ids))
        at, asked_at, held = address(seeds), address(asked_ids), []
        native = (NativeRowQuery * count)()
        for each, query, size in zip(native, queries, tops, strict=True):
            each.reported, each.given = query.reported, -1 if query.given is None else query.given
            each.top_count, (each.top, each.top_values) = size, top.next(size)
            if query.asked:
                each.asked, each.asked_count, asked_at = asked_at, len(query.asked), asked_at + 8 * len(query.asked)
                _, each.asked_values = asked.next(len(query.asked))
            if query.sample_query:
                sample_count = len(query.sample_query.seeds)
                each.seeds, each.seeds_count, at = at, sample_count, at + 8 * sample_count
                each.sampled, each.sampled_values = sampled.next(sample_count)
                held.append(_fill_query(each, query.sample_query))
        self._read(address(rows), count, length, native, *self._threads)
        first, second, third = top.pairs(), sampled.pairs(), iter(asked.numbers())
        return [
            RowResult(
                tuple(islice(first, size)),
                each.value,
                each.rank,
                tuple(islice(second, each.seeds_count)),
                tuple(islice(third, each.asked_count)),
            )
            for each, size in zip(native, tops, strict=True)
        ]

    def most_likely(self, row: LogitsRow, count: int) -> tuple[Ids, Numbers]:
        """See `SamplerKernel`."""
        ids, values = np.zeros(count, np.int64), np.zeros(count, np.float64)
        row = np.array(row)  # the address of an array that cannot be written is not to be had
        native = (NativeRowQuery * 1)()
        native[0].reported, native[0].given, native[0].top_count = 1, -1, count
        native[0].top, native[0].top_values = address(ids), address(values)
        self._read(address(row), 1, len(row), native, *self._threads)
        return ids, values


class _ResultMemory:
    """Memory for ids and values, allocated in order from the first element to the last."""

    def __init__(self, count: int) -> None:
        self._ids, self._numbers = np.zeros(count, np.int64), np.zeros(count, np.float64)
        self._at = address(self._ids), address(self._numbers)
        self._allocated = 0

    def next(self, count: int) -> tuple[int, int]:
        """Allocate `count` elements. Returns the addresses of their ids and values."""
        start = 8 * self._allocated
        self._allocated += count
        return self._at[0] + start, self._at[1] + start

    def numbers(self) -> list[float]:
        """All values."""
        numbers: list[float] = self._numbers.tolist()
        return numbers

    def pairs(self) -> Iterator[tuple[int, float]]:
        """All ids with their values."""
        return zip(self._ids.tolist(), self._numbers.tolist(), strict=True)


def _fill_query(each: NativeRowQuery, query: SampleQuery) -> tuple[object, ...]:
    """Fill in the fields for sampling. Returns the owners of the arrays, to be kept alive during the native call."""
    sampling, generated = query.sampling, query.generated
    each.temperature = 0.0 if sampling.temperature < GREEDY_BELOW else sampling.temperature
    each.top_p, each.min_p, each.top_k = sampling.top_p, sampling.min_p, sampling.top_k
    each.presence, each.frequency = sampling.presence_penalty, sampling.frequency_penalty
    each.repetition = sampling.repetition_penalty
    each.generated, each.times, each.generated_count = *generated.addresses, len(generated)
    seen = cached_distinct(query.prompt if sampling.repetition_penalty != 1.0 else ())
    banned = cached_distinct(query.banned)
    biased, biases = _arrays(sampling.logit_bias)
    each.seen, each.seen_count = address(seen), len(seen)
    each.banned, each.banned_count = address(banned), len(banned)
    each.biased, each.biased_count, each.biases = address(biased), len(biased), address(biases)
    if query.mask is not None:
        each.mask, each.mask_count = address(query.mask), len(query.mask)
    return generated, seen, banned, biased, biases, query.mask


@lru_cache(_MAX_CACHED)
def cached_distinct(ids: tuple[int, ...]) -> Ids:
    """As `distinct`. The result must not be changed."""
    return distinct(ids)


@lru_cache(_MAX_CACHED)
def _arrays(biases: tuple[tuple[int, float], ...]) -> tuple[Ids, Numbers]:
    return np.array([token for token, _ in biases], np.int64), np.array([bias for _, bias in biases], np.float64)


def address(array: NDArray[np.float32 | np.float64 | np.int64 | np.uint32 | np.uint64]) -> int:
    """The address of the data of an array that can be written. Takes half the time of `array.ctypes.data`."""
    return ctypes.addressof(ctypes.c_char.from_buffer(array.data)) if array.size else 0
