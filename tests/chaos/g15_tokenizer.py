"""G15: long runs of one thing, which recursive and quadratic tokenizers die of, are tokenized soon and whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from itertools import product
from pathlib import Path
from random import Random

import pytest

from afterword.engine import child
from afterword.engine.llama import library
from afterword.engine.llama.library import native
from afterword.engine.llama.vocabulary import Vocabulary
from afterword.models.registry import locate, parse_spec

from . import ROOT
from .gate import Fault, Gate, Result, Trial
from .server import beside

PATIENCE, SLOWEST = 60, 2.0  # seconds: before a process is given up; of the processor, for one text
CONTEXT = 4096  # tokens, of which none spells more than the vocabulary's longest: no longer text is tokenized
UNITS = (
    "a",
    "A",
    " ",
    "\n",
    "\t",
    "0",
    "!",
    "é",
    "漢",
    "😀",
    "\u0301",
    "\0",
    "ab ",
    "<s>",
    "aB3$",
    "\r\n ",
    "ـ",
    "\u200d",
)
SIZES = (1_000, 10_000, None)
"""Bytes; None: as many as could fit the context."""
SHARED = sorted((ROOT.parent / "shared" / "vocabs").glob("*.gguf"))


def run(trial: Trial) -> Result:
    """The built-in vocabulary first; those that lie beside the repository while the size reaches."""
    vocabularies = [locate(parse_spec(None)).path, *SHARED]
    figures = {"vocabularies": 0, "died or hung": 0, "changed": 0, "slowest s": 0.0}
    tried = 0
    for path in vocabularies:
        cases = [*product(UNITS, SIZES)]
        Random(trial.seed).shuffle(cases)
        cases = cases[: trial.size - tried]
        if cases:
            tried += len(cases)
            figures["vocabularies"] += 1
            trial.say(f"G15 {path.name}")
            _try_all(path, cases, trial.planted is not None, figures)
    passed = not figures["died or hung"] and not figures["changed"] and figures["slowest s"] <= SLOWEST
    return Result(passed and tried == trial.size, figures)


def _try_all(path: Path, cases: list[tuple[str, int | None]], planted: bool, figures: dict[str, float]) -> None:
    waiting = iter(cases)
    left = True
    while left:
        with beside("g15_tokenizer", str(path), *(["planted"] if planted else [])) as process:
            left = False
            for unit, size in waiting:
                answer = _ask(process, unit, size)
                if answer is None:
                    figures["died or hung"] += 1
                    left = True
                    break
                same, seconds = answer
                figures["changed"] += not same
                figures["slowest s"] = max(figures["slowest s"], seconds)


def _ask(process: subprocess.Popen[str], unit: str, size: int | None) -> tuple[bool, float] | None:
    assert process.stdin is not None
    assert process.stdout is not None
    impatience = threading.Timer(PATIENCE, process.kill)
    impatience.start()
    try:
        process.stdin.write(json.dumps([unit, size]) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except BrokenPipeError:
        line = ""
    finally:
        impatience.cancel()
    return tuple(json.loads(line)) if line else None


def main() -> None:
    """The process that may die: a unit and a size a line in; whether the text came back whole, and seconds, out."""
    path, *planted = sys.argv[1:]
    if planted:
        GATE.fault.plant(pytest.MonkeyPatch())
    threading.stack_size(child._TOKENIZER_STACK)  # as the engine's process does
    thread = threading.Thread(target=_tokenize_all, args=(path,))
    thread.start()
    thread.join()


def _tokenize_all(path: str) -> None:
    library.start(False)
    params = native.llama_model_default_params()
    params.vocab_only = True
    vocabulary = Vocabulary(native.llama_model_load_from_file(os.fsencode(path), params))
    pieces = vocabulary.pieces()
    longest = max(map(len, pieces))
    for line in sys.stdin:
        unit, size = json.loads(line)
        text = unit * max(1, (size or CONTEXT * longest) // len(unit.encode()))
        start = time.thread_time()  # others use the machine too
        tokens = vocabulary.tokenize(text, False)
        seconds = time.thread_time() - start
        spelled = b"".join(pieces[token] for token in tokens)
        print(json.dumps([text.encode() in (spelled, spelled[1:]), seconds]), flush=True)


def end_at_nul(patch: pytest.MonkeyPatch) -> None:
    tokenize = Vocabulary.tokenize
    patch.setattr(Vocabulary, "tokenize", lambda self, text, special: tokenize(self, text.partition("\0")[0], special))


GATE = Gate(
    name="G15",
    goal="runs of one thing up to the context's length: no crash, at most 2 s, spelled back whole",
    unit="texts",
    commit=len(UNITS) * len(SIZES),
    nightly=len(UNITS) * len(SIZES) * (1 + len(SHARED)),
    run=run,
    fault=Fault("texts end at a NUL, as strings do in C", "gate", end_at_nul),
    planted=len(UNITS) * len(SIZES),
)

if __name__ == "__main__":
    main()
