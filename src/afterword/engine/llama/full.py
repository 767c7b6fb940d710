"""On a GPU every pass of single tokens has the same shape, so that the same kernels compute it whoever is there.

Kernels are chosen by how many rows a pass has and by the longest sequence among them. So every slot has a row: those
that nobody needs get a token that is forgotten again. And one slot more holds a whole context, always. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from afterword.engine.core.batch import Cut, Row

_TOKEN = 0  # any will do


@dataclass(frozen=True, slots=True)
class Filled:
    """Rows to compute instead, what to forget afterwards, and which of their rows of logits were asked for."""

    rows: tuple[Row, ...]
    forget: tuple[Cut, ...]
    wanted: tuple[int, ...]


def fill(rows: tuple[Row, ...], lengths: Sequence[int]) -> Filled:
    """Rows of one token for all slots, which hold so many tokens each. A piece of a prompt stays as it is."""
    if any(len(row.tokens) > 1 for row in rows):
        return Filled(rows, (), tuple(range(sum(row.outputs for row in rows))))
    asked = {row.slot: row for row in rows}
    tokens = [asked[slot].tokens if slot in asked else (_TOKEN,) for slot in range(len(lengths))]
    return Filled(
        tuple(Row(slot, lengths[slot], token, 1) for slot, token in enumerate(tokens)),
        tuple(Cut(slot, length) for slot, length in enumerate(lengths) if slot not in asked),
        tuple(row.slot for row in rows if row.outputs),
    )
