"""Bugs planted on purpose. The simulator must find each of them, by the invariant that it breaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from afterword.engine.core.prefix_cache import PrefixCache
from afterword.engine.core.scheduler import Scheduler
from afterword.engine.core.sequence import Sequence
from afterword.engine.parent.pending_job import PendingJob
from afterword.engine.parent.supervisor import Supervisor
from afterword.engine.protocol import Step
from afterword.keys.rate_limiter import TokenBucket


@dataclass(frozen=True)
class Fault:
    """`rules` are the invariants that may show it first."""

    name: str
    rules: tuple[int, ...]
    plant: Callable[[pytest.MonkeyPatch], None]


def _leak_slots(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PrefixCache, "release", lambda *_, **__: None)


def _go_on_after_the_end(patch: pytest.MonkeyPatch) -> None:
    put = PendingJob.add_step

    def put_more(self: PendingJob, step: Step) -> None:
        put(self, step)
        if step.ended and not self.ended:
            self._steps.put_nowait(Step(sampled=step.sampled))

    patch.setattr(PendingJob, "add_step", put_more)


def _repeat_after_a_crash(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PendingJob, "_repeats", lambda *_: False)


def _admit_everyone(patch: pytest.MonkeyPatch) -> None:
    check = Supervisor._check
    patch.setattr(Supervisor, "_check", lambda self, work, waiting, room: check(self, work, 0, 1))


def _admit_any_size(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PendingJob, "size", 0)


def _first_come_first_served(patch: pytest.MonkeyPatch) -> None:
    def oldest(self: Scheduler) -> Any:
        if not self._slots.has_free_slot:
            return None
        queued = (self._resumable(work.queued[0]) for work in self._begun.values() if work.queued)
        if found := next(filter(None, queued), None):
            return found
        waiting = [work for works in self._waiting.values() for work in works.values()]
        return (Sequence(min(waiting, key=lambda work: work.run), sample=0), None) if waiting else None

    patch.setattr(Scheduler, "_next", oldest)


def _pause_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Scheduler, "_victims", lambda *_: [])


def _grant_without_counting(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TokenBucket, "take", lambda *_: None)


def _ignore_deadlines(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Supervisor, "_expire", lambda *_: None)


def _forget_one_in_a_crash(patch: pytest.MonkeyPatch) -> None:
    mourn = Supervisor._handle_worker_death

    def forget(self: Supervisor) -> None:
        mourn(self)
        if self._waiting:
            self._waiting.popitem()

    patch.setattr(Supervisor, "_handle_worker_death", forget)


def _ignore_silence(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("afterword.engine.parent.watchdog.Watchdog.is_hanging", lambda *_, **__: False)


FAULTS = (
    Fault("a slot is not given back", (2,), _leak_slots),
    Fault("a sample that has ended goes on", (4,), _go_on_after_the_end),
    Fault("a token is repeated after a crash", (5,), _repeat_after_a_crash),
    Fault("the queue has no end", (3,), _admit_everyone),
    Fault("the queue takes any number of tokens", (3,), _admit_any_size),
    Fault("clients are served as they come", (7,), _first_come_first_served),
    Fault("nothing is paused for a client that waits", (11,), _pause_nothing),
    Fault("the limiter does not count", (9,), _grant_without_counting),
    Fault("deadlines are ignored", (6,), _ignore_deadlines),
    Fault("a job is forgotten in a crash", (0, 1), _forget_one_in_a_crash),
    Fault("a hung engine is not noticed", (6,), _ignore_silence),
)
