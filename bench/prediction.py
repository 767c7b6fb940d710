"""`python -m bench.prediction FILE…`: how much faster predictions and n-grams make the engine, in this process.

For each model file, first a table of passes: k tokens of one sequence in one pass against k passes of one token, in the
middle of the longest text. The best ratio bounds what verifications can gain there. Then cases with and without drafts,
as ratios of times, beside the ratio that each should reach:

- changed lines: a Python file of 400 lines is generated; the prediction is the file with 5 other lines;
- other text: the prediction has nothing in common with the text, so nothing is accepted;
- repetitive text, ordinary text: `--speculate ngram` without a prediction; 16 streams: the same of 16 jobs;
- misleading repetitions: the same few tokens return again and again, each time with other tokens after them;
- with `--draft-model`: a draft model that computes its passes, of whose tokens a given share is right: then its most
  likely token is replaced by the script's;
- with `--real`: the model itself repeats a text that the prompt contains, and the prediction has some other words.

The other texts come from a script: the sampler reads every row, and then the scripted token is taken. So a model with
random weights generates the file, at its real cost. A long text without drafts is not generated as a whole, unless
`--whole` is given: parts of it are, spread evenly, and their time for a token is that of all. The time for a token
rises steadily with the length of the text; where parts differ otherwise, the row says so.

CPU time is measured with one thread, which other programs hardly affect, and wall time with more.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
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
from afterword.engine.llama.vocabulary import Vocabulary
from afterword.engine.messages import LoadModel
from afterword.engine.protocol import Job, Sampling, Token
from afterword.engine.worker.worker_main import LoadedDraft
from afterword.models.gguf_facts import read_facts
from afterword.models.registry import Model
from bench.engine import SEQUENCES, Clock
from bench.prediction_cases import PROMPT, Case, Tokens, cases, draft_cases, random_tokens, real_case

SIZES = (1, 2, 4, 8, 16, 32, 64)
PARTS = 8  # of a long text
PART = 48  # tokens
_STEADY = 0.1  # how much a part's time for a token may differ from a line through all of them
_REAL_TOKENS = 2000  # more than the real text and its prompt have
_GREEDY = Sampling(temperature=0.0)


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
            key, place = keys[entry.slot], entry.position + 1 - PROMPT
            text = self.scripts[key]
            if place < len(text) and random.Random(f"{key!r} {place}").random() < self.right:
                row[text[place]] = row.max() + 1
        return logits


@dataclass(frozen=True, slots=True)
class Run:
    """Seconds of a case, the drafted and the accepted tokens. `steady`: False where the seconds are a poor estimate."""

    seconds: float
    drafted: int = 0
    accepted: int = 0
    steady: bool = True


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
            part = random_tokens(min(self.runner.chunk, tokens - start), start)
            self.runner.run(ForwardBatch((), (BatchEntry(0, start, part, 1),)))

    def passes(self, after: int, size: int, *, together: bool) -> float:
        """Seconds for `size` tokens after the first `after` ones, each with a logits row, in one pass or one by one."""
        self.runner.run(ForwardBatch((Truncate(0, after),), ()))
        tokens = random_tokens(size, 1)
        start = self.clock()
        if together:
            self.runner.run(ForwardBatch((), (BatchEntry(0, after, tokens, size),)))
        else:
            for index, token in enumerate(tokens):
                self.runner.run(ForwardBatch((), (BatchEntry(0, after + index, (token,), 1),)))
        return self.clock() - start

    def generate(self, case: Case, *, drafts: bool) -> Run:
        """Generate a case's texts."""
        loop, sampler = self._loop()
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
            loop.start(number, Job(case.prompt_of(number), 1, len(text), _GREEDY, (), key, prediction=prediction))
        self._read_prompts(loop, len(case.texts))
        drafted = accepted = 0
        start = self.clock()
        while loop.step() is not None:
            stats = loop.pass_stats()
            drafted, accepted = drafted + stats.drafted_tokens, accepted + stats.accepted_tokens
        return Run(self.clock() - start, drafted, accepted)

    def estimate(self, case: Case) -> Run:
        """The same without drafts for a case of one text, from `PARTS` parts of it."""
        (text,) = case.texts
        loop, sampler = self._loop()
        starts = [number * (len(text) - PART) // (PARTS - 1) for number in range(PARTS)]
        times = []
        for number, at in enumerate(starts):
            key = number.to_bytes(16, "big")
            sampler.scripts[key] = text[at:]
            loop.start(number, Job(case.prompt_of(0) + text[:at], 1, PART, _GREEDY, (), key))
            self._read_prompts(loop, 1)
            start = self.clock()
            while loop.step() is not None:
                pass
            times.append((self.clock() - start) / (PART - 1))
        slope, base = statistics.linear_regression(starts, times)
        mean = statistics.mean(times)
        steady = all(abs(base + slope * at - each) < _STEADY * mean for at, each in zip(starts, times, strict=True))
        return Run(mean * (len(text) - 1), steady=steady)

    def tokenize(self, text: str) -> Tokens:
        """The tokens of a text, special ones included."""
        return Vocabulary(self.runner.model).tokenize(text, True)

    def complete(self, prompt: Tokens, count: int) -> Tokens:
        """The model's own greedy completion of a prompt."""
        self.clear()
        loop = EngineLoop(self.runner, self.clock, self.threads, self.runner.thread_pool)
        loop.start(0, Job(prompt, 1, count, _GREEDY, (), bytes(16)))
        found: list[int] = []
        while (steps := loop.step()) is not None:
            found += [token.id for step in steps.values() for _, token in step.sampled]
        return tuple(found)

    def _loop(self) -> tuple[EngineLoop, ScriptedSampler]:
        self.clear()
        loop = EngineLoop(self.runner, self.clock, self.threads, self.runner.thread_pool)
        loop._sampler = sampler = ScriptedSampler()
        return loop, sampler

    def _read_prompts(self, loop: EngineLoop, count: int) -> None:
        """Run the loop until each of `count` texts has its first token. Reading a prompt is the same in all cases."""
        begun: set[int] = set()
        while len(begun) < count:
            begun |= {job for job, step in (loop.step() or {}).items() if step.sampled}


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


def print_cases(opened: Opened, chosen: Sequence[Case], rounds: int, best: float, *, whole: bool) -> None:
    """Print how many times as fast each case is with drafts. `best`: see `print_passes`."""
    print(
        "\n| case | tokens | without, s | with, s | ratio | of rounds | of the best | at least | drafted | accepted |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for case in chosen:
        parts = not whole and len(case.texts) == 1 and len(case.texts[0]) > 2 * PARTS * PART
        ratios, runs = [], []
        for number in range(rounds):
            order = (False, True) if number % 2 == 0 else (True, False)
            found = {
                drafts: opened.estimate(case) if parts and not drafts else opened.generate(case, drafts=drafts)
                for drafts in order
            }
            ratios.append(found[False].seconds / found[True].seconds)
            runs.append(found)
        print(f"| {case.name} | {sum(map(len, case.texts))} | {_figures(case, ratios, runs, best)} |", flush=True)


def _figures(case: Case, ratios: Sequence[float], runs: Sequence[Mapping[bool, Run]], best: float) -> str:
    """The columns of a case after its length."""
    ratio = statistics.median(ratios)
    without, seconds = (min(found[drafts].seconds for found in runs) for drafts in (False, True))
    least = case.least if case.least_of_possible is None else case.least_of_possible * best
    wanted = "–" if least is None else f"{least:.2f}: {'yes' if ratio >= least else 'no'}"
    unsteady = "" if all(found[False].steady for found in runs) else " (parts differ: use --whole)"
    last = runs[-1][True]
    return (
        f"{without:.2f}{unsteady} | {seconds:.2f} | {ratio:.2f} | {min(ratios):.2f} to {max(ratios):.2f} | "
        f"{ratio / best:.0%} | {wanted} | {last.drafted} | {last.accepted}"
    )


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.prediction", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--draft-model", type=Path, metavar="FILE", help="add cases with this draft model")
    parser.add_argument(
        "--real", action="store_true", help="only the case of a real model with a chat template (ChatML)"
    )
    parser.add_argument("--threads", type=int, default=1, help="number of threads (1)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, with and without drafts in turn (3)")
    parser.add_argument("--lines", type=int, default=400, help="lines of the Python file (400)")
    parser.add_argument("--length", type=int, default=400, help="tokens of other texts (400)")
    parser.add_argument("--whole", action="store_true", help="generate long texts as a whole without drafts too")
    parser.add_argument(
        "--case", action="append", metavar="TEXT", help="cases whose names contain it; repeatable (all)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables of each model."""
    options = _options().parse_args(arguments)
    library.initialize(verbose=False)
    chosen = [
        case
        for case in cases(options.lines, options.length) + (draft_cases(options.length) if options.draft_model else [])
        if not options.real and (not options.case or any(text in case.name for text in options.case))
    ]
    for path in options.files:
        longest = max((case.longest for case in chosen), default=_REAL_TOKENS)
        opened = open_model(path, options.threads, max(1024, longest + 1), options.draft_model)
        if options.real:
            chosen = [real_case(opened.tokenize, opened.complete)]
            longest = chosen[0].longest
        print(f"\n{path.name}, promise {opened.runner.promise}, {options.threads} threads\n")
        best = print_passes(opened, longest // 2, options.rounds)
        print_cases(opened, chosen, options.rounds, best, whole=options.whole)


if __name__ == "__main__":
    main()
