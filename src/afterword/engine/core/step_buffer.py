"""Buffers the steps of jobs and returns them in portions of bounded size.

A step can be far larger than one message to the server should be. Examples are a prompt whose scores are all in the
prefix cache, and a pass with many alternatives for each token. The buffer splits such a step into several, in order.
While the buffer holds steps of a job, the scheduler computes nothing for that job. So the job's tokens stay in order
and few of them are buffered. If the steps of all jobs do not fit into one portion, the jobs take turns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from afterword.engine.protocol import Step, Token

MAX_STEP_BYTES = 2 * 2**20
"""The most bytes of tokens, in memory, that one portion has. In a message the same tokens take about a ninth of it."""


class StepBuffer:
    """Owner of the steps that are not sent yet. One thread calls everything. `max_bytes`: size of a portion."""

    def __init__(self, max_bytes: int = MAX_STEP_BYTES) -> None:
        self._max_bytes = max_bytes
        self._waiting: dict[int, deque[Step]] = {}
        self.paused: set[int] = set()  # ids of jobs that get no steps for now

    def __contains__(self, job_id: object) -> bool:
        return job_id in self._waiting

    def __iter__(self) -> Iterator[int]:
        return iter(self._waiting)

    @property
    def free_bytes(self) -> int:
        """Bytes that new jobs may still add. Steps of paused jobs do not count. Can be negative."""
        waiting = sum(
            step.size for job_id, steps in self._waiting.items() if job_id not in self.paused for step in steps
        )
        return self._max_bytes - waiting

    def add(self, job_id: int, step: Step) -> None:
        """Add a step of a job, split if it exceeds the size of a portion."""
        self._waiting.setdefault(job_id, deque()).extend(
            split_step(step, self._max_bytes) if step.size > self._max_bytes else (step,)
        )

    def take(self) -> dict[int, Step]:
        """Remove and return the next portion: at most one step of each job, at most `max_bytes` bytes together.

        A single step of more than `max_bytes` bytes is returned alone.
        """
        taken: dict[int, Step] = {}
        free = self._max_bytes
        for job_id in [job_id for job_id in self._waiting if job_id not in self.paused]:
            steps = self._waiting[job_id]
            if steps[0].size > free:
                if not taken:
                    taken[job_id] = steps.popleft()
                break
            taken[job_id] = steps.popleft()
            free -= taken[job_id].size
        for job_id in taken:
            steps = self._waiting.pop(job_id)
            if steps:
                self._waiting[job_id] = steps  # to the end: the other jobs come first in the next portion
        return taken

    def discard(self, job_id: int) -> None:
        """Delete all steps of a closed job."""
        self._waiting.pop(job_id, None)
        self.paused.discard(job_id)


def split_step(step: Step, size: int) -> Iterator[Step]:
    """Split a step into several of about `size` bytes at most, in order: prompt scores, then sampled tokens.

    The first part carries the count of cached tokens, the last the samples that ended.
    """
    scored: list[Token] = []
    sampled: list[tuple[int, Token]] = []
    cached, free = step.cached, size
    for sample, token in (*((None, token) for token in step.scored), *step.sampled):
        if free < token.size and (scored or sampled):
            yield Step(tuple(scored), tuple(sampled), cached=cached)
            scored, sampled, cached, free = [], [], 0, size
        free -= token.size
        if sample is None:
            scored.append(token)
        else:
            sampled.append((sample, token))
    yield Step(tuple(scored), tuple(sampled), step.ended, cached, step.failed, taken_back=step.taken_back)
