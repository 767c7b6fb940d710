"""Pads decode passes on a GPU to one fixed shape, so that the same kernels compute every pass.

The CUDA back end chooses its kernels by the number of rows and by the longest sequence of a pass. So every slot gets a
row: an unused slot gets an arbitrary token, which is truncated after the pass. One additional slot always holds a whole
context. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from afterword.engine.core.forward_batch import BatchEntry, Truncate

_TOKEN = 0  # any token id is valid here


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """A padded batch.

    `entries`: to compute. `truncations`: to apply after the pass. `wanted`: the indices of the logits rows that the
    original batch requests.
    """

    entries: tuple[BatchEntry, ...]
    truncations: tuple[Truncate, ...]
    wanted: tuple[int, ...]


def pad_to_fixed_shape(entries: tuple[BatchEntry, ...], lengths: Sequence[int]) -> PaddedBatch:
    """Pad a decode batch to one token for every slot. A batch with a chunk of a prompt is returned unchanged.

    `lengths`: how many tokens each slot holds.
    """
    if any(len(entry.tokens) > 1 for entry in entries):
        return PaddedBatch(entries, (), tuple(range(sum(entry.outputs for entry in entries))))
    by_slot = {entry.slot: entry for entry in entries}
    tokens = [by_slot[slot].tokens if slot in by_slot else (_TOKEN,) for slot in range(len(lengths))]
    return PaddedBatch(
        tuple(BatchEntry(slot, lengths[slot], token, 1) for slot, token in enumerate(tokens)),
        tuple(Truncate(slot, length) for slot, length in enumerate(lengths) if slot not in by_slot),
        tuple(entry.slot for entry in entries if entry.outputs),
    )
