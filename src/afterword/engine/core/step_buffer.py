"""Steps that a loop has ready for its jobs, handed out in pieces of bounded size.

A step may be far larger than one message to the server's process should be: a prompt whose scores are all in the prefix
cache, or a pass with many alternatives for each token. Such a step is cut into several, in order. While steps of a job
wait here the scheduler computes nothing for that job, so its tokens stay in order and few of them are kept. The jobs
whose steps do not fit take turns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from afterword.engine.protocol import Step, Token

MAX_STEP_BYTES = 2 * 2**20
"""Bytes of tokens, in memory, that are handed out at a time. The same tokens take about a ninth of it in a message."""


class StepBuffer:
    """Owner of the steps that are not handed out yet. One thread."""

    def __init__(self, piece: int = MAX_STEP_BYTES) -> None:
        self._piece = piece
        self._waiting: dict[int, deque[Step]] = {}
        self.paused: set[int] = set()  # jobs that get nothing for now

    def __contains__(self, run: int) -> bool:
        return run in self._waiting

    def __iter__(self) -> Iterator[int]:
        return iter(self._waiting)

    @property
    def free_bytes(self) -> int:
        """How many bytes more may be added by jobs that have not begun. Steps of paused jobs are not counted."""
        waiting = sum(step.size for run, steps in self._waiting.items() if run not in self.paused for step in steps)
        return self._piece - waiting

    def add(self, run: int, step: Step) -> None:
        """Keep a step of a job until it is handed out."""
        self._waiting.setdefault(run, deque()).extend(
            split_step(step, self._piece) if step.size > self._piece else (step,)
        )

    def take(self) -> dict[int, Step]:
        """The next steps, one for each job, of `piece` bytes together; one step of more is handed out alone."""
        taken: dict[int, Step] = {}
        room = self._piece
        for run in [run for run in self._waiting if run not in self.paused]:
            steps = self._waiting[run]
            if steps[0].size > room:
                if not taken:
                    taken[run] = steps.popleft()
                break
            taken[run] = steps.popleft()
            room -= taken[run].size
        for run in taken:
            steps = self._waiting.pop(run)
            if steps:
                self._waiting[run] = steps  # behind the others
        return taken

    def discard(self, run: int) -> None:
        """A job was closed."""
        self._waiting.pop(run, None)
        self.paused.discard(run)


def split_step(step: Step, size: int) -> Iterator[Step]:
    """A step as several of about `size` bytes at most, in order: the prompt's scores, then what was sampled.

    The first carries the count of cached tokens, the last the samples that ended.
    """
    scored: list[Token] = []
    sampled: list[tuple[int, Token]] = []
    cached, room = step.cached, size
    for sample, token in (*((None, token) for token in step.scored), *step.sampled):
        if room < token.size and (scored or sampled):
            yield Step(tuple(scored), tuple(sampled), cached=cached)
            scored, sampled, cached, room = [], [], 0, size
        room -= token.size
        if sample is None:
            scored.append(token)
        else:
            sampled.append((sample, token))
    yield Step(tuple(scored), tuple(sampled), step.ended, cached, step.failed)
