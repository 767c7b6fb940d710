"""A worker process without a model: the real `worker_main` with `HistoryRunner`.

The path in `LoadModel` selects the behaviour:

- "refuse": loading fails with `SettingError`.
- "vanish": the process exits while loading.
- "starve": there is no memory for the model.
- "crowd": after the model no further thread can be started.
- "slow": loading never ends.
- "confuse": slot 0 holds one token more than was computed.
- "unsure": the model info has the promise "none".
- the path of a file: the read_fingerprint of the file is the model's fingerprint.

A grammar that is `DEADLY_TEXT` ends the process when it is compiled, and the constrained tokens are lower case letters.
A prompt that contains `DEADLY` and the text `DEADLY_TEXT` end the process. A text that begins with `SLOW` is tokenized
for ever, part by part. A text that begins with `STUCK` never finishes a part.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from history_runner import VOCABULARY, HistoryRunner

from afterword.engine import messages
from afterword.engine.core.forward_batch import ForwardBatch, Logits
from afterword.engine.grammar import grammar_threads
from afterword.engine.grammar.compiled_grammar import GrammarTokens, Place, compile_grammar
from afterword.engine.protocol import Grammar, ModelInfo
from afterword.engine.worker import worker_main
from afterword.errors import EngineError, SettingError

DEADLY = 99  # outside the vocabulary, so that it is never sampled
DEADLY_TEXT = "deadly"
FAULTY_TEXT = "faulty"  # the tokenizer raises an exception
SLOW, STUCK = "slow", "stuck"


class DeadlyRunner(HistoryRunner):
    def run(self, batch: ForwardBatch) -> Logits:
        if any(DEADLY in entry.tokens for entry in batch.entries):
            os._exit(1)
        return super().run(batch)


class ConfusedRunner(HistoryRunner):
    def cached_tokens(self, slot: int) -> int:
        return super().cached_tokens(slot) + (slot == 0 and self.computed > 0)


def load(settings: messages.LoadModel, _: worker_main.ReportProgress) -> worker_main.LoadedModel:
    if settings.path == "refuse":
        raise SettingError("This model cannot be loaded.")
    if settings.path == "vanish":
        os._exit(1)
    if settings.path == "starve":
        raise MemoryError
    if settings.path == "crowd":
        threading.Thread.start = start_no_thread  # type: ignore[method-assign]
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
        fingerprint=read_fingerprint(settings.path),
        promise="none" if settings.path == "unsure" else "exact",
    )
    grammar_threads.compile_grammar = compile_or_die
    runner = ConfusedRunner if settings.path == "confuse" else DeadlyRunner
    check = partial(check_fingerprint, settings.path, model_info.fingerprint)
    return worker_main.LoadedModel(
        *(runner(settings.sequences, settings.chunk), model_info, tokenize),
        check=check,
        token_texts=[bytes([97 + token]) for token in range(VOCABULARY)],
    )


def start_no_thread(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def compile_or_die(grammar: Grammar, tokens: GrammarTokens) -> Place:
    if grammar.text == DEADLY_TEXT:
        os._exit(1)
    return compile_grammar(grammar, tokens)


def read_fingerprint(path: str) -> str:
    return Path(path).read_text() if os.path.isfile(path) else "fp_history"


def check_fingerprint(path: str, fingerprint: str) -> None:
    if read_fingerprint(path) != fingerprint:
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
