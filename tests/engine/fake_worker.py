"""An engine's process without a model: the real process code over `HistoryRunner`.

The path in `LoadModel` says how it fares: "refuse" cannot be loaded, "vanish" dies while loading, "slow" never ends
loading, "confuse" holds a token that nobody gave it, "unsure" promises nothing of its numbers. That of a file is a
model whose fingerprint is what the file holds. A prompt that contains token 99 kills it, and so does one text. A text
that begins with `SLOW` is tokenized for ever, part by part; one that is `STUCK` without an end to a part.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from history_runner import VOCABULARY, HistoryRunner

from afterword.engine import messages
from afterword.engine.core.forward_batch import ForwardBatch, Logits
from afterword.engine.protocol import ModelInfo
from afterword.engine.worker import worker_main
from afterword.errors import EngineError, SettingError

DEADLY = 99  # beyond the vocabulary, so that it is never sampled
DEADLY_TEXT = "deadly"
FAULTY_TEXT = "faulty"  # at which the tokenizer raises
SLOW, STUCK = "slow", "stuck"


class DeadlyRunner(HistoryRunner):
    def run(self, batch: ForwardBatch) -> Logits:
        if any(DEADLY in row.tokens for row in batch.entries):
            os._exit(1)
        return super().run(batch)


class ConfusedRunner(HistoryRunner):
    def cached_tokens(self, slot: int) -> int:
        return super().cached_tokens(slot) + (slot == 0 and self.computed > 0)


def load(settings: messages.LoadModel, _: worker_main.ReportProgress) -> worker_main.LoadedModel:
    if settings.path == "refuse":
        raise SettingError("This model is not to be had.")
    if settings.path == "vanish":
        os._exit(1)
    if settings.path == "slow":
        time.sleep(10**6)
    model_info = ModelInfo(
        parameters=0,
        context=settings.context,
        sequences=settings.sequences,
        pieces=tuple(bytes([65 + token]) for token in range(VOCABULARY)),
        end_tokens=(0,),
        bos=None,
        eos=0,
        add_bos=False,
        space_prefix=False,
        longest_token=1,
        infill=None,
        fingerprint=content(settings.path),
        promise="none" if settings.path == "unsure" else "exact",
    )
    runner = ConfusedRunner if settings.path == "confuse" else DeadlyRunner
    check = partial(confirm, settings.path, model_info.fingerprint)
    return worker_main.LoadedModel(runner(settings.sequences, settings.chunk), model_info, tokenize, check=check)


def content(path: str) -> str:
    return Path(path).read_text() if os.path.isfile(path) else "fp_history"


def confirm(path: str, fingerprint: str) -> None:
    if content(path) != fingerprint:
        raise EngineError("The file was changed.")


def tokenize(text: str, _: bool) -> Iterator[tuple[int, ...]]:
    if text == FAULTY_TEXT:
        raise ValueError(text)
    if text == DEADLY_TEXT:
        os._exit(1)
    while text.startswith((SLOW, STUCK)):
        time.sleep(0.01 if text.startswith(SLOW) else 3600)
        yield ()
    for letter in text:
        yield (ord(letter) - 65,)


if __name__ == "__main__":
    worker_main.serve(load)
