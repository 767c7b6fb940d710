"""Tests of the queue that the supervisor and the engine in front of replicas share."""

from __future__ import annotations

import pytest

from afterword.engine.parent.engine_metrics import EngineMetrics
from afterword.engine.parent.job_queue import JobQueue, QueuePolicy
from afterword.engine.parent.pending_job import PendingJob
from afterword.engine.protocol import Job, Sampling, Step, Token
from afterword.errors import EngineFailure, Overloaded, QueueTimeout

JOB = Job((1, 2, 3), 1, 5, Sampling(), end_tokens=(), key=bytes(16))
SIZE = 8  # of `JOB`: the tokens of the prompt and those that it may generate


class Owner:
    """An owner that removes the jobs that end. `ended`: their ids."""

    def __init__(self, policy: QueuePolicy) -> None:
        self.now = 0.0
        self.ended: list[int] = []
        self.engine_metrics = EngineMetrics()
        self.queue = JobQueue(self, policy, lambda: self.now)

    def drop(self, pending: PendingJob, sample: int) -> None:
        raise AssertionError

    def pause(self, pending: PendingJob, paused: bool) -> None:
        raise AssertionError

    def end(self, pending: PendingJob) -> None:
        assert self.queue.remove(pending)
        self.ended.append(pending.job_id)


def test_waiting_tokens_are_bounded_until_jobs_start_or_leave() -> None:
    queue = Owner(QueuePolicy(queue_tokens=2 * SIZE)).queue
    first, second = queue.add(JOB), queue.add(JOB)
    with pytest.raises(Overloaded):
        queue.add(JOB)
    assert not queue.add_step(first, Step())  # it runs now
    third = queue.add(JOB)
    with pytest.raises(Overloaded):
        queue.add(JOB)
    assert queue.remove(second)
    assert not queue.remove(second)
    queue.add(JOB)
    assert queue.remove(first), "tokens of a running job do not count a second time"
    with pytest.raises(Overloaded):
        queue.add(JOB)
    assert next(iter(queue)) is third


def test_compiling_a_grammar_is_waiting() -> None:
    queue = Owner(QueuePolicy(queue_tokens=SIZE)).queue
    queue.add_step(queue.add(JOB), Step(compiling=True))
    with pytest.raises(Overloaded):
        queue.add(JOB)


def test_a_single_job_may_be_larger_than_the_queue() -> None:
    queue = Owner(QueuePolicy(queue_tokens=1)).queue
    queue.add(JOB)
    with pytest.raises(Overloaded):
        queue.add(JOB)


def test_the_number_of_jobs_is_bounded_besides_those_that_may_run() -> None:
    queue = Owner(QueuePolicy(queue=2)).queue
    queue.check_capacity(4, running=3)
    with pytest.raises(Overloaded):
        queue.check_capacity(5, running=3)


def test_jobs_that_wait_too_long_fail_and_running_ones_do_not() -> None:
    owner = Owner(QueuePolicy(queue_seconds=10))
    waiting, running = owner.queue.add(JOB), owner.queue.add(JOB)
    owner.queue.add_step(running, Step())
    owner.now = 10.0
    accepted = owner.queue.expiry()
    assert accepted == 0.0
    owner.queue.expire(accepted)
    assert len(owner.queue) == 2, "exactly ten seconds are not too long"
    owner.now = 11.0
    late = owner.queue.add(JOB)
    owner.queue.expire(1.0)
    assert owner.ended == [waiting.job_id]
    assert list(owner.queue) == [running, late]
    assert isinstance(waiting._steps.get_nowait(), QueueTimeout)


def test_without_a_time_limit_nothing_expires() -> None:
    assert Owner(QueuePolicy(queue_seconds=0)).queue.expiry() is None


def test_a_job_leaves_with_its_last_step() -> None:
    queue = Owner(QueuePolicy()).queue
    pending = queue.add(JOB)
    assert not queue.add_step(pending, Step(sampled=((0, Token(5)),)))
    assert queue.add_step(pending, Step(sampled=((0, Token(5)),), ended=((0, "length"),)))
    assert pending not in queue
    assert queue.get(pending.job_id) is None
    assert not queue.add_step(pending, Step()), "it has left before"


def test_all_jobs_fail_and_end_where_they_are_computed() -> None:
    owner = Owner(QueuePolicy())
    jobs = [owner.queue.add(JOB) for _ in range(3)]
    owner.queue.fail_all(EngineFailure())
    assert owner.ended == [pending.job_id for pending in jobs]
    assert len(owner.queue) == 0


def test_jobs_are_counted_in_the_metrics_that_the_owner_has_now() -> None:
    """The model manager gives each engine the metrics of the engine before it."""
    owner = Owner(QueuePolicy())
    owner.engine_metrics = EngineMetrics()
    owner.queue.add_step(owner.queue.add(JOB), Step(sampled=((0, Token(1, -1.0)),)))
    assert owner.engine_metrics.generated_tokens == 1
