"""Which snapshots are kept: copies of a slot's recurrent state at one length, from which that length is restored.

A recurrent state belongs to the last token of a slot and cannot be truncated. Therefore a prefix is reusable only at
lengths for which the runner holds a snapshot. Slots share snapshots: a copied prefix needs no further memory.

Pure: it chooses numbers; the runner stores the states under them. The prefix cache owns it, in the engine's thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

TokenArray = NDArray[np.int32]
REGULAR_DISTANCE = 256
"""Tokens of a prompt after which a pass that ends on a border takes a snapshot, although no shared prefix is known."""

Held = Mapping[int, int]
"""The snapshots of one slot: their numbers by length in tokens."""


class Snapshots:
    """The numbers of snapshots, from 0 to `count - 1`, with the time of their last use. `count`: see `Runner`.

    `distance`: tokens between two borders, the lengths at which snapshots are taken.
    """

    def __init__(self, count: int, distance: int) -> None:
        self.count = count
        self._distance = distance
        self._last_used: dict[int, int] = {}

    def border(self, most: int) -> int:
        """The last border up to `most` tokens."""
        return most // self._distance * self._distance

    def is_regular(self, length: int, longest: int) -> bool:
        """Whether a pass that ends at a length takes a snapshot in any case. `longest`: the last snapshot before."""
        return length == self.border(length) and length - longest >= REGULAR_DISTANCE

    def mark_used(self, snapshot: int, now: int) -> None:
        """Record that a snapshot was saved or restored. `now`: the number of uses of slots so far."""
        self._last_used[snapshot] = now

    def choose(self, held: Iterable[Held], now: int) -> int:
        """The number for a new snapshot: one that no slot holds, or else that of the least useful snapshot.

        The use of a snapshot is the number of tokens that are computed again without it. The longest one of a slot
        counts with its whole length, because the same text and its continuations start from it. The use is divided by
        the time since the last use.
        """
        tokens: dict[int, int] = {}
        for snapshots in held:
            before, longest = 0, max(snapshots, default=0)
            for length in sorted(snapshots):
                number = snapshots[length]
                tokens[number] = max(tokens.get(number, 0), length if length == longest else length - before)
                before = length
        if len(tokens) < self.count:
            return next(number for number in range(self.count) if number not in tokens)
        return min(tokens, key=lambda number: tokens[number] / (1 + now - self._last_used[number]))

    def check(self, held: Iterable[tuple[Held, TokenArray]]) -> None:
        """Raise `AssertionError` if the snapshots of slots with the given tokens are inconsistent."""
        texts: dict[int, set[bytes]] = {}
        for snapshots, tokens in held:
            assert max(snapshots, default=0) <= len(tokens), "a slot has snapshots of tokens that it holds"
            for length, number in snapshots.items():
                texts.setdefault(number, set()).add(tokens[:length].tobytes())
        assert all(len(each) == 1 for each in texts.values()), "a snapshot belongs to one text"
        assert len(texts) <= self.count, "the number of snapshots is bounded"
