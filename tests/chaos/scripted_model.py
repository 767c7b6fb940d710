"""A model without computation: a table maps the last token to the next row of logits.

It has the vocabulary of `tests/scripted_engine.py`: all bytes, some words and special tokens. So any text is a prompt.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import scripted_engine
from afterword.engine import messages
from afterword.engine.core.forward_batch import CopyPrefix, ForwardBatch, Logits, Truncate
from afterword.engine.protocol import ModelInfo
from afterword.engine.worker import worker_main

VOCABULARY = len(scripted_engine.PIECES)
_IDS = {piece: token for token, piece in enumerate(scripted_engine.PIECES)}
_PLAIN_PIECES = sorted((*(bytes([byte]) for byte in range(256)), *scripted_engine.WORDS), key=len, reverse=True)
_PLAIN = re.compile(b"|".join(map(re.escape, _PLAIN_PIECES)), re.DOTALL)
_ANY = re.compile(b"|".join(name.encode() for name in scripted_engine.SPECIAL) + b"|" + _PLAIN.pattern, re.DOTALL)
HOLD = "SCRIPTED_HOLD"  # names a file: while it exists and each slot holds `_HELD_AT` tokens, `run` waits
_HELD_AT = 50
_END = 2.0  # above the standard deviation of other logits: a text ends after some tens of tokens


def load(settings: messages.LoadModel, _: worker_main.ReportProgress) -> worker_main.LoadedModel:
    """Model info like a real model's, with the context and sequences of `settings`."""
    model_info = ModelInfo(
        parameters=1,
        context=settings.context,
        sequences=settings.sequences,
        pieces=scripted_engine.PIECES,
        end_tokens=(scripted_engine.EOS,),
        bos=None,
        eos=scripted_engine.EOS,
        add_bos=False,
        space_prefix=False,
        longest_token=6,
        infill=scripted_engine.INFILL,
        fingerprint="fp_scripted",
        promise="exact",
    )
    return worker_main.LoadedModel(TableRunner(settings.sequences, settings.chunk), model_info, tokenize)


def tokenize(text: str, special: bool) -> Iterator[tuple[int, ...]]:
    """Split a text into the longest pieces. `special`: names of special tokens become those tokens, not plain text."""
    yield tuple(_IDS[piece] for piece in (_ANY if special else _PLAIN).findall(text.encode()))


class TableRunner:
    """A runner with slots that hold only their number of tokens."""

    grid, min_shared_tokens, can_truncate, max_snapshots, capacity, joins_prompts = 1, 16, True, 0, None, False

    def __init__(self, slots: int, chunk: int) -> None:
        self.slots, self.chunk = slots, chunk
        self._held: list[int] = [0] * slots
        self._table = np.random.default_rng(1).normal(size=(VOCABULARY, VOCABULARY)).astype(np.float32)
        self._table[:, scripted_engine.EOS] += _END
        self._hold = Path(os.environ[HOLD]) if HOLD in os.environ else None

    def free_tokens(self) -> None:
        return None

    def run(self, batch: ForwardBatch) -> Logits:
        while self._hold and min(self._held) >= _HELD_AT and self._hold.exists():
            time.sleep(0.01)
        for move in batch.slot_operations:
            if isinstance(move, CopyPrefix):
                self._held[move.target] = move.keep
            elif isinstance(move, Truncate):
                self._held[move.slot] = move.keep
        for row in batch.entries:
            self._held[row.slot] = row.position + len(row.tokens)
        wanted = [token for row in batch.entries for token in row.tokens[len(row.tokens) - row.outputs :]]
        return self._table[wanted]

    def cached_tokens(self, slot: int) -> int:
        return self._held[slot]
