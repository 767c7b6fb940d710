"""Calls row_scan.hpp, which reads all logits of a row for a sampler chain."""

from __future__ import annotations

import ctypes
from functools import cached_property

import numpy as np

from afterword.engine.core.sampler_kernel import BLOCK, LIBRARY, Ids, LogitsRow, Numbers, address

_AT, _COUNT, _FLOAT, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_double
_NO_IDS = np.zeros(0, np.int64)
_LOWEST = float(np.finfo(np.float32).min)


class NativeScannedRow(ctypes.Structure):
    """The struct `ScannedRow` of row_scan.hpp."""

    _fields_ = [("row", _AT), ("length", _COUNT), ("changed", _AT), ("changed_count", _COUNT), ("largest", _AT)]


class ScanKernel:
    """The functions of row_scan.hpp. A process needs one."""

    def __init__(self) -> None:
        native = ctypes.CDLL(str(LIBRARY))
        native.scanned_row_size.restype = _COUNT
        assert native.scanned_row_size() == ctypes.sizeof(NativeScannedRow)
        row = ctypes.POINTER(NativeScannedRow)
        self.largest, self.above = native.scan_largest, native.scan_above
        self.weights, self.moments = native.scan_weights, native.scan_moments
        self.largest.argtypes, self.above.argtypes = (row, ctypes.c_int32), (row, _FLOAT, _AT)
        self.weights.argtypes, self.moments.argtypes = (row, _DOUBLE, _DOUBLE, _AT), (row, _DOUBLE, _AT)
        self.largest.restype = self.moments.restype = None
        self.above.restype, self.weights.restype = _COUNT, _DOUBLE


class RowScan:
    """A row of logits without those of the ids `changed`, which count as minus infinity.

    During a call the row is changed, and restored. No logit may be NaN or plus infinity.
    """

    def __init__(
        self, kernel: ScanKernel, row: LogitsRow, changed: Ids = _NO_IDS, unchanged: RowScan | None = None
    ) -> None:
        """`changed`: ascending. `unchanged`: the scan of the same row with all logits."""
        self.row, self._kernel, self._changed = row, kernel, changed
        self._unchanged, self._largest = unchanged, np.empty(-(-len(row) // BLOCK), np.float32)
        self._native = NativeScannedRow(address(row), len(row), address(changed), len(changed), address(self._largest))

    def without(self, changed: Ids) -> RowScan:
        """The scan of the same row without these ids. Only blocks with one of them are read again."""
        return RowScan(self._kernel, self.row, changed, self)

    @cached_property
    def largest(self) -> LogitsRow:
        """The largest logit of each block."""
        if self._unchanged is not None:
            self._largest[:] = self._unchanged.largest
        self._kernel.largest(self._native, self._unchanged is not None)
        return self._largest

    def above(self, limit: float) -> Ids:
        """The ids of the logits of at least `limit` but not of minus infinity, ascending. The limit is a float32."""
        blocks = int(np.count_nonzero(self.largest >= max(limit, _LOWEST)))
        ids = np.empty(blocks * BLOCK, np.int64)
        return ids[: self._kernel.above(self._native, limit, address(ids))]

    def weights(self, most: float, factor: float) -> tuple[Numbers, float]:
        """For each block the sum of the weights exp((x - most) * factor), which are at most 1.

        Also the sum of the weights times their logarithms. Both are exact to 1 in 10^11.
        """
        weights = np.empty(len(self.largest), np.float64)
        return weights, self._kernel.weights(self._native, most, factor, address(weights))

    def moments(self, around: float) -> Numbers:
        """The number of logits above minus infinity, the sum of x - around, and the sum of its squares."""
        moments = np.empty(3, np.float64)
        self._kernel.moments(self._native, around, address(moments))
        return moments
