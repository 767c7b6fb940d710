"""Judges one form: `python -m tests.architectures.judge FORM TYPE,TYPE COUNT` prints a `Verdict` for each type.

It is a process of its own, because the library can end the process, and because the reference must be computed before
the engine registers its kernels.
"""

from __future__ import annotations

import itertools
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from afterword.config import ONE_SEQUENCE
from afterword.engine.core.engine_loop import EngineLoop
from afterword.engine.llama import accelerator, library
from afterword.engine.llama.library import native
from afterword.engine.llama.runner import LlamaRunner
from afterword.engine.protocol import Job, Promise, Sampling, Token
from afterword.errors import EngineError, SettingError
from afterword.models.gguf_facts import read_facts
from engine.runs import Runs
from engine.test_reproducible import in_company, open_runner
from oracle.architectures import write_keys, write_random
from oracle.forms import FORMS, VOCABULARIES, architecture_of

from . import plain_library

library.initialize(verbose=False)

VOCABULARY, TOKENS = 256, 250  # ids of bytes, and how many of the last ones occur in texts
SEQUENCES = 8
LENGTH, GENERATED = 150, 24  # tokens of the texts that are compared with the library
FACTOR, LEAST = 4.0, 0.01
"""The tolerance for a difference of a log probability to the expected one, in nats.

It is `FACTOR` times the largest difference of the library's own ways of computing the same tokens, at least `LEAST`.
What is expected is the library's result for the same weights in F32, with keys and values in F32 and without flash
attention. The library's ways are a sample of the roundings that are possible, so another correct way can be somewhat
further off. `LEAST` is for models whose ways agree by accident. With F32 weights the tolerance of most forms is below
0.03 nats; a wrong position, mask, state or weight changes log probabilities by more than 0.1 nats (`grok`, `minicpm3`).
"""


Scores = NDArray[np.float64]
"""Log probabilities: (tokens,)."""


class Verdict(msgspec.Struct, frozen=True):
    """What was found about a form with weights of one type.

    - `refused`: the error message; the other fields are then empty.
    - `spread`: the largest difference, in nats, between the library's ways. `largest`, `usual`: the largest and the
      median difference between the library and the engine.
    - `cached`: tokens that came from the prefix cache for each kind of request in `REQUESTS`.
    - `warm`, `crowd`: the numbers of requests that differ from the same request with an empty prefix cache, and alone.
    - `drift`: the largest difference of a log probability among those.
    - `library`: what the library computes instead of the kernels.
    - `faults`: broken promises and wrong numbers, as sentences.
    """

    form: str
    file_type: str
    refused: str = ""
    promise: Promise = "none"
    grid: int = 0
    spread: float = 0.0
    largest: float = 0.0
    usual: float = 0.0
    cached: tuple[int, ...] = ()
    warm: int = 0
    crowd: int = 0
    requests: int = 0
    drift: float = 0.0
    library: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Expected:
    """What the library alone computes for the texts of a form with weights of one type, in `path`.

    `scores`: the log probabilities of the tokens of the texts but the first. `best`: of the most likely ones.
    `spread`, `usual_spread`: the largest difference of the library's own ways to it, and the largest median.
    """

    form: str
    file_type: str
    path: Path
    texts: list[tuple[int, ...]]
    scores: list[Scores]
    best: list[Scores]
    spread: float
    usual_spread: float

    @classmethod
    def of(cls, form: str, file_type: str, folder: Path) -> Expected:
        """Write a model, and compute what is expected of it. Raises `SettingError` if it is refused."""
        path = write_random(folder / f"{file_type}.gguf", form, file_type)
        read_facts(path)
        library.check_architecture(str(path), architecture_of(form))
        floats = write_random(folder / "floats.gguf", form, file_type, as_floats=True)
        texts = [plain_library.greedy(path, text, GENERATED) for text in _texts(form, 3, LENGTH)]
        rows = plain_library.log_probabilities(floats, texts, plain_library.CLOSEST)
        scores, best = [_chosen(*pair) for pair in zip(rows, texts, strict=True)], [row.max(-1) for row in rows]
        ways = []
        for way in (plain_library.CLOSEST, *plain_library.OTHERS):
            found = plain_library.log_probabilities(path, texts, way)
            ways.append(np.abs(np.subtract([_chosen(*pair) for pair in zip(found, texts, strict=True)], scores)))
        usual = max(float(np.median(way)) for way in ways)
        return cls(form, file_type, path, texts, scores, best, float(np.max(ways)), usual)

    def by_text(self) -> Iterator[tuple[tuple[int, ...], Scores, Scores]]:
        """Each text with its scores and the best ones."""
        return zip(self.texts, self.scores, self.best, strict=True)


def judge(form: str, file_types: Sequence[str], count: int) -> Iterator[Verdict]:
    """Judge a form with weights of each type. If it has no model, judge only whether its architecture is refused."""
    with tempfile.TemporaryDirectory() as name:
        folder, path = Path(name), Path(name, "keys.gguf")
        try:
            if form not in FORMS:
                read_facts(write_keys(path, form))
                open_runner(path, "exact", SEQUENCES)
                yield Verdict(form, file_types[0], faults=("There is no model of this architecture to judge it with.",))
                return
            # All of them before the kernels are registered, because the library would use them too.
            expected = [Expected.of(form, each, folder) for each in file_types]
        except SettingError as error:
            message = re.sub(rf"{re.escape(str(folder))}/\S+", "FILE", str(error))
            yield from (Verdict(form, each, refused=message) for each in file_types)
            return
        for each in expected:
            try:
                yield _Judge(each, count).verdict()
            except (EngineError, SettingError) as error:
                yield Verdict(form, each.file_type, faults=(f"{type(error).__name__}: {error}",))


class _Judge:
    def __init__(self, expected: Expected, count: int) -> None:
        self._expected, self._form, self._count = expected, expected.form, count
        self._tolerance = max(FACTOR * expected.spread, LEAST)
        sequences = 1 if architecture_of(expected.form) in ONE_SEQUENCE else SEQUENCES
        self._runner = open_runner(expected.path, "exact", sequences)
        self._loop = EngineLoop(self._runner)
        self._faults: list[str] = []
        self._drift = 0.0

    def verdict(self) -> Verdict:
        largest, usual = self._compare_with_library()
        warm, cached = self._compare_warm()
        crowd, requests = self._compare_crowd()
        self._compare_read()
        if self._drift > self._tolerance:
            self._faults.append(f"A request differs from itself by {self._drift:.2g} nats.")
        if self._runner.promise != "none" and warm:
            self._faults.append(f"{warm} requests differ with a warm cache.")
        if self._runner.promise != "none" and crowd:
            self._faults.append(f"{crowd} of {requests} concurrent requests differ.")
        return Verdict(
            *(self._form, self._expected.file_type, "", self._runner.promise, self._runner.grid),
            *(round(self._expected.spread, 5), round(largest, 5), round(usual, 6), cached),
            *(warm, crowd, requests, round(self._drift, 6)),
            *(computed_by_library(self._runner), tuple(self._faults)),
        )

    def _compare_with_library(self) -> tuple[float, float]:
        """Compare scores and greedy continuations. Returns the largest difference and the median."""
        runs, differences = Runs(self._loop), []
        for text, expected, best in self._expected.by_text():
            ((scores, _),) = runs.run(_job(text, max_tokens=0, scored=0))
            differences.append(np.abs([token.logprob for token in scores] - expected))
            ((_, generated),) = runs.run(_job(text[:LENGTH], max_tokens=GENERATED))
            for position, token in enumerate(generated, LENGTH):
                wanted = text[position]
                gap = best[position - 1] - (token.logprob or 0.0)
                if token.id != wanted and abs(gap) > 2 * self._tolerance:
                    self._faults.append(f"Greedy text has token {token.id} in place of {wanted}, {gap:.2g} nats away.")
                if token.id != wanted:
                    break
        largest, usual = float(np.max(differences)), float(np.median(differences))
        if not largest <= self._tolerance:
            self._faults.append(f"Scores are {largest:.2g} nats off; the library's own {self._expected.spread:.2g}.")
        if not usual <= max(FACTOR * self._expected.usual_spread, LEAST):
            self._faults.append(f"The median of the differences to the library's is {usual:.2g} nats.")
        return largest, usual

    def _compare_warm(self) -> tuple[int, tuple[int, ...]]:
        """Compare requests with the same ones in an empty cache. Returns how many differ, and the cached tokens."""
        runs = Runs(self._loop)
        counts, differing = [], 0
        for job in requests_in_order(self._form, runs):
            (found,) = runs.run(job)
            counts.append(runs.cached[-1])
            differing += self._differ(found, runs.cold(job))
        return differing, tuple(counts)

    def _compare_crowd(self) -> tuple[int, int]:
        """Compare requests concurrently and alone. Returns how many differ, and their number."""
        differing = [self._differ(_rows(found), _rows(wanted)) for _, found, wanted in self._company()]
        return sum(differing), len(differing)

    def _company(self) -> Iterator[tuple[Job, list[Any], list[Any]]]:
        return in_company(self._loop, self._count, VOCABULARY)

    def _differ(self, found: list[list[Token]], wanted: list[list[Token]]) -> bool:
        self._drift = max(self._drift, largest_difference(found, wanted))
        return found != wanted

    def _compare_read(self) -> None:
        """Compare generated tokens with the same tokens in a prompt."""
        if self._runner.promise != "exact":
            return
        runs = Runs(self._loop)
        for prompt in _texts(self._form, 2, 40, seed=7):
            ((_, generated),) = runs.run(_job(prompt, max_tokens=40))
            text = (*prompt, *(token.id for token in generated))
            ((scores, *_),) = runs.run(msgspec.structs.replace(_job(text, max_tokens=0, scored=0), namespace="read"))
            if [token.logprob for token in scores[-40:]] != [token.logprob for token in generated]:
                self._faults.append("A token has other numbers when it is read.")


REQUESTS = (
    *("a prompt of 150 tokens", "the same again", "with 30 more tokens", "its first half and others"),
    *("its first half and yet others", "a chat's next turn", "150 scored", "the same scored again", "four samples"),
    "after a cancellation",
)


def requests_in_order(form: str, runs: Runs) -> Iterator[Job]:
    """The requests of `REQUESTS`, each of which can use the prefix of an earlier one."""
    text, other, third = _texts(form, 3, 200, seed=3)
    yield _job(text[:150])
    yield _job(text[:150])
    yield _job(text[:180])
    yield _job(text[:75] + other[:30])
    yield _job(text[:75] + other[30:60])
    ((_, sample),) = runs.run(_job(other[:130], max_tokens=20))
    yield _job((*other[:130], *(token.id for token in sample), *third[:20]))
    yield _job(third[:150], max_tokens=2, scored=2)
    yield _job(third[:150], max_tokens=2, scored=2)
    yield msgspec.structs.replace(_job(text[:150], samples=4, max_tokens=12), sampling=Sampling())
    runs.loop.start("cancelled", _job(third[:190] + other[:30], max_tokens=30))
    for _ in range(5):
        runs.loop.step()
    runs.loop.close("cancelled")
    yield _job(third[:190] + text[:20])


def computed_by_library(runner: LlamaRunner) -> tuple[str, ...]:
    """The parts of a loaded model that the library computes instead of the kernels."""
    recurrent = native.llama_model_is_recurrent(runner.model) or native.llama_model_is_hybrid(runner.model)
    parts = {
        "everything": not runner.accelerated,
        "attention": not runner.uses_own_attention and not native.llama_model_is_recurrent(runner.model),
        "some weights": bool(accelerator.unsupported_types()) or not runner.uses_kernels,
        "products of activations": accelerator.has_unsupported_products(),
        "experts": accelerator.has_unsupported_experts(),
        "recurrence": recurrent,
    }
    return tuple(name for name, is_so in parts.items() if is_so)


def largest_difference(found: Iterable[list[Token]], wanted: Iterable[list[Token]]) -> float:
    """The largest difference of a log probability among tokens up to the first other one."""
    largest = 0.0
    for row, other in zip(found, wanted, strict=True):
        same = itertools.takewhile(lambda pair: pair[0].id == pair[1].id, zip(row, other, strict=False))
        differences = (abs(a.logprob - b.logprob) for a, b in same if a.logprob is not None and b.logprob is not None)
        largest = max(largest, max(differences, default=0.0))
    return largest


def _rows(result: list[Any]) -> list[list[Token]]:
    scores, samples, _ = result
    return [scores, *samples]


def _job(prompt: tuple[int, ...], samples: int = 1, max_tokens: int = 8, scored: int | None = None) -> Job:
    greedy = Sampling(temperature=0.0)
    return Job(prompt, samples, max_tokens, greedy, (), b"k" * 16, alternatives=0, prompt_alternatives=scored)


def _texts(form: str, count: int, length: int, seed: int = 1) -> list[tuple[int, ...]]:
    """Random texts of tokens that the model can generate."""
    first = VOCABULARIES.get(form, VOCABULARY) - TOKENS
    random = np.random.default_rng(seed)
    return [tuple(random.integers(first, first + TOKENS, length).tolist()) for _ in range(count)]


def _chosen(rows: plain_library.Rows, text: tuple[int, ...]) -> Scores:
    """The log probability of each token but the first."""
    return rows[np.arange(len(text) - 1), text[1:]]


def main() -> None:
    form, file_types, count = sys.argv[1:]
    for verdict in judge(form, file_types.split(","), int(count)):
        print(msgspec.json.encode(verdict).decode(), flush=True)


if __name__ == "__main__":
    main()
