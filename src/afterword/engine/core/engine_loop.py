"""The engine's heartbeat: schedule, run, postprocess. Knows any runner, and no library and no process."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

from afterword.engine.core.forward_batch import BatchEntry, ForwardBatch, Logits, Runner
from afterword.engine.core.prefill_queue import MIN_CHUNK
from afterword.engine.core.sampler import Sampler, SampleTokens, ScoreQuery, TokenQuery, finite_rows, make_kernel
from afterword.engine.core.scheduler import Scheduler
from afterword.engine.core.sequence import Admission, Sequence
from afterword.engine.core.step_buffer import MAX_STEP_BYTES, StepBuffer
from afterword.engine.protocol import FinishReason, Job, Load, PassStats, Step, Token, scored_positions

PASS_SECONDS = 0.25
"""How long prompts may be computed at a time while others wait; up to twice as long while few sequences run."""


@dataclass(slots=True)
class _StepBuilder:
    """A step while it is being put together."""

    scored: list[Token] = field(default_factory=list)
    sampled: list[tuple[int, Token]] = field(default_factory=list)
    ended: list[tuple[int, FinishReason]] = field(default_factory=list)

    def step(self) -> Step:
        return Step(tuple(self.scored), tuple(self.sampled), tuple(self.ended))


class EngineLoop:
    """Owner of the scheduler and the runner. One thread calls everything. `clock` gives seconds.

    Up to `threads` threads look at a row of logits, run by a `team` if there is one (see
    `sampler_kernel.CompiledKernel`). `piece`: bytes of steps that are returned at a time, see `StepBuffer`.
    """

    def __init__(
        self,
        runner: Runner,
        clock: Callable[[], float] = time.perf_counter,
        threads: int = 1,
        team: int | None = None,
        piece: int = MAX_STEP_BYTES,
    ) -> None:
        self._runner = runner
        self._scheduler = Scheduler(
            runner.slots, runner.chunk, runner.grid, runner.min_shared_tokens, runner.can_truncate
        )
        self._sampler = Sampler(make_kernel(threads, team))
        self._clock = clock
        self._prefill_budget: float | None = None  # tokens of a prompt in a second, as measured
        self._made: tuple[bool, int, float] = (False, 0, 0.0)  # the last pass, see `PassStats`
        self._step_buffer = StepBuffer(piece)
        self._pass_next = False  # a pass comes before more jobs begin

    def start(self, run: int, job: Job) -> None:
        """Take a job; its steps come out of `step` under the name `run`."""
        self._scheduler.add(run, job)

    def drop(self, run: int, sample: int) -> None:
        """End one sample."""
        self._scheduler.drop(run, sample)
        self._update(run)

    def close(self, run: int) -> None:
        """End a job."""
        self._scheduler.close(run)
        self._step_buffer.discard(run)

    def pause(self, run: int) -> None:
        """Compute and report nothing for a job until `resume`. Unknown names are ignored."""
        self._step_buffer.paused.add(run)
        self._update(run)

    def resume(self, run: int) -> None:
        """Go on with a paused job."""
        self._step_buffer.paused.discard(run)
        self._update(run)

    def load(self) -> Load:
        """How busy the engine is."""
        return self._scheduler.load()

    def pass_stats(self) -> PassStats:
        """The pass that was made since this was last asked, and how full the slots are."""
        made, self._made = self._made, (False, 0, 0.0)
        return PassStats(*made, *self._scheduler.slot_usage())

    def check(self) -> None:
        """Raise `AssertionError` unless scheduler, slots and runner agree about every token. For when it is idle."""
        for slot, tokens in self._scheduler.check().items():
            assert self._runner.cached_tokens(slot) == tokens, f"slot {slot} should hold {tokens} tokens"

    def step(self) -> dict[int, Step] | None:
        """Report what is known, or else make one forward pass. Returns what each job gets (perhaps nothing).

        None when there is nothing to do. A job's first step is returned before anything is computed for it, so that the
        supervisor knows which jobs a crash of this process may be due to. Passes and reports take turns: neither many
        jobs that are answered from the prefix cache nor the passes keep the other waiting.
        """
        if self._pass_next and (batch := self._schedule()) is not None:
            self._pass_next = False
            self._compute(batch)
            return self._take()
        self._begin()
        if steps := self._take():
            self._pass_next = True
            return steps
        if (batch := self._schedule()) is None:
            return None
        self._compute(batch)
        return self._take()

    def _begin(self) -> None:
        for begun in self._scheduler.admit(self._step_buffer.free_bytes):
            self._add(begun.work.run, _first_step(begun))

    def _schedule(self) -> ForwardBatch | None:
        return self._scheduler.schedule(
            None if self._prefill_budget is None else int(self._prefill_budget * PASS_SECONDS)
        )

    def _add(self, run: int, step: Step) -> None:
        self._step_buffer.add(run, step)
        self._update(run)

    def _take(self) -> dict[int, Step]:
        steps = self._step_buffer.take()
        for run in steps:
            self._update(run)
        return steps

    def _update(self, run: int) -> None:
        """Hold a job that is paused or has steps to report; forget the pause of a job that has ended."""
        waits, paused = run in self._step_buffer, run in self._step_buffer.paused
        if not self._scheduler.hold(run, waits or paused, paused) and paused and not waits:
            self._step_buffer.paused.discard(run)

    def _compute(self, batch: ForwardBatch) -> None:
        drafts: defaultdict[int, _StepBuilder] = defaultdict(_StepBuilder)
        start = self._clock()
        logits = self._runner.run(batch)
        seconds = self._clock() - start
        self._update_prefill_budget(batch, seconds)
        self._scheduler.charge(batch, seconds)
        prompt = self._scheduler.sequence_in(batch.entries[0].slot).catching_up
        self._made = (prompt, sum(len(row.tokens) for row in batch.entries), seconds)
        failed = self._failed(batch, logits)
        tokens = iter(self._sampler.read(logits, [ask for row in batch.entries for ask in self._row_queries(row)]))
        for row in batch.entries:
            sequence, found = self._scheduler.sequence_in(row.slot), list(islice(tokens, row.outputs))
            if sequence.work.run in failed:
                self._scheduler.computed(row, sequence, [])
            else:
                self._postprocess(row, sequence, found, drafts[sequence.work.run])
        for run in failed:
            self._scheduler.discard_failed(run)
            self._add(run, Step(failed=True))
        for run, draft in drafts.items():
            self._add(run, draft.step())

    def _failed(self, batch: ForwardBatch, logits: Logits) -> set[int]:
        """The jobs that have a row of logits which is not finite."""
        sound = finite_rows(logits)
        if sound.all():
            return set()
        outputs = [row for row in batch.entries for _ in range(row.outputs)]
        return {
            self._scheduler.sequence_in(row.slot).work.run for row, fine in zip(outputs, sound, strict=True) if not fine
        }

    def _row_queries(self, row: BatchEntry) -> list[TokenQuery]:
        """What is wanted of a row's logits, each of which speak of the token after it.

        Tokens of the prompt are scored as broadly as those that the slot has already, so that it stays useful to whom
        they were computed for.
        """
        sequence = self._scheduler.sequence_in(row.slot)
        job, end = sequence.work.job, row.position + len(row.tokens)
        asks: list[TokenQuery] = []
        if sequence.is_scored:
            assert sequence.slot is not None
            asks += [
                ScoreQuery(token, sequence.slot.breadth) for token in job.prompt[scored_positions(row.position, end)]
            ]
        if len(asks) < row.outputs:
            samples = [sequence.sample] if sequence.generated else range(job.samples if job.max_tokens else 0)
            complete = end == sequence.length
            asks.append(
                SampleTokens(job, samples, len(sequence.generated), sequence.token_counts) if complete else None
            )
        return asks

    def _update_prefill_budget(self, batch: ForwardBatch, seconds: float) -> None:
        """Follow the speed of passes over prompts: down at once, since running sequences wait for them; up slowly.

        Short ones say little: they are as slow as their fixed costs.
        """
        tokens = len(batch.entries[0].tokens)
        if seconds > 0 and (tokens >= MIN_CHUNK or (tokens > 1 and self._prefill_budget is None)):
            pace = tokens / seconds
            self._prefill_budget = (
                pace if self._prefill_budget is None else min(pace, 0.75 * self._prefill_budget + 0.25 * pace)
            )

    def _postprocess(self, row: BatchEntry, sequence: Sequence, found: list[list[Token]], draft: _StepBuilder) -> None:
        job = sequence.work.job
        scores: list[Token] = []
        if sequence.is_scored:
            following = len(job.prompt[scored_positions(row.position, row.position + len(row.tokens))])
            scores = [token for tokens in found[:following] for token in tokens]
        untold = self._scheduler.computed(row, sequence, scores)
        draft.scored.extend(_limit_alternatives(untold, job.prompt_alternatives or 0))
        if sequence.computed < sequence.length or not found:
            return
        if sequence.generated:
            if not self._append([sequence], found[-1], draft):
                self._scheduler.end(sequence)
        else:
            self._first_tokens(sequence, found[-1], draft)

    def _first_tokens(self, first: Sequence, tokens: list[Token], draft: _StepBuilder) -> None:
        """The prompt is complete: every sample drew its first token from the same row."""
        work = first.work
        if work.job.max_tokens == 0:
            draft.ended.extend((sample, "length") for sample in range(work.job.samples))
            self._scheduler.begin(first, [])
            return
        samples = [Sequence(work, index) for index in range(work.job.samples)]
        self._scheduler.begin(first, self._append(samples, tokens, draft))

    def _append(self, samples: list[Sequence], tokens: list[Token], draft: _StepBuilder) -> list[Sequence]:
        """Give samples of a job their next tokens; returns those that go on."""
        job = samples[0].work.job
        for sequence, token in zip(samples, tokens, strict=True):
            draft.sampled.append((sequence.sample, token))
            sequence.append(token.id)
            if token.id in job.end_tokens:
                draft.ended.append((sequence.sample, "stop"))
            elif len(sequence.generated) == job.max_tokens:
                draft.ended.append((sequence.sample, "length"))
        over = {sample for sample, _ in draft.ended}
        return [sequence for sequence in samples if sequence.sample not in over]


def _first_step(begun: Admission) -> Step:
    """What a job's prompt is known to be, before anything is computed for it."""
    job = begun.work.job
    scored = _limit_alternatives(begun.scores, job.prompt_alternatives or 0)
    ended: list[tuple[int, FinishReason]] = (
        [(sample, "length") for sample in range(job.samples)] if begun.complete else []
    )
    return Step(scored=tuple(scored), ended=tuple(ended), cached=begun.cached)


def _limit_alternatives(scores: list[Token] | tuple[Token, ...], alternatives: int) -> list[Token]:
    """Scores with no more alternatives than were asked for."""
    return [
        Token(score.id, score.logprob, score.top[:alternatives], score.rank) if len(score.top) > alternatives else score
        for score in scores
    ]
