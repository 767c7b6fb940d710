"""What the sampler does with whole rows of logits: the costly part, as few walks over memory as there can be.

Compiled (sampler_kernel.cpp) where there was a compiler, else numpy's (plain.py), which are slower. All rows of a
pass are read in one call, since a call costs as much as the arithmetic in it.
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

Ids = NDArray[np.int64]
Numbers = NDArray[np.float64]

BLOCK = 256
"""Of this many numbers the largest is known, and the sum, so that what comes next need not look at them again."""
GREEDY_BELOW = 1e-4
"""Temperatures below this are greedy: dividing by them would leave one token with all the mass anyway."""
LIBRARY = library(KERNELS / "sampler_kernel.cpp")
_MAX_CACHED = 256  # as many as there can be sequences: they are asked for at each token


class SampleQuery(msgspec.Struct, frozen=True):
    """An id for each seed: bias, penalties, bans, temperature, then the filters min_p, top_k, top_p.

    `generated` are the sample's tokens so far; only the repetition penalty looks at the prompt.
    """

    sampling: Sampling
    seeds: Sequence[int]
    generated: TokenCounts
    prompt: tuple[int, ...] = ()
    banned: tuple[int, ...] = ()


class RowQuery(msgspec.Struct, frozen=True):
    """What is wanted of a row: log probabilities if `reported`, with the `top` likeliest, and of one `given` id."""

    reported: bool = False
    top: int = 0
    given: int | None = None
    draw: SampleQuery | None = None


class RowResult(msgspec.Struct, frozen=True):
    """What came of it. Log probabilities are those of the unmodified row; where it is not of numbers, no numbers.

    Without `reported` they are logits. `rank` is 1 for the likeliest id.
    """

    top: tuple[tuple[int, float], ...] = ()
    value: float = 0.0
    rank: int = 0
    drawn: tuple[tuple[int, float], ...] = ()


class SamplerKernel(Protocol):
    """How rows are read."""

    def read(self, rows: Logits, tasks: Sequence[RowQuery]) -> list[RowResult]:
        """Of each row of (n, vocabulary) what its task wants. Weights are exact to 1 in 10^6, and 0 below 10^-37.

        The likeliest come first, and of equals the lower id. Rows are written to meanwhile.
        """
        ...


def distinct(ids: tuple[int, ...]) -> Ids:
    """Each of them once, rising."""
    return np.unique(np.array(ids, np.int64))


_AT, _COUNT, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class _NativeRowQuery(ctypes.Structure):
    """As sampler_kernel.cpp declares it."""

    _fields_ = [
        *((name, _COUNT) for name in ("reported", "given", "top_count")),
        *(("seeds", _AT), ("seeds_count", _COUNT)),
        *((name, _DOUBLE) for name in ("temperature", "top_p", "min_p")),
        ("top_k", _COUNT),
        *((name, _DOUBLE) for name in ("presence", "frequency", "repetition")),
        *(("generated", _AT), ("generated_count", _COUNT), ("times", _AT)),
        *(("seen", _AT), ("seen_count", _COUNT)),
        *(("biased", _AT), ("biased_count", _COUNT), ("biases", _AT)),
        *(("banned", _AT), ("banned_count", _COUNT)),
        *(("value", _DOUBLE), ("rank", _COUNT)),
        *((name, _AT) for name in ("top", "top_values", "chosen", "chosen_values")),
    ]


class CompiledKernel:
    """By sampler_kernel.cpp: rows by up to `threads` threads, or blocks of a row where there is one.

    `team`: the address of what runs them (`Run` in parallel.hpp); OpenMP does if there is none.
    """

    def __init__(self, threads: int = 1, team: int | None = None) -> None:
        native = ctypes.CDLL(str(LIBRARY))
        native.rows_task_size.restype = _COUNT
        assert native.rows_task_size() == ctypes.sizeof(_NativeRowQuery)
        self._read = native.rows_read
        self._read.argtypes = (_AT, _COUNT, _COUNT, _AT, ctypes.c_int, _AT)
        self._threads = threads, team

    def read(self, rows: Logits, tasks: Sequence[RowQuery]) -> list[RowResult]:
        """See `SamplerKernel`."""
        count, length = rows.shape
        tops = [min(task.top, length) for task in tasks]
        seeds = np.array([seed for task in tasks if task.draw for seed in task.draw.seeds], np.uint64)
        top, drawn = _ResultMemory(sum(tops)), _ResultMemory(len(seeds))
        at, held = _address(seeds), []
        native = (_NativeRowQuery * count)()
        for each, task, size in zip(native, tasks, tops, strict=True):
            each.reported, each.given = task.reported, -1 if task.given is None else task.given
            each.top_count, (each.top, each.top_values) = size, top.next(size)
            if task.draw:
                draws = len(task.draw.seeds)
                each.seeds, each.seeds_count, at = at, draws, at + 8 * draws
                each.chosen, each.chosen_values = drawn.next(draws)
                held.append(_fill_query(each, task.draw))
        self._read(_address(rows), count, length, native, *self._threads)
        first, second = top.pairs(), drawn.pairs()
        return [
            RowResult(tuple(islice(first, size)), each.value, each.rank, tuple(islice(second, each.seeds_count)))
            for each, size in zip(native, tops, strict=True)
        ]


class _ResultMemory:
    """Memory for ids and numbers, given out from the first to the last."""

    def __init__(self, count: int) -> None:
        self._ids, self._numbers = np.zeros(count, np.int64), np.zeros(count, np.float64)
        self._at = _address(self._ids), _address(self._numbers)
        self._given = 0

    def next(self, count: int) -> tuple[int, int]:
        """Where there is room for so many."""
        start = 8 * self._given
        self._given += count
        return self._at[0] + start, self._at[1] + start

    def pairs(self) -> Iterator[tuple[int, float]]:
        """What stands there."""
        return zip(self._ids.tolist(), self._numbers.tolist(), strict=True)


def _fill_query(each: _NativeRowQuery, draw: SampleQuery) -> tuple[object, ...]:
    """What is drawn and from what. Returns who owns the arrays, to be kept as long as they are looked at."""
    sampling, generated = draw.sampling, draw.generated
    each.temperature = 0.0 if sampling.temperature < GREEDY_BELOW else sampling.temperature
    each.top_p, each.min_p, each.top_k = sampling.top_p, sampling.min_p, sampling.top_k
    each.presence, each.frequency = sampling.presence_penalty, sampling.frequency_penalty
    each.repetition = sampling.repetition_penalty
    each.generated, each.times, each.generated_count = *generated.addresses, len(generated)
    seen = _array(draw.prompt if sampling.repetition_penalty != 1.0 else ())
    banned = _array(draw.banned)
    biased, biases = _arrays(sampling.logit_bias)
    each.seen, each.seen_count = _address(seen), len(seen)
    each.banned, each.banned_count = _address(banned), len(banned)
    each.biased, each.biased_count, each.biases = _address(biased), len(biased), _address(biases)
    return generated, seen, banned, biased, biases


@lru_cache(_MAX_CACHED)
def _array(ids: tuple[int, ...]) -> Ids:
    return distinct(ids)


@lru_cache(_MAX_CACHED)
def _arrays(biases: tuple[tuple[int, float], ...]) -> tuple[Ids, Numbers]:
    return np.array([token for token, _ in biases], np.int64), np.array([bias for _, bias in biases], np.float64)


def _address(array: NDArray[np.float32 | np.float64 | np.int64 | np.uint64]) -> int:
    """Where an array is; half the time of asking the array."""
    return ctypes.addressof(ctypes.c_char.from_buffer(array.data)) if array.size else 0
