"""G15: long runs of one text, which crash or stall recursive and quadratic tokenizers, are tokenized fast and exactly.

Each text is first tokenized in a separate process. Then clients that wait and clients that disconnect send the longest
texts to servers. Another client's short texts and completions of one token must be answered soon in the meantime.
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
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from random import Random

import pytest
from gguf import TokenType

from afterword.engine.llama import library
from afterword.engine.llama.library import native
from afterword.engine.llama.vocabulary import Vocabulary
from afterword.engine.parent.job_queue import QueuePolicy
from afterword.engine.worker.tokenizer_threads import TokenizerThreads, stack_bytes
from afterword.models.registry import locate, parse_spec
from oracle import tiny

from . import ROOT
from .client import ClientConnection
from .gate import Fault, Gate, Result, Trial
from .server import Server, helper_process

TIMEOUT, SLOWEST = 60, 2.0  # seconds until a process counts as hung; the longest wait of another request
RATIO = 6  # CPU time of a text over that of random words of the same length; quadratic time exceeds it by far
MEASURABLE = 0.05  # CPU seconds of random words; the time of shorter texts is compared with this
WORDS = "".join(Random(1).choices("etaoinshrdlu ", k=4096))  # no dictionary has them, so they need merges
CONTEXT = 4096  # tokens; a text longer than this many of the longest piece cannot fit and is not tokenized
LONGEST = QueuePolicy().max_text  # characters of a text
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
"""`SIZES` are in bytes; None: the most that can fit the context."""
SHARED = sorted((ROOT.parent / "shared" / "vocabs").glob("*.gguf"))
HOSTILE = ("<|endoftext|>", "<unused7>", "<", "</s>", " ", "\n", "é", "a", "!", "<|endoftext|> a")
ABANDONED = 2  # requests for each text whose clients disconnect, before two whose clients wait


@dataclass
class ServerFigures:
    """Counts of responses. `slowest`: the longest wait of the other client, in seconds."""

    slowest: float = 0.0
    asked: int = 0
    wrong: int = 0
    restarts: int = 0


def run(trial: Trial) -> Result:
    """Test the built-in vocabulary, then one like Gemma's, then those of `SHARED` as far as the size suffices."""
    with tempfile.TemporaryDirectory() as folder:
        gemma = write_gemma(Path(folder, "gemma.gguf"))
        figures = _tokenize_in_processes(trial, [locate(parse_spec(None)).path, gemma, *SHARED])
        seen = ServerFigures()
        length = LONGEST if trial.size > COMMIT else LONGEST // 2
        hostile = [(unit * (length // len(unit) + 1))[:length] for unit in HOSTILE[: max(1, trial.size // 6)]]
        with trial.serve("--parallel", "2") as server:
            asyncio.run(_measure(server, hostile, seen))
        with trial.serve(str(gemma), "--parallel", "2", "--context", str(LARGE)) as server:
            asyncio.run(_measure(server, hostile, seen))
    figures |= {"slowest other request s": round(seen.slowest, 2), "wrong": seen.wrong, "restarts": seen.restarts}
    passed = (
        figures["texts"] == trial.size
        and not figures["died or hung"]
        and not figures["changed"]
        and figures["times random words"] <= RATIO
        and not seen.wrong
        and not seen.restarts
        and seen.slowest <= SLOWEST
    )
    del figures["texts"]
    return Result(passed, figures)


def write_gemma(path: Path) -> Path:
    """A SentencePiece model with features of Gemma's vocabulary.

    It has user-defined tokens, among them repeated characters, and no space before a text. Converters write the spaces
    of such tokens as spaces and not as "▁".
    """
    runs = [(character * size, TokenType.USER_DEFINED) for character in "\n\t " for size in range(2, 32)]
    unused = [(f"<unused{number}>", TokenType.USER_DEFINED) for number in range(1000)]
    pieces = replace(tiny.piece_vocabulary(infill=True, add_bos=True), space_prefix=False)
    words = tiny.with_tokens(pieces, *runs, *unused)
    shape = tiny.Shape(context=LARGE)
    return tiny.write_model(path, shape, words, tiny.random_weights(shape, words))


async def _measure(server: Server, hostile: list[str], seen: ServerFigures) -> None:
    other = asyncio.create_task(_ask_all_the_time(server, seen))
    for text in hostile:
        abandoned = [
            ClientConnection(server).ask_and_disconnect({"prompt": text}, 1, "/tokenize") for _ in range(ABANDONED)
        ]
        asked = (ClientConnection(server) for _ in range(2))
        bodies = ({"prompt": text}, "/tokenize"), ({"prompt": text, "max_tokens": LARGE}, "/v1/completions")
        *_, first, second = await asyncio.gather(
            *abandoned, *(connection.ask(*body) for connection, body in zip(asked, bodies, strict=True))
        )
        seen.wrong += (first.status, second.status) != (
            200,
            400,
        )  # 400: the prompt is too long, which the server knows after it has tokenized it
    other.cancel()
    await asyncio.gather(other, return_exceptions=True)
    seen.restarts += server.load()["restarts"]
    seen.wrong += not seen.asked


async def _ask_all_the_time(server: Server, seen: ServerFigures) -> None:
    connection = ClientConnection(server)
    while True:
        for body, path in (({"prompt": "the cat"}, "/tokenize"), ({"prompt": "a", "max_tokens": 1}, "/v1/completions")):
            start = time.monotonic()
            reply = await connection.ask(body, path)
            seen.slowest = max(seen.slowest, time.monotonic() - start)
            seen.asked += 1
            seen.wrong += reply.status != 200


def _tokenize_in_processes(trial: Trial, vocabularies: list[Path]) -> dict[str, float]:
    figures = {"vocabularies": 0, "texts": 0, "died or hung": 0, "changed": 0, "slowest s": 0.0}
    figures["times random words"] = 0.0
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
    figures = {name: round(figure, 2) for name, figure in figures.items()}
    return figures | {"texts": tried}


def _try_all(path: Path, cases: list[tuple[str, int | None]], planted: bool, figures: dict[str, float]) -> None:
    waiting = iter(cases)
    left = True
    while left:
        with helper_process("g15_tokenizer", str(path), *(["planted"] if planted else [])) as process:
            left = False
            for unit, size in waiting:
                answer = _ask(process, unit, size)
                if answer is None:
                    figures["died or hung"] += 1
                    left = True
                    break
                same, seconds, random_words = answer
                figures["changed"] += not same
                figures["slowest s"] = max(figures["slowest s"], seconds)
                ratio = seconds / max(random_words, MEASURABLE)
                figures["times random words"] = max(figures["times random words"], ratio)


def _ask(process: subprocess.Popen[str], unit: str, size: int | None) -> tuple[bool, float, float] | None:
    assert process.stdin is not None
    assert process.stdout is not None
    kill_timer = threading.Timer(TIMEOUT, process.kill)
    kill_timer.start()
    try:
        process.stdin.write(json.dumps([unit, size]) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except BrokenPipeError:
        line = ""
    finally:
        kill_timer.cancel()
    return tuple(json.loads(line)) if line else None


def main() -> None:
    """May crash. Reads a unit and a size per line.

    Writes whether the round trip is exact, the CPU seconds, and those of random words of the same length.
    """
    path, *planted = sys.argv[1:]
    if planted:
        GATE.fault.plant(pytest.MonkeyPatch())
    threading.stack_size(stack_bytes("a" * LONGEST))  # as the worker does
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
    sample = WORDS * (LONGEST // 4 // len(WORDS))
    seconds_for_a_byte = _timed(vocabulary, sample)[1] / len(sample)
    for line in sys.stdin:
        unit, size = json.loads(line)
        text = unit * min(LONGEST // len(unit), max(1, (size or CONTEXT * longest) // len(unit.encode())))
        tokens, seconds = _timed(vocabulary, text)
        random_words = seconds_for_a_byte * len(text.encode())
        spelled = b"".join(pieces[token] for token in tokens)
        print(json.dumps([text.encode() in (spelled, spelled[1:]), seconds, random_words]), flush=True)


def _timed(vocabulary: Vocabulary, text: str) -> tuple[list[int], float]:
    """The tokens of a text, and the CPU seconds it took, in which other programs do not count."""
    start = time.thread_time()
    tokens = vocabulary.tokenize(text, True)
    return tokens, time.thread_time() - start


def tokenize_in_one_queue(patch: pytest.MonkeyPatch) -> None:
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
    fault=Fault(
        "all texts wait in one queue, and llama.cpp finds their special tokens", "worker", tokenize_in_one_queue
    ),
    planted=6,
)

if __name__ == "__main__":
    main()
