"""The tokens that a sample has generated, with their counts, in arrays that grow.

The arrays are updated token by token, so the cost of a step does not grow with the length of the text.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

_INITIAL_CAPACITY = 64  # distinct tokens


class TokenCounts:
    """Distinct tokens in the order in which they first appeared, and how often each was added."""

    __slots__ = ("_counts", "_ids", "_indexes", "addresses")

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._indexes: dict[int, int] = {}
        self._ids, self._counts = np.zeros(_INITIAL_CAPACITY, np.int64), np.zeros(_INITIAL_CAPACITY, np.int64)
        self._update_addresses()
        for token in tokens:
            self.add(token)

    def copy(self) -> TokenCounts:
        """An independent copy."""
        other = TokenCounts()
        other._indexes = dict(self._indexes)
        other._ids, other._counts = self._ids.copy(), self._counts.copy()
        other._update_addresses()
        return other

    def __len__(self) -> int:
        return len(self._indexes)

    @property
    def ids(self) -> NDArray[np.int64]:
        """The distinct token ids. Shape: (len(self),)."""
        return self._ids[: len(self)]

    @property
    def counts(self) -> NDArray[np.int64]:
        """The count of each id. Shape: (len(self),)."""
        return self._counts[: len(self)]

    def add(self, token: int) -> None:
        """Count a token once more."""
        index = self._indexes.setdefault(token, len(self._indexes))
        if index == len(self._ids):
            self._ids, self._counts = np.resize(self._ids, 2 * index), np.resize(self._counts, 2 * index)
            self._counts[index:] = 0
            self._update_addresses()
        self._ids[index] = token
        self._counts[index] += 1

    def remove(self, token: int) -> None:
        """Undo the last `add`, which added this token."""
        index = self._indexes[token]
        self._counts[index] -= 1
        if not self._counts[index]:
            del self._indexes[token]  # the newest id, so the arrays need no other change

    def _update_addresses(self) -> None:
        self.addresses = self._ids.ctypes.data, self._counts.ctypes.data
        """Memory addresses of ids and counts, for compiled code. They can change when a token is added."""
