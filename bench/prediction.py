"""`python -m bench.prediction FILE…`: how much faster predictions and n-grams make the engine, in this process.

For each model file, first a table of passes: k tokens of one sequence in one pass against k passes of one token, in the
middle of the longest text. The best ratio bounds what verifications can gain there. Then cases with and without drafts,
as ratios of times:

- changed lines: a Python file of 400 lines is generated; the prediction is the file with 5 other lines;
- other text: the prediction has nothing in common with the text, so nothing is accepted;
- repetitive text, ordinary text: `--speculate ngram` without a prediction; 16 streams: the same of 16 jobs;
- with `--draft-model`: a draft model that computes its passes, of whose tokens a given share is right: then its most
  likely token is replaced by the script's.

The texts come from a script: the sampler reads every row, and then the scripted token is taken. So a model with random
weights generates the file, at its real cost. A token of the file is a word, a number, a space or a sign. CPU time is
measured with one thread, which other programs hardly affect, and wall time with more.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from msgspec import structs

from afterword.cli.model_setup import load_message
from afterword.config import EngineSettings
from afterword.engine.core.draft_model import DraftModel
from afterword.engine.core.engine_loop import EngineLoop
from afterword.engine.core.forward_batch import BatchEntry, ForwardBatch, Logits, Truncate
from afterword.engine.core.sampler import Sampler, SampleTokens, TokenQuery
from afterword.engine.llama import library
from afterword.engine.llama.draft_model import open_draft
from afterword.engine.llama.runner import LlamaRunner
from afterword.engine.messages import LoadModel
from afterword.engine.protocol import Job, Sampling, Token
from afterword.engine.worker.worker_main import LoadedDraft
from afterword.models.gguf_facts import read_facts
from afterword.models.registry import Model
from bench.engine import SEQUENCES, Clock

SOURCE = Path(__file__).resolve().parent.parent / "src/afterword/engine/core/scheduler.py"
SIZES = (1, 2, 4, 8, 16, 32, 64)
_PROMPT = 32  # tokens
_WORDS = 4000
_PIECES = re.compile(r"\s+|\w+|[^\w\s]")


class ScriptedSampler(Sampler):
    """A sampler that does its work and then takes the tokens of a script, by the job's key and the position."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts: dict[bytes, Sequence[int]] = {}

    def read(self, logits: Logits, queries: Sequence[TokenQuery]) -> list[list[Token]]:
        """See `Sampler.read`."""
        found = super().read(logits, queries)
        return [
            [Token(self.scripts[query.job.key][query.position], token.logprob, token.top) for token in tokens]
            if isinstance(query, SampleTokens)
            else tokens
            for query, tokens in zip(queries, found, strict=True)
        ]


class ScriptedDraftModel(DraftModel):
    """A draft model that does its work. A share of its rows, chosen at random, then prefers the token of a script."""

    scripts: Mapping[bytes, Sequence[int]]
    right: float

    def _run(self, entries: list[BatchEntry]) -> Logits:
        logits = super()._run(entries).copy()
        keys = {follower.slot.index: sequence.job_state.job.key for sequence, follower in self._followers.items()}
        for row, entry in zip(logits, [entry for entry in entries if entry.outputs], strict=True):
            key, place = keys[entry.slot], entry.position + 1 - _PROMPT
            text = self.scripts[key]
            if place < len(text) and random.Random(f"{key!r} {place}").random() < self.right:
                row[text[place]] = row.max() + 1
        return logits


@dataclass(frozen=True, slots=True)
class Case:
    """`texts`: one for each job. `prediction`: of every job. `ngrams`: with `--speculate ngram`.

    `right`: the share of tokens of a draft model that are right; None: without a draft model.
    """

    name: str
    texts: tuple[tuple[int, ...], ...]
    prediction: tuple[int, ...] = ()
    ngrams: bool = False
    right: float | None = None


@dataclass(frozen=True, slots=True)
class Opened:
    """A loaded model. `threads`: of its runner and of the sampler. `draft`: a draft model."""

    runner: LlamaRunner
    threads: int
    draft: LoadedDraft | None = None

    @property
    def clock(self) -> Clock:
        """CPU time with one thread, else wall time."""
        return time.process_time if self.threads == 1 else time.perf_counter

    def clear(self) -> None:
        """Empty all slots."""
        for runner in (self.runner, self.draft.runner) if self.draft else (self.runner,):
            runner.run(ForwardBatch(tuple(Truncate(slot, 0) for slot in range(runner.slots)), ()))

    def fill(self, tokens: int) -> None:
        """Fill the first slot with a prompt of so many tokens, and empty the others."""
        self.clear()
        for start in range(0, tokens, self.runner.chunk):
            part = _tokens(min(self.runner.chunk, tokens - start), start)
            self.runner.run(ForwardBatch((), (BatchEntry(0, start, part, 1),)))

    def passes(self, after: int, size: int, *, together: bool) -> float:
        """Seconds for `size` tokens after the first `after` ones, each with a logits row, in one pass or one by one."""
        self.runner.run(ForwardBatch((Truncate(0, after),), ()))
        tokens = _tokens(size, 1)
        start = self.clock()
        if together:
            self.runner.run(ForwardBatch((), (BatchEntry(0, after, tokens, size),)))
        else:
            for index, token in enumerate(tokens):
                self.runner.run(ForwardBatch((), (BatchEntry(0, after + index, (token,), 1),)))
        return self.clock() - start

    def generate(self, case: Case, *, drafts: bool) -> tuple[float, int, int]:
        """Seconds to generate a case's texts, the drafted and the accepted tokens."""
        self.clear()
        loop = EngineLoop(self.runner, self.clock, self.threads, self.runner.thread_pool)
        sampler = ScriptedSampler()
        loop._sampler = sampler
        if drafts and case.ngrams:
            loop.draft_ngrams()
        if drafts and self.draft and case.right is not None:
            model = ScriptedDraftModel(self.draft.runner, self.draft.context, self.draft.vocabulary, self.clock)
            model.scripts, model.right = sampler.scripts, case.right
            loop.use_draft_model(model, print)
        for number, text in enumerate(case.texts):
            key = number.to_bytes(16, "big")
            sampler.scripts[key] = text
            prediction = case.prediction if drafts else ()
            sampling = Sampling(temperature=0.0)
            loop.start(
                number, Job(_tokens(_PROMPT, 2 + number), 1, len(text), sampling, (), key, prediction=prediction)
            )
        drafted = accepted = 0
        start = self.clock()
        while loop.step() is not None:
            stats = loop.pass_stats()
            drafted, accepted = drafted + stats.drafted_tokens, accepted + stats.accepted_tokens
        return self.clock() - start, drafted, accepted


def cases(lines: int, length: int) -> list[Case]:
    """All cases: a file of `lines` lines, other texts of `length` tokens."""
    source = SOURCE.read_text(encoding="utf-8").splitlines(keepends=True)[:lines]
    before, after = list(source), list(source)
    for part in range(5):
        at = max((2 * part + 1) * len(source) // 10, 1)
        before[at] = re.sub(r"\w+", "former", before[at], count=1) + "    # before\n"
    file, prediction = _ids("".join(after)), _ids("".join(before))
    other = _tokens(length, 100)
    repetitive = tuple(
        token for number in range(length // 25 + 1) for token in (*_tokens(24, 101), 5 + number % _WORDS)
    )[:length]
    crowd = tuple(_tokens(length // 4, 200 + number) for number in range(SEQUENCES))
    repeated = tuple((_tokens(24, 300 + number) * length)[: length // 2] for number in range(SEQUENCES))
    return [
        Case("changed lines", (file,), prediction),
        Case("other text as prediction", (other,), _tokens(length, 102)),
        Case("repetitive text, ngram", (repetitive,), ngrams=True),
        Case("ordinary text, ngram", (other,), ngrams=True),
        Case("16 streams of ordinary text, ngram", crowd, ngrams=True),
        Case("16 streams of repetitive text, ngram", repeated, ngrams=True),
    ]


def draft_cases(length: int) -> list[Case]:
    """Cases with a draft model."""
    alone = (_tokens(length, 100),)
    crowd = tuple(_tokens(length // 4, 200 + number) for number in range(SEQUENCES))
    return [
        *(Case(f"draft model, {right:.0%} right", alone, right=right) for right in (0.9, 0.7, 0.0)),
        *(Case(f"16 streams, draft model, {right:.0%} right", crowd, right=right) for right in (0.9, 0.0)),
    ]


def _tokens(count: int, seed: int) -> tuple[int, ...]:
    numbers = random.Random(seed)
    return tuple(numbers.randrange(5, _WORDS) for _ in range(count))


def _ids(text: str) -> tuple[int, ...]:
    return tuple(5 + zlib.crc32(piece.encode()) % (_WORDS - 5) for piece in _PIECES.findall(text))


def open_model(path: Path, threads: int, context: int, draft: Path | None = None) -> Opened:
    """Load a model with 16 sequences, and a draft model. The scripts have tokens of every vocabulary."""
    settings = EngineSettings(context=context, parallel=SEQUENCES, threads=threads)

    def message(file: Path) -> LoadModel:
        return load_message(Model(file.stem, file, "file"), read_facts(file), settings)

    runner = LlamaRunner(message(path))
    loaded = open_draft(structs.replace(message(path), draft=message(draft)), runner) if draft else None
    return Opened(runner, threads, loaded)


def print_passes(opened: Opened, after: int, rounds: int) -> float:
    """Print the table of passes after `after` tokens. Returns the best ratio."""
    print("| tokens | one pass, ms | one by one, ms | ratio |\n|---|---|---|---|")
    best = 1.0
    opened.fill(after)
    for size in SIZES:
        times = [[opened.passes(after, size, together=together) for together in (True, False)] for _ in range(rounds)]
        ratio = statistics.median(alone / together for together, alone in times)
        together, alone = (1000 * min(column) for column in zip(*times, strict=True))
        print(f"| {size} | {together:.1f} | {alone:.1f} | {ratio:.2f} |", flush=True)
        best = max(best, ratio)
    return best


def print_cases(opened: Opened, chosen: Sequence[Case], rounds: int, best: float) -> None:
    """Print how many times as fast each case is with drafts. `best`: see `print_passes`."""
    print("\n| case | tokens | without, s | with, s | ratio | of the best | drafted | accepted |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for case in chosen:
        times = []
        for number in range(rounds):
            order = (False, True) if number % 2 == 0 else (True, False)
            found = {drafts: opened.generate(case, drafts=drafts) for drafts in order}
            times.append((found[False][0], *found[True]))
        ratio = statistics.median(without / seconds for without, seconds, *_ in times)
        without, seconds, drafted, accepted = (min(column) for column in zip(*times, strict=True))
        measured = f"{without:.2f} | {seconds:.2f} | {ratio:.2f} | {ratio / best:.0%} | {drafted} | {accepted}"
        print(f"| {case.name} | {sum(map(len, case.texts))} | {measured} |", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables of each model."""
    parser = argparse.ArgumentParser(prog="python -m bench.prediction", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--draft-model", type=Path, metavar="FILE", help="add cases with this draft model")
    parser.add_argument("--threads", type=int, default=1, help="number of threads (1)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, with and without drafts in turn (3)")
    parser.add_argument("--lines", type=int, default=400, help="lines of the Python file (400)")
    parser.add_argument("--length", type=int, default=400, help="tokens of other texts (400)")
    parser.add_argument(
        "--case", action="append", metavar="TEXT", help="cases whose names contain it; repeatable (all)"
    )
    options = parser.parse_args(arguments)
    library.initialize(verbose=False)
    chosen = [
        case
        for case in cases(options.lines, options.length) + (draft_cases(options.length) if options.draft_model else [])
        if not options.case or any(text in case.name for text in options.case)
    ]
    longest = max(len(text) for case in chosen for text in case.texts) if chosen else 0
    for path in options.files:
        opened = open_model(path, options.threads, max(512, longest + 2 * _PROMPT), options.draft_model)
        print(f"\n{path.name}, promise {opened.runner.promise}, {options.threads} threads\n")
        print_cases(opened, chosen, options.rounds, print_passes(opened, longest // 2, options.rounds))


if __name__ == "__main__":
    main()
