"""The jobs of one client that are not admitted yet, in the order in which they may be admitted."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from afterword.engine.core.sequence import JobState


class WaitingJobs:
    """The lowest `Job.priority` is first, then the job that came first.

    Thousands of jobs may wait. Adding and removing one moves none of the others.
    """

    def __init__(self) -> None:
        self._priorities: list[int] = []  # that occur, in order
        self._jobs: dict[int, dict[int, JobState]] = {}  # by priority and job id

    def __iter__(self) -> Iterator[JobState]:
        for priority in self._priorities:
            yield from self._jobs[priority].values()

    def __bool__(self) -> bool:
        return bool(self._priorities)

    def add(self, state: JobState) -> None:
        """Add a job behind those of its priority."""
        priority = state.job.priority
        if priority not in self._jobs:
            insort(self._priorities, priority)
        self._jobs.setdefault(priority, {})[state.job_id] = state

    def discard(self, state: JobState) -> bool:
        """Remove a job if it is here. Returns whether others are left."""
        priority = state.job.priority
        jobs = self._jobs.get(priority, {})
        if jobs.pop(state.job_id, None) is not None and not jobs:
            del self._jobs[priority], self._priorities[bisect_left(self._priorities, priority)]
        return bool(self._priorities)
