"""One forward pass as a value: the scheduler decides it and a runner executes it.

A slot is the part of the runner's KV cache that holds one sequence. Its first `position` tokens are computed. This
module does not depend on how a runner stores that state.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]


class CopyPrefix(msgspec.Struct, frozen=True):
    """Copy the state of the first `keep` tokens from slot `source` to slot `target`. The target's state is lost.

    `snapshot`: see `Truncate`.
    """

    source: int
    target: int
    keep: int
    snapshot: int | None = None


class Truncate(msgspec.Struct, frozen=True):
    """Delete the state of everything in a slot after its first `keep` tokens.

    `snapshot`: the number of a snapshot at the length `keep`, if the runner cannot truncate without one.
    """

    slot: int
    keep: int
    snapshot: int | None = None


class SaveState(msgspec.Struct, frozen=True):
    """Keep a snapshot of a slot's recurrent state at its present length. It replaces the one with the same number."""

    slot: int
    snapshot: int


class RestorePrefix(msgspec.Struct, frozen=True):
    """Replace the state of a slot by a stored one, and delete everything after its first `keep` tokens.

    `state`: a state of at least `keep` tokens, as a `PrefixStore` returns it. If slots cannot be truncated, it has
    exactly `keep`.
    """

    slot: int
    keep: int
    state: object


SlotOperation = CopyPrefix | Truncate | SaveState | RestorePrefix


class BatchEntry(msgspec.Struct, frozen=True):
    """Tokens to compute in one slot, the first of them at `position`. The last `outputs` tokens produce logits rows."""

    slot: int
    position: int
    tokens: tuple[int, ...]
    outputs: int


class ForwardBatch(msgspec.Struct, frozen=True):
    """Slot operations, to be done first and in order; then one pass over all entries.

    The entries are either many of one token each (decode) or one of many tokens (prefill), or several of those if
    `Runner.joins_prompts`. Otherwise a token's numbers may depend on other sequences: a library may split a mixed batch
    at points that depend on the lengths of the other entries. Without entries only the slot operations are done.
    """

    slot_operations: tuple[SlotOperation, ...]
    entries: tuple[BatchEntry, ...]

    @property
    def outputs(self) -> int:
        """The number of logits rows that the pass produces."""
        return sum(entry.outputs for entry in self.entries)


@dataclass(frozen=True, slots=True)
class SlotRules:
    """How a runner's slots can be used. The fields are attributes of `Runner` and described there."""

    slots: int
    grid: int
    min_shared_tokens: int
    can_truncate: bool
    max_snapshots: int = 0
    capacity: int | None = None


def slot_rules(runner: Runner) -> SlotRules:
    """The rules of a runner."""
    return SlotRules(*(getattr(runner, each.name) for each in fields(SlotRules)))


class Runner(Protocol):
    """A library that holds a model and the state of `slots` sequences."""

    slots: int
    """The number of slots."""
    capacity: int | None
    """The most tokens in all slots together, at least those of one full slot. None: every slot can be full."""
    chunk: int
    """The most tokens of a prompt in one pass."""
    grid: int
    """Prefill passes end at multiples of this, so that a token's numbers do not depend on other requests.
    1: the grouping of tokens into passes has no effect on their numbers, not even for generated tokens."""
    joins_prompts: bool
    """Whether a pass should compute chunks of several prompts. Requires a grid of 1. A mixture of experts reads most of
    its weights even for few tokens, so one pass takes less time than one for each prompt."""
    min_shared_tokens: int
    """A shared prefix of fewer tokens is computed again, because copying a slot costs about as much."""
    can_truncate: bool
    """Whether a slot can be truncated to any length. A recurrent model's slot only can to 0 or with a snapshot."""
    max_snapshots: int
    """The most snapshots that it can hold, with numbers from 0. 0 if it needs none or cannot take any."""

    def run(self, batch: ForwardBatch) -> Logits:
        """Execute a batch. Returns logits of shape (batch.outputs, vocabulary), in order, valid until the next call.

        Raises `EngineError` if the library fails. The state of every slot is then unknown.
        """
        ...

    def free_tokens(self) -> int | None:
        """How many more tokens the machine has memory for. None if the memory of all slots was taken at the start."""
        ...

    def cached_tokens(self, slot: int) -> int:
        """The number of tokens in a slot."""
        ...
