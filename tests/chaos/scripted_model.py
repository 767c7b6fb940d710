"""A model that computes nothing: the next row of logits depends on the last token alone, by a table.

It speaks `tests/scripted.py`'s vocabulary: every byte, some words and special tokens, so any text can be asked.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import scripted
from afterword.engine import child, frames
from afterword.engine.core.batch import Batch, Fork, Logits
from afterword.engine.protocol import Card

VOCABULARY = len(scripted.PIECES)
_IDS = {piece: token for token, piece in enumerate(scripted.PIECES)}
_PLAIN_PIECES = sorted((*(bytes([byte]) for byte in range(256)), *scripted.WORDS), key=len, reverse=True)
_PLAIN = re.compile(b"|".join(map(re.escape, _PLAIN_PIECES)), re.DOTALL)
_ANY = re.compile(b"|".join(name.encode() for name in scripted.SPECIAL) + b"|" + _PLAIN.pattern, re.DOTALL)
HOLD = "SCRIPTED_HOLD"  # names a file: while it is there and every slot holds so many tokens, nothing more is computed
_HELD_AT = 50
_END = 2.0  # above the others' scatter: a text ends after some tens of tokens


def load(settings: frames.Open, _: child.Tell) -> child.Loaded:
    """A card like a model's, of the context and sequences that are asked for."""
    card = Card(
        parameters=1,
        context=settings.context,
        sequences=settings.sequences,
        pieces=scripted.PIECES,
        ends=(scripted.EOS,),
        bos=None,
        eos=scripted.EOS,
        add_bos=False,
        space_prefix=False,
        longest=6,
        infill=scripted.INFILL,
        fingerprint="fp_scripted",
        promise="exact",
    )
    return child.Loaded(TableRunner(settings.sequences, settings.chunk), card, tokenize)


def tokenize(text: str, special: bool) -> Iterator[tuple[int, ...]]:
    """The longest pieces. `special`: names of special tokens are those tokens, else they are spelled."""
    yield tuple(_IDS[piece] for piece in (_ANY if special else _PLAIN).findall(text.encode()))


class TableRunner:
    """State of a slot: the tokens in it."""

    grid, least_shared, rewinds = 1, 16, True

    def __init__(self, slots: int, chunk: int) -> None:
        self.slots, self.chunk = slots, chunk
        self._held: list[int] = [0] * slots
        self._table = np.random.default_rng(1).normal(size=(VOCABULARY, VOCABULARY)).astype(np.float32)
        self._table[:, scripted.EOS] += _END
        self._hold = Path(os.environ[HOLD]) if HOLD in os.environ else None

    def run(self, batch: Batch) -> Logits:
        while self._hold and min(self._held) >= _HELD_AT and self._hold.exists():
            time.sleep(0.01)
        for move in batch.moves:
            if isinstance(move, Fork):
                self._held[move.target] = move.keep
            else:
                self._held[move.slot] = move.keep
        for row in batch.rows:
            self._held[row.slot] = row.position + len(row.tokens)
        wanted = [token for row in batch.rows for token in row.tokens[len(row.tokens) - row.outputs :]]
        return self._table[wanted]

    def held(self, slot: int) -> int:
        return self._held[slot]
