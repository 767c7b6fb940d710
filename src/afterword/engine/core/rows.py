"""Walks over a whole row of logits, each with one reading of memory: the sampler's costly steps.

Compiled (rows.cpp) where there was a compiler, else numpy's, which take about twice the time. Rows are taken in blocks,
and what is known of each block is returned, so that what comes next need not look at the rest again.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from afterword.engine.compiled import library

Row = NDArray[np.float32]
Edits = tuple[NDArray[np.int64], Row]
"""Token ids, rising, and their new numbers."""
Sums = NDArray[np.float64]
"""What each block weighs. Inside blocks of float32, which is as exact as the weights are."""

UNCHANGED: Edits = (np.empty(0, np.int64), np.empty(0, np.float32))
BLOCK = 256
FILE = library(Path(__file__).with_name("rows.cpp"))


class Walks(Protocol):
    """Arrays are (vocabulary,) and contiguous. What is written to may be what is read; None where only sums matter."""

    def maxima(self, row: Row) -> Row:
        """The largest of each block."""
        ...

    def exponentials(
        self, row: Row, shift: float, divisor: float, weights: Row | None, edits: Edits = UNCHANGED
    ) -> Sums:
        """Write exp((row - shift) / divisor), at most 1: the heavy ones to 1 in 10^6, 0 for those below 10^-37.

        Of the row with its edits, if there are any.
        """
        ...

    def keep(self, weights: Row, place: int, least: float, kept: Row | None) -> Sums:
        """Write the weights that are larger than `least`, or as large and before `place`; zeros for the others."""
        ...

    def above(self, row: Row, value: float) -> int:
        """How many are larger."""
        ...


class Plain:
    """By numpy."""

    def maxima(self, row: Row) -> Row:
        """See `Walks`."""
        return np.maximum.reduceat(row, np.arange(0, len(row), BLOCK))

    def exponentials(
        self, row: Row, shift: float, divisor: float, weights: Row | None, edits: Edits = UNCHANGED
    ) -> Sums:
        """See `Walks`."""
        weights = np.empty_like(row) if weights is None else weights
        np.copyto(weights, row)
        weights[edits[0]] = edits[1]
        np.subtract(weights, np.float32(shift), out=weights)
        if divisor != 1.0:
            np.divide(weights, np.float32(divisor), out=weights)
        np.exp(weights, out=weights)
        return _sums(weights)

    def keep(self, weights: Row, place: int, least: float, kept: Row | None) -> Sums:
        """See `Walks`."""
        return _sums(np.multiply(weights, stays(weights, place, least), out=kept))

    def above(self, row: Row, value: float) -> int:
        """See `Walks`."""
        return int(np.count_nonzero(row > np.float32(value)))


_AT, _COUNT, _NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURES = {
    "rows_threads": (ctypes.c_int,),
    "rows_maxima": (_AT, _COUNT, _AT),
    "rows_exponentials": (_AT, _COUNT, _NUMBER, _NUMBER, _AT, _AT, _COUNT, _AT, _AT),
    "rows_keep": (_AT, _COUNT, _COUNT, _NUMBER, _AT, _AT),
    "rows_above": (_AT, _COUNT, _NUMBER),
}


class Compiled:
    """By rows.cpp, each walk over a long row by up to `threads` threads."""

    def __init__(self, threads: int = 1) -> None:
        self._library = ctypes.CDLL(str(FILE))
        for name, arguments in _SIGNATURES.items():
            getattr(self._library, name).argtypes = arguments
        self._library.rows_above.restype = _COUNT
        self._library.rows_threads(threads)

    def maxima(self, row: Row) -> Row:
        """See `Walks`."""
        found = np.empty(-(-len(row) // BLOCK), np.float32)
        self._library.rows_maxima(_at(row), len(row), _at(found))
        return found

    def exponentials(
        self, row: Row, shift: float, divisor: float, weights: Row | None, edits: Edits = UNCHANGED
    ) -> Sums:
        """See `Walks`."""
        sums = np.empty(-(-len(row) // BLOCK), np.float32)
        changes = (_at(edits[0]), _at(edits[1]), len(edits[0]))
        self._library.rows_exponentials(_at(row), len(row), shift, divisor, *changes, _at(weights), _at(sums))
        return sums.astype(np.float64)

    def keep(self, weights: Row, place: int, least: float, kept: Row | None) -> Sums:
        """See `Walks`."""
        sums = np.empty(-(-len(weights) // BLOCK), np.float32)
        self._library.rows_keep(_at(weights), len(weights), place, least, _at(kept), _at(sums))
        return sums.astype(np.float64)

    def above(self, row: Row, value: float) -> int:
        """See `Walks`."""
        return int(self._library.rows_above(_at(row), len(row), value))


def walks(threads: int = 1) -> Walks:
    """The fastest there is."""
    return Compiled(threads) if FILE.exists() else Plain()


def stays(weights: Row, place: int, least: float) -> NDArray[np.bool_]:
    """Which weights are larger than `least`, or as large and before `place`."""
    before = max(0, place)
    chosen = weights > np.float32(least)
    np.greater_equal(weights[:before], np.float32(least), out=chosen[:before])
    return chosen


def _at(array: Row | NDArray[np.int64] | None) -> int | None:
    return None if array is None else array.ctypes.data


def _sums(weights: Row) -> Sums:
    whole = len(weights) // BLOCK * BLOCK
    sums = np.einsum("ij->i", weights[:whole].reshape(-1, BLOCK))  # half the time of `sum` or `add.reduceat`
    rest = weights[whole:]
    return (np.append(sums, rest.sum()) if len(rest) else sums).astype(np.float64)
