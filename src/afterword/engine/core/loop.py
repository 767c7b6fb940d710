"""The engine's heartbeat: schedule, run, postprocess. Knows any runner, and no library and no process."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

from afterword.engine.core.batch import Batch, Logits, Row, Runner
from afterword.engine.core.sampler import Look, Sampler, walks
from afterword.engine.core.scheduler import LEAST_PASS, Begun, Scheduler
from afterword.engine.core.sequence import Sequence
from afterword.engine.protocol import End, Job, Load, Meter, Step, Token

PASS_SECONDS = 0.25
"""How long prompts may be computed at a time while others wait; up to twice as long while few sequences run."""


@dataclass(slots=True)
class _Draft:
    """A step while it is being put together."""

    scored: list[Token] = field(default_factory=list)
    sampled: list[tuple[int, Token]] = field(default_factory=list)
    ended: list[tuple[int, End]] = field(default_factory=list)

    def step(self) -> Step:
        return Step(tuple(self.scored), tuple(self.sampled), tuple(self.ended))


class Loop:
    """Owner of the scheduler and the runner. One thread calls everything. `clock` gives seconds.

    Up to `threads` threads look at a row of logits.
    """

    def __init__(self, runner: Runner, clock: Callable[[], float] = time.perf_counter, threads: int = 1) -> None:
        self._runner = runner
        self._scheduler = Scheduler(runner.slots, runner.chunk, runner.grid, runner.least_shared, runner.rewinds)
        self._sampler = Sampler(walks(threads))
        self._clock = clock
        self._pace: float | None = None  # tokens of a prompt in a second, as measured
        self._made: tuple[bool, int, float] = (False, 0, 0.0)  # the last pass, see `Meter`

    def start(self, run: int, job: Job) -> None:
        """Take a job; its steps come out of `step` under the name `run`."""
        self._scheduler.add(run, job)

    def drop(self, run: int, sample: int) -> None:
        """End one sample."""
        self._scheduler.drop(run, sample)

    def close(self, run: int) -> None:
        """End a job."""
        self._scheduler.close(run)

    def load(self) -> Load:
        """How busy the engine is."""
        return self._scheduler.load()

    def meter(self) -> Meter:
        """The pass that was made since this was last asked, and how full the slots are."""
        made, self._made = self._made, (False, 0, 0.0)
        return Meter(*made, *self._scheduler.filled())

    def check(self) -> None:
        """Raise `AssertionError` unless scheduler, slots and runner agree about every token. For when it is idle."""
        for slot, tokens in self._scheduler.check().items():
            assert self._runner.held(slot) == tokens, f"slot {slot} should hold {tokens} tokens"

    def step(self) -> dict[int, Step] | None:
        """What begins, or else one forward pass. Returns what it brought each job (perhaps nothing); None when idle.

        Jobs are said to begin before anything is computed for them: whoever watches knows whom a crash belongs to.
        """
        if begun := self._scheduler.admit():
            return {each.work.run: _first_step(each) for each in begun}
        batch = self._scheduler.schedule(None if self._pace is None else int(self._pace * PASS_SECONDS))
        return None if batch is None else self._compute(batch)

    def _compute(self, batch: Batch) -> dict[int, Step]:
        drafts: defaultdict[int, _Draft] = defaultdict(_Draft)
        start = self._clock()
        logits = self._runner.run(batch)
        seconds = self._clock() - start
        self._measure(batch, seconds)
        prompt = self._scheduler.at(batch.rows[0].slot).catching_up
        self._made = (prompt, sum(len(row.tokens) for row in batch.rows), seconds)
        looks = iter(self._look(batch, logits))
        for row in batch.rows:
            sequence = self._scheduler.at(row.slot)
            self._postprocess(row, sequence, list(islice(looks, row.outputs)), drafts[sequence.work.run])
        return {run: draft.step() for run, draft in drafts.items()}

    def _look(self, batch: Batch, logits: Logits) -> list[Look]:
        """At what was computed, all at once. Log probabilities are wanted of prompts or of tokens."""
        jobs = [self._scheduler.at(row.slot).work.job for row in batch.rows for _ in range(row.outputs)]
        reported = [job.prompt_alternatives is not None or job.alternatives is not None for job in jobs]
        return self._sampler.look(logits, reported)

    def _measure(self, batch: Batch, seconds: float) -> None:
        """Follow the speed of passes over prompts: down at once, since running sequences wait for them; up slowly.

        Short ones say little: they are as slow as their fixed costs.
        """
        tokens = len(batch.rows[0].tokens)
        if seconds > 0 and (tokens >= LEAST_PASS or (tokens > 1 and self._pace is None)):
            pace = tokens / seconds
            self._pace = pace if self._pace is None else min(pace, 0.75 * self._pace + 0.25 * pace)

    def _postprocess(self, row: Row, sequence: Sequence, looks: list[Look], draft: _Draft) -> None:
        job = sequence.work.job
        scores: list[Token] = []
        if job.prompt_alternatives is not None and not sequence.generated:
            scores = self._score(row, sequence, looks)
            draft.scored.extend(_narrowed(scores, job.prompt_alternatives))
        self._scheduler.computed(row, sequence, scores)
        if sequence.computed < sequence.length or not looks:
            return
        if sequence.generated:
            if not self._sample([sequence], looks[-1], draft):
                self._scheduler.end(sequence)
        else:
            self._first_tokens(sequence, looks[-1], draft)

    def _first_tokens(self, first: Sequence, look: Look, draft: _Draft) -> None:
        """The prompt is complete: every sample draws its first token from the same row."""
        work = first.work
        samples = [Sequence(work, index) for index in range(work.job.samples)]
        if work.job.max_tokens == 0:
            draft.ended.extend((s.sample, "length") for s in samples)
            samples = []
        self._scheduler.begin(first, self._sample(samples, look, draft) if samples else [])

    def _sample(self, samples: list[Sequence], look: Look, draft: _Draft) -> list[Sequence]:
        """Draw the next token of samples that have the same tokens so far; returns those that go on."""
        job, tokens = samples[0].work.job, samples[0].generated
        drawn = self._sampler.sample(look, job, [s.sample for s in samples], len(tokens), samples[0].counts)
        for sequence, token in zip(samples, drawn, strict=True):
            draft.sampled.append((sequence.sample, token))
            sequence.append(token.id)
            if token.id in job.ends:
                draft.ended.append((sequence.sample, "stop"))
            elif len(sequence.generated) == job.max_tokens:
                draft.ended.append((sequence.sample, "length"))
        over = {sample for sample, _ in draft.ended}
        return [sequence for sequence in samples if sequence.sample not in over]

    def _score(self, row: Row, sequence: Sequence, looks: list[Look]) -> list[Token]:
        """Tokens of the prompt that these rows of logits predict: each speaks of the token after it.

        As broad as what the slot has already, so that it stays useful to whom that was computed for.
        """
        assert sequence.slot is not None
        start = row.position + 1
        following = sequence.work.job.prompt[start : start + len(row.tokens)]
        return self._sampler.score(looks[: len(following)], following, sequence.slot.breadth)


def _first_step(begun: Begun) -> Step:
    """What a job's prompt is known to be, before anything is computed for it."""
    job = begun.work.job
    scored = _narrowed(begun.scores, job.prompt_alternatives or 0)
    ended: list[tuple[int, End]] = [(sample, "length") for sample in range(job.samples)] if begun.complete else []
    return Step(scored=tuple(scored), ended=tuple(ended), cached=begun.cached)


def _narrowed(scores: list[Token] | tuple[Token, ...], alternatives: int) -> list[Token]:
    """Scores with no more alternatives than were asked for."""
    return [
        Token(score.id, score.logprob, score.top[:alternatives], score.rank) if len(score.top) > alternatives else score
        for score in scores
    ]
