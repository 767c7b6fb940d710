"""Tests of the suspicion against a job: it ends when every sample has progressed since the last crash."""

from __future__ import annotations

import asyncio

import pytest

from afterword.engine.parent.engine_metrics import EngineMetrics, JobTimer
from afterword.engine.parent.pending_job import MAX_CRASHES, PendingJob
from afterword.engine.protocol import BannedText, Job, Sampling, Step, Token
from afterword.engine.token_row import ReportedAt
from afterword.errors import Overloaded, QueueTimeout, UpstreamLost


class NoOwner:
    """A `JobOwner` that ignores all calls."""

    def drop(self, pending: PendingJob, sample: int) -> None: ...

    def end(self, pending: PendingJob) -> None: ...


def accepted(samples: int) -> PendingJob:
    job = Job((1, 2), samples, 9, Sampling(), (), bytes(16))
    return PendingJob(NoOwner(), 0, job, 0.0, JobTimer(EngineMetrics(), job, 0.0, lambda: 0.0))


def test_the_tokens_of_a_prediction_count_in_the_queue() -> None:
    job = Job((1, 2), 3, 9, Sampling(), (), bytes(16), prediction=(4, 5, 6, 7))
    pending = PendingJob(NoOwner(), 0, job, 0.0, JobTimer(EngineMetrics(), job, 0.0, lambda: 0.0))
    assert pending.size == 2 + 4 + 3 * 9


def test_ids_that_are_reported_by_position_count_in_the_queue() -> None:
    job = Job((1, 2), 3, 9, Sampling(), (), bytes(16), reported_at=ReportedAt(((), (4, 5, 6)), ((7,), (), (8, 9))))
    pending = PendingJob(NoOwner(), 0, job, 0.0, JobTimer(EngineMetrics(), job, 0.0, lambda: 0.0))
    assert pending.size == 2 + 3 * 9 + 6


def test_tokens_that_may_be_taken_back_count_in_the_queue() -> None:
    job = Job((1, 2), 3, 9, Sampling(), (), bytes(16), banned_text=BannedText(("x",)))
    pending = PendingJob(NoOwner(), 0, job, 0.0, JobTimer(EngineMetrics(), job, 0.0, lambda: 0.0))
    assert pending.size == 2 + 3 * (9 + 4 * 9 + 8)


def test_tokens_that_are_taken_back_after_a_crash_are_reported_once() -> None:
    pending = accepted(1)
    pending.add_step(Step(sampled=((0, Token(5)),), taken_back=3))
    pending.restart(blamed=True)
    for taken_back in (2, 2, 4):
        pending.add_step(Step(taken_back=taken_back))
    pending.add_step(Step(sampled=((0, Token(5)), (0, Token(6))), ended=((0, "length"),)))

    async def steps() -> list[Step]:
        return [step async for step in pending]

    found = asyncio.run(steps())
    assert [step.taken_back for step in found] == [3, 0, 1, 4, 0]
    assert [token.id for step in found for _, token in step.sampled] == [5, 6]


def test_steps_are_delivered_when_they_arrive_and_the_end_once() -> None:
    pending, found = accepted(1), list[Step | Exception | None]()
    first, last = Step(), Step(sampled=((0, Token(5)),), ended=((0, "length"),))
    pending.add_step(first)
    pending.deliver_to(found.append)
    assert found == [first], "what has arrived before comes first"
    pending.add_step(last)
    pending.close()
    pending.fail(Overloaded("late"))
    assert found == [first, last, None]


def test_an_error_is_delivered_as_the_end() -> None:
    pending, found = accepted(2), list[Step | Exception | None]()
    pending.deliver_to(found.append)
    error = Overloaded("full")
    pending.fail(error)
    pending.close()
    assert found == [error]


def test_the_end_is_delivered_when_the_consumer_drops_the_last_sample() -> None:
    pending, found = accepted(2), list[Step | Exception | None]()
    pending.deliver_to(found.append)
    for sample in (1, 0):
        assert not found
        pending.drop(sample)
    assert found == [None]


def step_with(*samples: int) -> Step:
    """A step with one token for each of these samples."""
    return Step(sampled=tuple((sample, Token(5)) for sample in samples))


def after_crashes(pending: PendingJob, times: int) -> PendingJob:
    """The job after `times` crashes, each when the first sample had two tokens and the second had one."""
    pending.add_step(step_with(0, 1))
    pending.add_step(step_with(0))
    for _ in range(times):
        pending.restart(blamed=True)
        pending.add_step(step_with(0, 1))
        pending.add_step(step_with(0))
    return pending


def test_a_job_is_a_suspect_while_its_grammar_is_compiled_and_not_after() -> None:
    pending = accepted(1)
    pending.add_step(Step(compiling=True))
    assert pending.restart(blamed=True)
    pending.add_step(Step(compiling=True))
    pending.add_step(Step(compiling=False))
    assert not pending.restart(blamed=True)
    assert not pending.admitted


def test_probation_ends_when_all_samples_have_progressed() -> None:
    pending = after_crashes(accepted(2), MAX_CRASHES)
    assert (pending.crashes, pending.on_probation) == (MAX_CRASHES, True)
    pending.add_step(step_with(1))
    assert pending.on_probation, "the first sample may still be the cause of the crashes"
    pending.add_step(step_with(0))
    assert (pending.crashes, pending.on_probation) == (0, False)


def test_ended_and_unstarted_samples_need_no_progress() -> None:
    pending = after_crashes(accepted(3), MAX_CRASHES)
    pending.add_step(Step(ended=((1, "stop"),)))
    pending.add_step(step_with(0))
    assert pending.crashes == 0


def test_a_grammar_that_cannot_be_compiled_now_is_an_overload() -> None:
    pending = accepted(1)
    pending.add_step(Step(failed=True, busy=True))
    with pytest.raises(Overloaded):
        asyncio.run(anext(aiter(pending)))


@pytest.mark.parametrize(("step", "error"), [(Step(lost=True), UpstreamLost), (Step(late=True), QueueTimeout)])
def test_an_upstream_that_fails_a_job_is_named(step: Step, error: type[Exception]) -> None:
    pending = accepted(2)
    pending.add_step(step)
    with pytest.raises(error):
        asyncio.run(anext(aiter(pending)))
    assert pending.ended


@pytest.mark.parametrize("sent", [step_with(0), Step(scored=(Token(2, -1.0),))], ids=["token", "score"])
def test_a_late_upstream_has_lost_a_job_that_has_brought_something(sent: Step) -> None:
    """Another sample waits for the upstream, but the client may have received the text of the first one."""

    async def read(pending: PendingJob) -> list[Step]:
        return [step async for step in pending]

    pending = accepted(2)
    pending.add_step(sent)
    pending.add_step(Step(late=True))
    with pytest.raises(UpstreamLost):
        asyncio.run(read(pending))
