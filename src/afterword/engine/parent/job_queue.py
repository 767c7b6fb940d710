"""The jobs that an engine has accepted, until they end, within the limits of its queue.

Where jobs are computed is left to the owner: one worker (`supervisor`) or several replicas (`replicas.routed_engine`).
The event loop's thread owns all state.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from afterword.engine.parent.engine_metrics import EngineMetrics, JobTimer
from afterword.engine.parent.pending_job import JobOwner, PendingJob
from afterword.engine.protocol import Job, Step
from afterword.errors import Overloaded, QueueTimeout, SettingError
from afterword.settings.limit_table import limit

OVERLOADED = "The server is overloaded: too many requests are waiting. Please try again later."


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    """The limits of the queue in front of a worker."""

    queue: int = limit(4096, "prompts that wait")
    queue_tokens: int = limit(2**22, "tokens of prompts that wait and of all that they may generate")
    queue_seconds: float = limit(600.0, "seconds that a prompt waits for its turn, 0: for ever")
    max_text: int = limit(2**20, "characters of a text that is tokenized")
    adapters: int = limit(16, "served adapters up to which requests may load further ones")
    upstream_seconds: float = limit(300.0, "seconds without an event of --upstream after which a request has failed")
    hang_seconds: float = limit(15.0, "seconds without a heartbeat after which the worker is replaced, at least 3")

    def __post_init__(self) -> None:
        for name, least in (("hang_seconds", 3), ("upstream_seconds", 1)):  # a worker sends a heartbeat every second
            if getattr(self, name) < least:
                raise SettingError(f"The limit {name} must be at least {least}.")


DEFAULT_POLICY = QueuePolicy()


class QueueOwner(JobOwner, Protocol):
    """Computes the jobs. `engine_metrics` may be replaced, by those of the engine before it."""

    engine_metrics: EngineMetrics


class JobQueue:
    """Owns the pending jobs. `clock` returns seconds."""

    def __init__(self, owner: QueueOwner, policy: QueuePolicy, clock: Callable[[], float]) -> None:
        self._owner = owner
        self._policy = policy
        self._clock = clock
        self._job_ids = itertools.count()
        self._jobs: dict[int, PendingJob] = {}
        self._waiting_tokens = 0  # of the jobs that no worker has started

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, pending: PendingJob) -> bool:
        return pending.job_id in self._jobs

    def __iter__(self) -> Iterator[PendingJob]:
        """All jobs, in order of arrival. Jobs may end during the iteration."""
        return iter(list(self._jobs.values()))

    def get(self, job_id: int) -> PendingJob | None:
        """The job with this id, None if it has ended."""
        return self._jobs.get(job_id)

    def check_capacity(self, waiting: int, running: int) -> None:
        """Raise `Overloaded` if `waiting` jobs or texts were accepted, of which `running` may run besides the queue."""
        if waiting >= self._policy.queue + running:
            raise Overloaded(OVERLOADED)

    def add(self, job: Job) -> PendingJob:
        """Accept a job. A single waiting job may be as large as it likes. Raises `Overloaded`."""
        now = self._clock()
        timer = JobTimer(self._owner.engine_metrics, job, now, self._clock)
        pending = PendingJob(self._owner, next(self._job_ids), job, now, timer)
        if self._waiting_tokens and self._waiting_tokens + pending.size > self._policy.queue_tokens:
            raise Overloaded(OVERLOADED)
        self._waiting_tokens += pending.size
        self._jobs[pending.job_id] = pending
        return pending

    def add_step(self, pending: PendingJob, step: Step) -> bool:
        """Give a job its next step, and return whether the job has ended with it."""
        if not pending.admitted and step.compiling is None:
            self._waiting_tokens -= pending.size
        pending.add_step(step)
        return pending.ended and self._jobs.pop(pending.job_id, None) is not None

    def remove(self, pending: PendingJob) -> bool:
        """Remove a job, and return whether it was there."""
        if self._jobs.pop(pending.job_id, None) is None:
            return False
        if not pending.admitted:
            self._waiting_tokens -= pending.size
        return True

    def fail(self, pending: PendingJob, error: Exception) -> None:
        """End a job with an error, also where it is computed."""
        self._owner.end(pending)
        pending.fail(error)

    def fail_all(self, error: Exception) -> None:
        """End all jobs with an error."""
        for pending in self:
            self.fail(pending, error)

    def expiry(self) -> float | None:
        """Jobs and texts that were accepted before this time have waited too long. None: there is no limit."""
        return self._clock() - self._policy.queue_seconds if self._policy.queue_seconds else None

    def expire(self, accepted: float) -> None:
        """Fail the jobs that were accepted before the time `accepted` and not started."""
        for pending in self:
            if pending.since < accepted and not pending.admitted:
                self.fail(pending, QueueTimeout())
