"""On a GPU every pass of single tokens has the same shape, so that the same kernels compute it whoever is there.

Kernels are chosen by how many rows a pass has and by the longest sequence among them. So every slot has a row: those
that nobody needs get a token that is forgotten again. And one slot more holds a whole context, always. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from afterword.engine.core.forward_batch import BatchEntry, Truncate

_TOKEN = 0  # any will do


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """Rows to compute instead, what to forget afterwards, and which of their rows of logits were asked for."""

    rows: tuple[BatchEntry, ...]
    truncations: tuple[Truncate, ...]
    wanted: tuple[int, ...]


def pad_to_fixed_shape(rows: tuple[BatchEntry, ...], lengths: Sequence[int]) -> PaddedBatch:
    """Rows of one token for all slots, which hold so many tokens each. A piece of a prompt stays as it is."""
    if any(len(row.tokens) > 1 for row in rows):
        return PaddedBatch(rows, (), tuple(range(sum(row.outputs for row in rows))))
    asked = {row.slot: row for row in rows}
    tokens = [asked[slot].tokens if slot in asked else (_TOKEN,) for slot in range(len(lengths))]
    return PaddedBatch(
        tuple(BatchEntry(slot, lengths[slot], token, 1) for slot, token in enumerate(tokens)),
        tuple(Truncate(slot, length) for slot, length in enumerate(lengths) if slot not in asked),
        tuple(row.slot for row in rows if row.outputs),
    )
