"""How often a sample has generated which tokens: arrays that grow, so that a step costs no more for a long text."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

_INITIAL_CAPACITY = 64  # tokens at first


class TokenCounts:
    """Distinct tokens in the order of their first time, and how often each was added."""

    __slots__ = ("_counts", "_ids", "_places", "addresses")

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._places: dict[int, int] = {}
        self._ids, self._counts = np.zeros(_INITIAL_CAPACITY, np.int64), np.zeros(_INITIAL_CAPACITY, np.int64)
        self._trim()
        for token in tokens:
            self.add(token)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def ids(self) -> NDArray[np.int64]:
        """The tokens."""
        return self._ids[: len(self)]

    @property
    def counts(self) -> NDArray[np.int64]:
        """How often each."""
        return self._counts[: len(self)]

    def add(self, token: int) -> None:
        """Count a token once more."""
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._ids):
            self._ids, self._counts = np.resize(self._ids, 2 * place), np.resize(self._counts, 2 * place)
            self._counts[place:] = 0
            self._trim()
        self._ids[place] = token
        self._counts[place] += 1

    def _trim(self) -> None:
        self.addresses = self._ids.ctypes.data, self._counts.ctypes.data
        """Where ids and times are, for compiled code; they move when a token is added."""
