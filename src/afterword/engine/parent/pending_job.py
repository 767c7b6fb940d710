"""One accepted job until it ends: what it has brought, and what of a repetition after a crash is new.

Whoever waits for it sees its steps once and in order, whatever happens to the engine's processes.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Protocol

from afterword.engine.parent.engine_metrics import JobTimer
from afterword.engine.protocol import Job, Step
from afterword.errors import NonFiniteLogits

MAX_CRASHES = 2
"""What was being computed in so many, and came no further in between, is not tried again."""


class JobOwner(Protocol):
    """Who keeps jobs and can tell the engine about them."""

    def drop(self, pending: PendingJob, sample: int) -> None:
        """End one sample in the engine."""
        ...

    def end(self, pending: PendingJob) -> None:
        """Forget a job."""
        ...

    def pause(self, pending: PendingJob, paused: bool) -> None:
        """Have the engine hold a job, or go on with it."""
        ...


class PendingJob:
    """A job under way; see `protocol.JobHandle`. Owned by its keeper.

    `since`: when it was accepted. `admitted`: an engine has ever begun it. `begun`: the one that lives now has;
    `has_progress`: and brought some of it. `crashes`: how many it may be to blame for, having come no further in
    between.
    `paused`: its reader is behind, and the engine computes nothing for it.
    """

    def __init__(self, owner: JobOwner, name: int, job: Job, since: float, timer: JobTimer) -> None:
        self.name = name
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
        self._delivered: Counter[int | None] = Counter()  # tokens by sample; under None the prompt's
        self._again: Counter[int | None] = Counter()  # as many of them will come a second time
        self._behind: set[int] = set()  # samples that have not yet come further than before the last crash
        self._repeated = False
        self._steps: asyncio.Queue[Step | Exception | None] = asyncio.Queue()  # None: nothing more will come

    @property
    def size(self) -> int:
        """The most tokens that it is about."""
        return len(self.job.prompt) + self.job.samples * self.job.max_tokens

    @property
    def has_output(self) -> bool:
        """Whether anyone may have seen a token of it."""
        return self._delivered.total() > 0

    @property
    def ended(self) -> bool:
        """Whether every sample has ended."""
        return not self._open

    @property
    def repeating(self) -> bool:
        """Whether all that is computed of it now was brought before."""
        return self._again[None] > 0 or all(self._again[sample] > 0 for sample in self._open)

    @property
    def on_probation(self) -> bool:
        """Whether nothing else should begin before it is known how this goes."""
        return self.crashes >= MAX_CRASHES or (self.crashes > 0 and not self.has_output)

    # ---- what the keeper does with it

    def add_step(self, step: Step) -> None:
        """Take a step from the engine."""
        self.admitted = self.begun = True
        self.has_progress = self.has_progress or bool(step.scored or step.sampled)
        if step.failed:
            self._open.clear()
            self._timer.record_end()
            self.fail(NonFiniteLogits())
            return
        if self._repeated:
            step = self._new(step)
        self._timer.record_step(step)
        self._delivered[None] += len(step.scored)
        self._delivered.update(sample for sample, _ in step.sampled)
        self._open.difference_update(sample for sample, _ in step.ended)
        self._behind.difference_update(sample for sample, _ in step.sampled)
        if (step.scored or step.sampled) and not self._behind & self._open:
            self.crashes = 0  # one sample that comes further says nothing of the others
        self._steps.put_nowait(step)
        if self.ended:
            self._timer.record_end()
            self._steps.put_nowait(None)

    def restart(self, blamed: bool) -> bool:
        """The engine has died; this will begin anew. Whether it is blamed: what was only being repeated is not."""
        blamed = blamed and self.begun and not self.repeating
        self.crashes += blamed
        self._repeated = self._repeated or self.begun
        self._again = self._delivered.copy()
        self._behind = {sample for sample in self._open if self._delivered[sample]}
        self.begun = self.has_progress = False
        return blamed

    def fail(self, error: Exception) -> None:
        """End with an error."""
        self._steps.put_nowait(error)

    def _new(self, step: Step) -> Step:
        """What of a step has not been told before a crash. Samples that had ended are ended again."""
        for sample in {sample for sample, _ in step.sampled} - self._open:
            self._owner.drop(self, sample)
        known, self._again[None] = self._again[None], max(0, self._again[None] - len(step.scored))
        sampled = tuple(pair for pair in step.sampled if pair[0] in self._open and not self._repeats(pair[0]))
        ended = tuple(pair for pair in step.ended if pair[0] in self._open)
        return Step(step.scored[known:], sampled, ended)

    def _repeats(self, sample: int) -> bool:
        """Whether a sample's next token has been told; it counts as taken."""
        repeats = self._again[sample] > 0
        self._again[sample] -= repeats
        return repeats

    # ---- what those who wait for it do

    async def __aiter__(self) -> AsyncIterator[Step]:
        while (step := await self._steps.get()) is not None:
            if isinstance(step, Exception):
                raise step
            yield step

    def drop(self, sample: int) -> None:
        """End one sample now."""
        if sample in self._open:
            self._open.discard(sample)
            self._owner.drop(self, sample)
            if self.ended:
                self._timer.record_end()
                self.close()

    def pause(self) -> None:
        """Have nothing more computed for now; see `protocol.JobHandle`."""
        self._pause(True)

    def resume(self) -> None:
        """Go on after a pause."""
        self._pause(False)

    def _pause(self, paused: bool) -> None:
        if self.paused != paused:
            self.paused = paused
            self._owner.pause(self, paused)

    def close(self) -> None:
        """End the whole job now."""
        self._open.clear()
        self._owner.end(self)
        self._steps.put_nowait(None)  # whoever is waiting for a step, waits no longer
