"""Deliberate bugs. The simulator must find each of them by an invariant that it breaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from afterword.engine.core.prefix_cache import PrefixCache
from afterword.engine.core.scheduler import Scheduler
from afterword.engine.core.sequence import Sequence
from afterword.engine.parent.job_queue import JobQueue
from afterword.engine.parent.pending_job import PendingJob
from afterword.engine.parent.supervisor import Supervisor
from afterword.engine.protocol import Step, Token
from afterword.keys.rate_limiter import TokenBucket


@dataclass(frozen=True)
class Fault:
    """A deliberate bug. `rules`: the invariants that may break first. `install`: patches the server's code."""

    name: str
    rules: tuple[int, ...]
    install: Callable[[pytest.MonkeyPatch], None]


def _leak_slots(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PrefixCache, "release", lambda *_, **__: None)


def _continue_after_the_end(patch: pytest.MonkeyPatch) -> None:
    put = PendingJob.add_step

    def put_more(self: PendingJob, step: Step) -> None:
        put(self, step)
        if step.ended and not self.ended:
            self._deliver(Step(sampled=step.sampled))

    patch.setattr(PendingJob, "add_step", put_more)


def _repeat_after_a_crash(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PendingJob, "_repeats", lambda *_: False)


def _accept_any_number(patch: pytest.MonkeyPatch) -> None:
    check = Supervisor._check
    patch.setattr(Supervisor, "_check", lambda self, work, *_, **__: check(self, work, 0, 1))


def _accept_any_size(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PendingJob, "size", 0)


def _first_come_first_served(patch: pytest.MonkeyPatch) -> None:
    def oldest(self: Scheduler) -> Any:
        if not self._slots.has_free_slot:
            return None
        queued = (self._resumable(state.queued[0]) for state in self._admitted.values() if state.queued)
        if found := next(filter(None, queued), None):
            return found
        waiting = [state for states in self._waiting.values() for state in states]
        return (Sequence(min(waiting, key=lambda state: state.job_id), sample=0), None) if waiting else None

    patch.setattr(Scheduler, "_next_admission", oldest)


def _preempt_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Scheduler, "_victims", lambda *_: [])


def _grant_without_counting(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TokenBucket, "take", lambda *_: None)


def _ignore_deadlines(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(JobQueue, "expiry", lambda *_: None)


def _lose_a_job_in_a_crash(patch: pytest.MonkeyPatch) -> None:
    handle_death = Supervisor._handle_worker_death

    def handle_and_lose(self: Supervisor) -> None:
        handle_death(self)
        if self._waiting:
            self._waiting.popitem()

    patch.setattr(Supervisor, "_handle_worker_death", handle_and_lose)


def _ignore_hangs(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("afterword.engine.parent.watchdog.Watchdog.is_hanging", lambda *_, **__: False)


def _keep_rejected_tokens(patch: pytest.MonkeyPatch) -> None:
    def all_of_draft(_: object, __: object, found: list[list[Token]]) -> list[Token]:
        return [token for (token,) in found]

    patch.setattr("afterword.engine.core.engine_loop.confirmed_tokens", all_of_draft)


FAULTS = (
    Fault("a slot is not released", (2,), _leak_slots),
    Fault("a sample continues after its end", (4,), _continue_after_the_end),
    Fault("a token is repeated after a crash", (5,), _repeat_after_a_crash),
    Fault("the queue has no limit of jobs", (3,), _accept_any_number),
    Fault("the queue has no limit of tokens", (3,), _accept_any_size),
    Fault("jobs are admitted in order of arrival", (7,), _first_come_first_served),
    Fault("no sequence is preempted", (11,), _preempt_nothing),
    Fault("the rate limiter does not count", (9,), _grant_without_counting),
    Fault("queue deadlines are ignored", (6,), _ignore_deadlines),
    Fault("a job is lost in a crash", (0, 1), _lose_a_job_in_a_crash),
    Fault("a hung worker is not noticed", (6,), _ignore_hangs),
    Fault("tokens after a rejected one are kept", (5,), _keep_rejected_tokens),
)
