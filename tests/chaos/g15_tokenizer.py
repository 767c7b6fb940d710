"""G15: long runs of one text, which crash or stall recursive and quadratic tokenizers, are tokenized fast and exactly.

Each is first tokenized in a process of its own. Then servers are sent the longest of them, by clients that wait and by
clients that leave, while another client's short texts and completions of one token have to be answered soon.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from random import Random

import pytest
from gguf import TokenType

from afterword.engine.llama import library
from afterword.engine.llama.library import native
from afterword.engine.llama.vocabulary import Vocabulary
from afterword.engine.parent.supervisor import QueuePolicy
from afterword.engine.worker.tokenizer_threads import TokenizerThreads, stack_bytes
from afterword.models.registry import locate, parse_spec
from oracle import tiny

from . import ROOT
from .client import Caller
from .gate import Fault, Gate, Result, Trial
from .server import Server, beside

PATIENCE, SLOWEST = 60, 2.0  # seconds: before a process is given up; of the processor, for one text
CONTEXT = 4096  # tokens, of which none spells more than the vocabulary's longest: no longer text is tokenized
LONGEST = QueuePolicy().max_text  # characters, of any text
LARGE = 32768  # tokens of context
UNITS = (
    "<|endoftext|>",
    "<",
    "</s>",
    "<unused7>",
    "<|im_start|>",
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
COMMIT = len(UNITS) * len(SIZES)
"""Bytes; None: as many as could fit the context."""
SHARED = sorted((ROOT.parent / "shared" / "vocabs").glob("*.gguf"))
HOSTILE = ("<|endoftext|>", "<unused7>", "<", "</s>", " ", "\n", "é", "a", "!", "<|endoftext|> a")
ABANDONED = 2  # requests for each text, before two that are waited for


@dataclass
class Beside:
    """What the servers did. `slowest`: seconds that the other client waited at most."""

    slowest: float = 0.0
    asked: int = 0
    wrong: int = 0
    restarts: int = 0


def run(trial: Trial) -> Result:
    """The built-in vocabulary first, then one like Gemma's; those beside the repository while the size reaches."""
    with tempfile.TemporaryDirectory() as folder:
        gemma = write_gemma(Path(folder, "gemma.gguf"))
        figures = _tokenize_beside(trial, [locate(parse_spec(None)).path, gemma, *SHARED])
        seen = Beside()
        length = LONGEST if trial.size > COMMIT else LONGEST // 2
        hostile = [(unit * (length // len(unit) + 1))[:length] for unit in HOSTILE[: max(1, trial.size // 6)]]
        with trial.serve("--parallel", "2") as server:
            asyncio.run(_press(server, hostile, seen))
        with trial.serve(str(gemma), "--parallel", "2", "--context", str(LARGE)) as server:
            asyncio.run(_press(server, hostile, seen))
    figures |= {"slowest beside s": round(seen.slowest, 2), "wrong": seen.wrong, "restarts": seen.restarts}
    passed = (
        figures["texts"] == trial.size
        and not figures["died or hung"]
        and not figures["changed"]
        and figures["slowest s"] <= SLOWEST
        and not seen.wrong
        and not seen.restarts
        and seen.slowest <= SLOWEST
    )
    del figures["texts"]
    return Result(passed, figures)


def write_gemma(path: Path) -> Path:
    """A SentencePiece model with what Gemma's vocabulary has: many tokens that are found by name, and runs."""
    runs = [(character * size, TokenType.USER_DEFINED) for character in "\n\t▁" for size in range(2, 32)]
    unused = [(f"<unused{number}>", TokenType.USER_DEFINED) for number in range(1000)]
    words = tiny.with_tokens(tiny.piece_vocabulary(infill=True, add_bos=True), *runs, *unused)
    shape = tiny.Shape(context=LARGE)
    return tiny.write_model(path, shape, words, tiny.random_weights(shape, words))


async def _press(server: Server, hostile: list[str], seen: Beside) -> None:
    other = asyncio.create_task(_ask_all_the_time(server, seen))
    for text in hostile:
        leaving = [Caller(server).ask_and_leave({"prompt": text}, 1, "/tokenize") for _ in range(ABANDONED)]
        asked = (Caller(server) for _ in range(2))
        bodies = ({"prompt": text}, "/tokenize"), ({"prompt": text, "max_tokens": LARGE}, "/v1/completions")
        *_, first, second = await asyncio.gather(
            *leaving, *(caller.ask(*body) for caller, body in zip(asked, bodies, strict=True))
        )
        seen.wrong += (first.status, second.status) != (200, 400)  # which is found out when the text is tokenized
    other.cancel()
    await asyncio.gather(other, return_exceptions=True)
    seen.restarts += server.load()["restarts"]
    seen.wrong += not seen.asked


async def _ask_all_the_time(server: Server, seen: Beside) -> None:
    caller = Caller(server)
    while True:
        for body, path in (({"prompt": "the cat"}, "/tokenize"), ({"prompt": "a", "max_tokens": 1}, "/v1/completions")):
            start = time.monotonic()
            reply = await caller.ask(body, path)
            seen.slowest = max(seen.slowest, time.monotonic() - start)
            seen.asked += 1
            seen.wrong += reply.status != 200


def _tokenize_beside(trial: Trial, vocabularies: list[Path]) -> dict[str, float]:
    figures = {"vocabularies": 0, "texts": 0, "died or hung": 0, "changed": 0, "slowest s": 0.0}
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
    return figures | {"texts": tried}


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
    threading.stack_size(stack_bytes("a" * LONGEST))  # as the engine's process does
    thread = threading.Thread(target=_tokenize_all, args=(path,))
    thread.start()
    thread.join()


def _tokenize_all(path: str) -> None:
    library.initialize(False)
    params = native.llama_model_default_params()
    params.vocab_only = True
    vocabulary = Vocabulary(native.llama_model_load_from_file(os.fsencode(path), params))
    pieces = vocabulary.pieces()
    longest = max(map(len, pieces))
    for line in sys.stdin:
        unit, size = json.loads(line)
        text = unit * min(LONGEST // len(unit), max(1, (size or CONTEXT * longest) // len(unit.encode())))
        start = time.thread_time()  # others use the machine too
        tokens = vocabulary.tokenize(text, True)
        seconds = time.thread_time() - start
        spelled = b"".join(pieces[token] for token in tokens)
        print(json.dumps([text.encode() in (spelled, spelled[1:]), seconds]), flush=True)


def keep_one_line(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Vocabulary, "parts", lambda self, text, special: iter([self._ids(text.encode(), special)]))
    patch.setattr(
        TokenizerThreads, "add", lambda self, message: (self._wanted.add(message.call), self._short.put(message))
    )


GATE = Gate(
    name="G15",
    goal="runs of one text up to the limits: no crash, exact round trip, no other request waits for more than 2 s",
    unit="texts",
    commit=COMMIT,
    nightly=COMMIT * (2 + len(SHARED)),
    run=run,
    fault=Fault("texts wait in one line, and llama.cpp finds their special tokens", "engine", keep_one_line),
    planted=6,
)

if __name__ == "__main__":
    main()
