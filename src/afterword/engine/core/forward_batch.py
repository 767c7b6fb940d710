"""One forward pass as a value: what the scheduler decides and a runner executes.

A slot is one of the runner's places for a sequence's state (its keys and values); its first `position` tokens
are computed. Nothing here knows how a runner keeps that state.
"""

from __future__ import annotations

from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]


class CopyPrefix(msgspec.Struct, frozen=True):
    """Copy the first `keep` tokens' state from one slot to another, whose own state is lost."""

    source: int
    target: int
    keep: int


class Truncate(msgspec.Struct, frozen=True):
    """Forget everything in a slot after its first `keep` tokens."""

    slot: int
    keep: int


class BatchEntry(msgspec.Struct, frozen=True):
    """Tokens to compute in one slot, the first of them at `position`; logits are wanted for the last `outputs`."""

    slot: int
    position: int
    tokens: tuple[int, ...]
    outputs: int


class ForwardBatch(msgspec.Struct, frozen=True):
    """Moves first, in order; then one pass over all rows. Either many rows of one token, or one row of many.

    The two are never mixed, because a token's numbers must not depend on other sequences: a library may cut
    a mixed batch wherever its neighbours' lengths suggest.
    """

    slot_operations: tuple[CopyPrefix | Truncate, ...]
    entries: tuple[BatchEntry, ...]

    @property
    def outputs(self) -> int:
        """How many rows of logits the pass gives."""
        return sum(row.outputs for row in self.entries)


class Runner(Protocol):
    """A library that holds a model and the state of `slots` sequences."""

    slots: int
    """How many sequences there is room for."""
    chunk: int
    """The most tokens of a prompt in one pass."""
    grid: int
    """Passes over a prompt end on multiples of this, so that a token's numbers do not depend on where others ended.
    1 where it does not matter at all how tokens are grouped, generated ones included."""
    min_shared_tokens: int
    """A beginning that is shared by fewer tokens is computed anew: copying a slot costs about as much."""
    can_truncate: bool
    """Whether a slot can be cut to a length other than 0 (a recurrent model's cannot)."""

    def run(self, batch: ForwardBatch) -> Logits:
        """Execute a batch. Returns (batch.outputs, vocabulary) logits, rows in order, valid until the next call.

        Raises `EngineError` if the library fails; the state of every slot is then unknown.
        """
        ...

    def cached_tokens(self, slot: int) -> int:
        """How many tokens' state a slot holds."""
        ...
