"""One accepted job until it ends. After a worker crash it filters the repeated computation for new tokens.

The caller that iterates over a job receives each step once and in order, however many workers crash. All methods are
called on the event loop's thread.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from afterword.engine.most_sampled import most_sampled_for
from afterword.engine.parent.engine_metrics import JobTimer
from afterword.engine.protocol import Job, Step
from afterword.errors import (
    AfterwordError,
    JobRefused,
    NonFiniteLogits,
    Overloaded,
    QueueTimeout,
    RequestError,
    UpstreamLost,
)

MAX_CRASHES = 2
"""A job that was running in this many crashes, without progress in between, is not tried again."""


class JobOwner(Protocol):
    """Keeps the pending jobs and sends messages about them: `Supervisor` and `RoutedEngine`."""

    def drop(self, pending: PendingJob, sample: int) -> None:
        """End one sample in the worker."""
        ...

    def end(self, pending: PendingJob) -> None:
        """Remove a job and end it in the worker."""
        ...

    def pause(self, pending: PendingJob, paused: bool) -> None:
        """Pause a job in the worker, or resume it."""
        ...


class PendingJob:
    """A running or waiting job; implements `protocol.JobHandle`.

    - `since`: when the job was accepted, in seconds of the supervisor's clock.
    - `admitted`: some worker has started the job.
    - `begun`: the current worker has started it; `has_progress`: and has produced tokens of it.
    - `crashes`: the number of crashes that the job may have caused, without progress in between.
    - `paused`: the consumer of the steps is behind, so the worker computes nothing for the job.
    """

    def __init__(self, owner: JobOwner, job_id: int, job: Job, since: float, timer: JobTimer) -> None:
        self.job_id = job_id
        self.job = job
        self.since = since
        self.admitted = False
        self.begun = False
        self.has_progress = False
        self.paused = False
        self.crashes = 0
        self._owner = owner
        self._timer = timer
        self._open = set(range(job.samples))
        self._delivered: Counter[int | None] = Counter()  # tokens delivered by sample; key None: the prompt's scores
        self._again: Counter[int | None] = Counter()  # delivered tokens that the restarted job will produce again
        self._taken_back = self._taken_back_again = 0  # the same for tokens that were taken back
        self._behind: set[int] = set()  # samples without a new token since the last crash
        self._repeated = False
        self._steps: asyncio.Queue[Step | Exception | None] = asyncio.Queue()  # None: the end
        self._receive: Callable[[Step | Exception | None], None] = self._steps.put_nowait
        self._over = False  # the end or an error was delivered

    @property
    def size(self) -> int:
        """Tokens of the prompt and of the prediction, the most that are sampled, and ids reported by position."""
        reported = self.job.reported_at.count if self.job.reported_at else 0
        return len(self.job.prompt) + len(self.job.prediction) + most_sampled_for(self.job) + reported

    @property
    def has_output(self) -> bool:
        """Whether a token was delivered, so that a client may have received it."""
        return self._delivered.total() > 0

    @property
    def ended(self) -> bool:
        return not self._open

    @property
    def repeating(self) -> bool:
        """Whether everything that the worker computes for the job now was delivered before."""
        return self._again[None] > 0 or all(self._again[sample] > 0 for sample in self._open)

    @property
    def on_probation(self) -> bool:
        """Whether no other job should start until this one has made progress."""
        return self.crashes >= MAX_CRASHES or (self.crashes > 0 and not self.has_output)

    # ---- called by the owner

    def add_step(self, step: Step) -> None:
        """Record a step from the worker, and deliver the part that is new."""
        if step.compiling is not None:  # a grammar may crash the worker too
            self.begun = step.compiling
            return
        self.admitted = self.begun = True
        self.has_progress = self.has_progress or bool(step.scored or step.sampled)
        if step.ends_job:
            self._open.clear()
            self._timer.record_end()
            self.fail(self._error(step))
            return
        if self._repeated:
            step = self._new(step)
        self._timer.record_step(step)
        self._count(step)
        self._deliver(step)
        if self.ended:
            self._timer.record_end()
            self._deliver(None)

    def _count(self, step: Step) -> None:
        if step.scored:
            self._delivered[None] += len(step.scored)
        self._taken_back += step.taken_back
        for sample, _ in step.sampled:
            self._delivered[sample] += 1
            self._behind.discard(sample)
        for sample, _ in step.ended:
            self._open.discard(sample)
        if self.crashes and (step.scored or step.sampled) and not self._behind & self._open:
            self.crashes = 0  # only if every open sample has progressed: another sample may have caused the crash

    def _deliver(self, item: Step | Exception | None) -> None:
        if not self._over:
            self._over = not isinstance(item, Step)
            self._receive(item)

    def restart(self, blamed: bool) -> bool:
        """Prepare to start the job again after a worker crash, and return whether the job may have caused it.

        A job that was only repeating tokens delivered before is not blamed.
        """
        blamed = blamed and self.begun and not self.repeating
        self.crashes += blamed
        self._repeated = self._repeated or self.begun
        self._again = self._delivered.copy()
        self._taken_back_again = self._taken_back
        self._behind = {sample for sample in self._open if self._delivered[sample]}
        self.begun = self.has_progress = False
        return blamed

    def fail(self, error: Exception) -> None:
        """End the iteration over the steps with an error."""
        self._deliver(error)

    def _error(self, step: Step) -> AfterwordError:
        """The error of a step that has ended the job."""
        if step.refused:
            return JobRefused()
        if step.lost or (step.late and self.has_output):  # another sample may have brought tokens
            return UpstreamLost()
        if step.late:
            return QueueTimeout()
        if step.busy:
            return Overloaded("The server is busy with other grammars. Please try again later.", retry_after=5)
        if not step.error:
            return NonFiniteLogits()
        field = self.job.grammar.field if self.job.grammar else None
        return RequestError(step.error, param=field, code="invalid_grammar")

    def _new(self, step: Step) -> Step:
        """The part of a step that was not delivered before a crash. Samples that had ended are dropped again."""
        for sample in {sample for sample, _ in step.sampled} - self._open:
            self._owner.drop(self, sample)
        known, self._again[None] = self._again[None], max(0, self._again[None] - len(step.scored))
        sampled = tuple(pair for pair in step.sampled if pair[0] in self._open and not self._repeats(pair[0]))
        ended = tuple(pair for pair in step.ended if pair[0] in self._open)
        again = min(self._taken_back_again, step.taken_back)
        self._taken_back_again -= again
        return Step(step.scored[known:], sampled, ended, taken_back=step.taken_back - again)

    def _repeats(self, sample: int) -> bool:
        """Whether a sample's next token was delivered before; if so, count it as repeated."""
        repeats = self._again[sample] > 0
        self._again[sample] -= repeats
        return repeats

    # ---- called by the job's consumer

    async def __aiter__(self) -> AsyncIterator[Step]:
        while (step := await self._steps.get()) is not None:
            if isinstance(step, Exception):
                raise step
            yield step

    def deliver_to(self, receive: Callable[[Step | Exception | None], None]) -> None:
        """See `protocol.JobHandle.deliver_to`."""
        self._receive = receive
        while not self._steps.empty():
            receive(self._steps.get_nowait())

    def drop(self, sample: int) -> None:
        """See `protocol.JobHandle.drop`."""
        if sample in self._open:
            self._open.discard(sample)
            self._owner.drop(self, sample)
            if self.ended:
                self._timer.record_end()
                self.close()

    def pause(self) -> None:
        """See `protocol.JobHandle.pause`."""
        self._pause(True)

    def resume(self) -> None:
        self._pause(False)

    def _pause(self, paused: bool) -> None:
        if self.paused != paused:
            self.paused = paused
            self._owner.pause(self, paused)

    def close(self) -> None:
        """See `protocol.JobHandle.close`."""
        self._open.clear()
        self._owner.end(self)
        self._deliver(None)  # wakes the consumer if it is waiting for a step
