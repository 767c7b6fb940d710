"""The sampler's costly steps: walks over whole rows of logits, each with one reading of memory.

Compiled (rows.cpp) where there was a compiler, else numpy's (plain.py), which take about twice the time. Rows are taken
in blocks, and what is known of each block is returned, so that what comes next need not look at the rest again.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from afterword.engine.compiled import library
from afterword.engine.protocol import Sampling

Row = NDArray[np.float32]
Rows = NDArray[np.float32]
Ids = NDArray[np.int64]
Edits = tuple[Ids, Row]
"""Token ids, rising, and their new numbers."""

BLOCK = 256
GREEDY_BELOW = 1e-4
"""Temperatures below this are greedy: dividing by them would leave one token with all the mass anyway."""
FILE = library(Path(__file__).with_name("rows.cpp"))


class Walks(Protocol):
    """Rows are (vocabulary,) and contiguous; `maxima` the largest of each block of them."""

    def survey(self, rows: Rows, summed: Sequence[bool]) -> tuple[Rows, list[float]]:
        """The maxima of (n, vocabulary), and of those `summed` the log of the sum of exponentials.

        To 1 in 10^6. Not a number for others, and for rows that are none.
        """
        ...

    def draw(self, row: Row, maxima: Row, edits: Edits, sampling: Sampling, seeds: Sequence[int]) -> list[int]:
        """An id for each seed, of the row with its edits: temperature, then min_p, top_k, top_p.

        Weights are exponentials of what is below the largest: exact to 1 in 10^6, and 0 below 10^-37.
        """
        ...

    def above(self, row: Row, maxima: Row, value: float) -> int:
        """How many are larger."""
        ...

    def likeliest(self, row: Row, maxima: Row, count: int) -> Ids:
        """Ids of the `count` largest, largest first; ties go to the lower id."""
        ...


_AT, _COUNT, _NUMBER, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_double
_FILTERS = (_DOUBLE, _DOUBLE, _COUNT, _DOUBLE)
_SIGNATURES = {
    "rows_threads": (ctypes.c_int,),
    "rows_survey": (_AT, _COUNT, _COUNT, _AT, _AT),
    "rows_draw": (_AT, _COUNT, _AT, _AT, _AT, _COUNT, *_FILTERS, _AT, _COUNT, _AT),
    "rows_above": (_AT, _COUNT, _AT, _NUMBER),
    "rows_likeliest": (_AT, _COUNT, _AT, _COUNT, _AT),
}


class Compiled:
    """By rows.cpp, each walk over what is long by up to `threads` threads."""

    def __init__(self, threads: int = 1) -> None:
        self._library = ctypes.CDLL(str(FILE))
        for name, arguments in _SIGNATURES.items():
            getattr(self._library, name).argtypes = arguments
        self._library.rows_above.restype = _COUNT
        self._library.rows_threads(threads)

    def survey(self, rows: Rows, summed: Sequence[bool]) -> tuple[Rows, list[float]]:
        """See `Walks`."""
        count, length = rows.shape
        maxima = np.empty((count, -(-length // BLOCK)), np.float32)
        totals = np.where(summed, 0.0, math.nan)
        self._library.rows_survey(_at(rows), count, length, _at(maxima), _at(totals))
        return maxima, totals.tolist()

    def draw(self, row: Row, maxima: Row, edits: Edits, sampling: Sampling, seeds: Sequence[int]) -> list[int]:
        """See `Walks`."""
        chosen, wanted = np.empty(len(seeds), np.int64), np.array(seeds, np.uint64)
        temperature = 0.0 if sampling.temperature < GREEDY_BELOW else sampling.temperature
        filters = (temperature, sampling.top_p, sampling.top_k, sampling.min_p)
        changes = (_at(edits[0]), _at(edits[1]), len(edits[0]))
        self._library.rows_draw(
            _at(row), len(row), _at(maxima), *changes, *filters, _at(wanted), len(seeds), _at(chosen)
        )
        found: list[int] = chosen.tolist()
        return found

    def above(self, row: Row, maxima: Row, value: float) -> int:
        """See `Walks`."""
        return int(self._library.rows_above(_at(row), len(row), _at(maxima), value))

    def likeliest(self, row: Row, maxima: Row, count: int) -> Ids:
        """See `Walks`."""
        ids = np.empty(min(count, len(row)), np.int64)
        self._library.rows_likeliest(_at(row), len(row), _at(maxima), len(ids), _at(ids))
        return ids


def _at(array: NDArray[np.float32 | np.float64 | np.int64 | np.uint64]) -> int | None:
    """Where an array is; half the time of asking the array."""
    return ctypes.addressof(ctypes.c_char.from_buffer(array.data)) if array.size else None
