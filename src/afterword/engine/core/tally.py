"""How often a sample has generated which tokens: arrays that grow, so that a step costs no more for a long text."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

_ROOM = 64  # tokens at first


class Tally:
    """Distinct tokens in the order of their first time, and how often each was added."""

    __slots__ = ("_ids", "_places", "_times", "addresses")

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._places: dict[int, int] = {}
        self._ids, self._times = np.zeros(_ROOM, np.int64), np.zeros(_ROOM, np.int64)
        self._settle()
        for token in tokens:
            self.add(token)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def ids(self) -> NDArray[np.int64]:
        """The tokens."""
        return self._ids[: len(self)]

    @property
    def times(self) -> NDArray[np.int64]:
        """How often each."""
        return self._times[: len(self)]

    def add(self, token: int) -> None:
        """Count a token once more."""
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._ids):
            self._ids, self._times = np.resize(self._ids, 2 * place), np.resize(self._times, 2 * place)
            self._times[place:] = 0
            self._settle()
        self._ids[place] = token
        self._times[place] += 1

    def _settle(self) -> None:
        self.addresses = self._ids.ctypes.data, self._times.ctypes.data
        """Where ids and times are, for compiled code; they move when a token is added."""
