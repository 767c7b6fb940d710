"""An engine's process without a model: the real process code over `HistoryRunner`.

The path in `Open` says how it fares: "refuse" cannot be loaded, "vanish" dies while loading, "confuse" holds a token
that nobody gave it, "unsure" promises nothing of its numbers. A prompt that contains token 99 kills it, and so does one
text. A text that begins with `SLOW` is tokenized for ever, part by part; one that is `STUCK` without an end to a part.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from history import VOCABULARY, HistoryRunner

from afterword.engine import child, frames
from afterword.engine.core.batch import Batch, Logits
from afterword.engine.protocol import Card
from afterword.errors import SettingError

DEADLY = 99  # beyond the vocabulary, so that it is never sampled
DEADLY_TEXT = "deadly"
SLOW, STUCK = "slow", "stuck"


class DeadlyRunner(HistoryRunner):
    def run(self, batch: Batch) -> Logits:
        if any(DEADLY in row.tokens for row in batch.rows):
            os._exit(1)
        return super().run(batch)


class ConfusedRunner(HistoryRunner):
    def held(self, slot: int) -> int:
        return super().held(slot) + (slot == 0 and self.computed > 0)


def load(settings: frames.Open, _: child.Tell) -> child.Loaded:
    if settings.path == "refuse":
        raise SettingError("This model is not to be had.")
    if settings.path == "vanish":
        os._exit(1)
    card = Card(
        parameters=0,
        context=settings.context,
        sequences=settings.sequences,
        pieces=tuple(bytes([65 + token]) for token in range(VOCABULARY)),
        ends=(0,),
        bos=None,
        eos=0,
        add_bos=False,
        space_prefix=False,
        longest=1,
        infill=None,
        fingerprint="fp_history",
        promise="none" if settings.path == "unsure" else "exact",
    )
    runner = ConfusedRunner if settings.path == "confuse" else DeadlyRunner
    return child.Loaded(runner(settings.sequences, settings.chunk), card, tokenize)


def tokenize(text: str, _: bool) -> Iterator[tuple[int, ...]]:
    if text == DEADLY_TEXT:
        os._exit(1)
    while text.startswith((SLOW, STUCK)):
        time.sleep(0.01 if text.startswith(SLOW) else 3600)
        yield ()
    for letter in text:
        yield (ord(letter) - 65,)


if __name__ == "__main__":
    child.serve(load)
