"""Tests of fair shares and preemption.

They check how many slots a client holds while others wait, and that a preempted sample gets the same tokens as one
that was not preempted.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec
import pytest
from history_runner import HistoryRunner, alone, scores
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_engine_loop import finish, job, jobs, sampled, shapes

from afterword.completion.plan import ClientIdentity, Tokenized, make_plan
from afterword.completion.request import parse
from afterword.completion.request_limits import RequestLimits
from afterword.engine.core import fair_share, preemption, scheduler
from afterword.engine.core.engine_loop import EngineLoop
from afterword.engine.core.fair_share import TURN_PASSES, FairShare
from afterword.engine.core.preemption import MIN_TOKENS_PER_TURN
from afterword.engine.protocol import BATCH_CLIENT, Job, Load, ModelInfo, Sampling, Step

SLOTS = 16
SOON = 3  # passes until a short request begins while no sample is protected from preemption

clients = st.sampled_from(["one", "two", "three", "one batch", "two batch"])
contending_jobs = st.builds(
    lambda each, client, samples, max_tokens: msgspec.structs.replace(
        each, client=client, samples=samples, max_tokens=max_tokens
    ),
    jobs,
    clients,
    st.integers(1, 6),
    st.integers(0, 24),
)


@pytest.fixture
def frequent_preemption(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow preemption again after few tokens, so that even short samples are preempted several times."""
    monkeypatch.setattr(preemption, "MIN_TOKENS_PER_TURN", 2)
    monkeypatch.setattr(scheduler, "RESUME_PASSES", (1, 3))
    monkeypatch.setattr(preemption, "TURN_PASSES", 4)
    monkeypatch.setattr(fair_share, "TURN_PASSES", 4)


@dataclass
class RecordedLoop:
    """A loop with the steps of each job (`steps`) and the number of the pass in which each job began (`began`)."""

    loop: EngineLoop
    runner: HistoryRunner
    steps: dict[int, list[Step]] = field(default_factory=lambda: defaultdict(list))
    began: dict[int, int] = field(default_factory=dict)

    def step(self) -> bool:
        """Make one step of the loop. Returns False if there was nothing to do."""
        passed = self.loop.step()
        for job_id, step in (passed or {}).items():
            self.steps[job_id].append(step)
            self.began.setdefault(job_id, len(self.runner.batches))
        return passed is not None

    def passes(self, count: int) -> None:
        end = len(self.runner.batches) + count
        while len(self.runner.batches) < end:
            assert self.step(), "idle"

    def wait_for(self, job_id: int) -> int:
        """Step until a job begins. Returns the number of passes that took."""
        start = len(self.runner.batches)
        while job_id not in self.began:
            assert self.step(), "idle"
        return self.began[job_id] - start

    def held(self) -> Counter[str]:
        """The number of slots that each client holds."""
        return Counter(sequence.job_state.job.client for sequence in self.loop._scheduler._active.values())

    def check(self, wanted: dict[int, Job]) -> None:
        """Check that all tokens and scores are those that each job would get alone."""
        for job_id, each in wanted.items():
            for sample in range(each.samples):
                assert sampled(self.steps[job_id], sample) == alone(each, sample)
            assert [token for step in self.steps[job_id] for token in step.scored] == scores(each)


def recorded_loop(slots: int = SLOTS, chunk: int = 16, grid: int = 1, can_truncate: bool = True) -> RecordedLoop:
    """An empty loop with passes of 0.05 seconds each."""
    runner, ticks = HistoryRunner(slots, chunk, grid=grid, can_truncate=can_truncate), itertools.count()
    return RecordedLoop(EngineLoop(runner, clock=lambda: next(ticks) / 20), runner)


def run_all(loop: EngineLoop, wanted: list[Job], pauses: Iterator[int]) -> dict[int, list[Step]]:
    """Start the jobs one after the other, `pauses` steps apart, and run them all to their end."""
    steps: defaultdict[int, list[Step]] = defaultdict(list)
    for job_id, each in enumerate(wanted):
        loop.start(job_id, each)
        for _ in range(next(pauses)):
            for name, step in (loop.step() or {}).items():
                steps[name].append(step)
            loop._scheduler.check()
    for name, more in finish(loop).items():
        steps[name] += more
    return steps


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(contending_jobs, min_size=2, max_size=8), st.integers(1, 5), shapes, st.data())
def test_preempted_samples_get_the_tokens_they_would_get_alone(frequent_preemption, wanted, slots, shape, data):
    runner = HistoryRunner(slots, chunk=5, grid=shape[0], can_truncate=shape[1])
    loop = EngineLoop(runner)
    steps = run_all(loop, wanted, iter(lambda: data.draw(st.integers(0, 12)), None))
    for job_id, each in enumerate(wanted):
        ended = dict(end for step in steps[job_id] for end in step.ended)
        assert sorted(ended) == list(range(each.samples))
        for sample in range(each.samples):
            assert sampled(steps[job_id], sample) == alone(each, sample)
        assert [token for step in steps[job_id] for token in step.scored] == scores(each)
    assert loop.load() == Load(slots, 0, 0)
    loop.check()


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(contending_jobs, min_size=2, max_size=8), st.integers(1, 4), shapes, st.data())
def test_preempted_samples_can_be_dropped_and_closed(frequent_preemption, wanted, slots, shape, data):
    runner = HistoryRunner(slots, 4, grid=shape[0], can_truncate=shape[1])
    loop = EngineLoop(runner)
    for job_id, each in enumerate(wanted):
        loop.start(job_id, each)
    disturbed: set[int] = set()
    steps: defaultdict[int, list[Step]] = defaultdict(list)
    while (passed := loop.step()) is not None:
        for job_id, step in passed.items():
            steps[job_id].append(step)
        action = data.draw(st.sampled_from(["none"] * 6 + ["close", "drop"]))
        job_id = data.draw(st.integers(0, len(wanted) - 1))
        if action == "close":
            loop.close(job_id)
            disturbed.add(job_id)
        elif action == "drop":
            loop.drop(job_id, data.draw(st.integers(0, 5)))
            disturbed.add(job_id)
        loop._scheduler.check()
    for job_id, each in enumerate(wanted):
        for sample in range(each.samples):
            got, expected = sampled(steps[job_id], sample), alone(each, sample)
            assert got == expected[: len(got)]
            assert job_id in disturbed or got == expected
    assert loop.load() == Load(slots, 0, 0)
    loop.check()


def long_job(client: str = "a", samples: int = 1, **fields: object) -> Job:
    """A job with samples that outlast any of these tests."""
    return job(prompt=(1, 2, 3), samples=samples, max_tokens=200, client=client, **fields)


def short_job(client: str = "b") -> Job:
    return job(prompt=(4, 5), max_tokens=1, client=client)


SLOT_HOLDERS = {
    "n=16": [long_job(samples=16)],
    "best_of=20": [long_job(samples=20)],
    "16 single requests": [long_job() for _ in range(SLOTS)],
    "a row of a batch with n=16": [long_job("a" + BATCH_CLIENT, samples=16)],
    "8 rows of a batch with n=2": [long_job("a" + BATCH_CLIENT, samples=2) for _ in range(8)],
    "rows of 16 keys": [long_job(f"{key}{BATCH_CLIENT}") for key in range(SLOTS)],
    "two keys with n=16": [long_job(samples=16), long_job("c", samples=16)],
}


@pytest.mark.parametrize("grid", [1, 4])
@pytest.mark.parametrize("holders", SLOT_HOLDERS.values(), ids=list(SLOT_HOLDERS))
def test_a_short_request_begins_at_once_while_another_client_holds_all_slots(holders, grid):
    recorded = recorded_loop(grid=grid)
    for job_id, each in enumerate(holders):
        recorded.loop.start(job_id, each)
    recorded.passes(60)
    recorded.loop.start(99, short_job())
    assert recorded.wait_for(99) <= SOON


@pytest.mark.parametrize("scored", [None, 1])
def test_a_client_that_arrives_during_prefill_begins_at_once(scored):
    recorded = recorded_loop(slots=4)
    wanted = {
        job_id: job(prompt=(job_id, *[7] * 200), max_tokens=2, client="a", prompt_alternatives=scored)
        for job_id in range(4)
    }
    for job_id, each in wanted.items():
        recorded.loop.start(job_id, each)
    recorded.passes(12)
    wanted[99] = short_job()
    recorded.loop.start(99, wanted[99])
    assert recorded.wait_for(99) <= SOON
    while recorded.step():
        pass
    recorded.check(wanted)


def test_short_requests_begin_soon_while_a_long_one_still_finishes():
    recorded = recorded_loop(slots=4)
    wanted = {0: long_job(samples=4)}
    recorded.loop.start(0, wanted[0])
    recorded.passes(20)
    job_id, longest = 1, 0
    while len([end for step in recorded.steps[0] for end in step.ended]) < 4:
        wanted[job_id] = short_job()
        recorded.loop.start(job_id, wanted[job_id])
        longest = max(longest, recorded.wait_for(job_id))
        while not any(step.ended for step in recorded.steps[job_id]):
            recorded.step()
        job_id += 1
    assert longest <= MIN_TOKENS_PER_TURN + SOON
    assert job_id > 50
    computed = sum(len(row.tokens) for batch in recorded.runner.batches for row in batch.entries)
    assert computed < 2 * (4 * 203 + 2 * job_id)
    recorded.check(wanted)


def test_waiting_clients_hold_equal_numbers_of_slots():
    recorded = recorded_loop()
    recorded.loop.start(0, long_job("a", samples=16))
    recorded.passes(20)
    recorded.loop.start(1, long_job("b", samples=16))
    recorded.passes(20)
    assert recorded.held() == {"a": 8, "b": 8}
    recorded.loop.start(2, long_job("c", samples=3))
    recorded.passes(20)
    assert sorted(recorded.held().items()) == [("a", 7), ("b", 6), ("c", 3)] or recorded.held() == {
        "a": 6,
        "b": 7,
        "c": 3,
    }


def test_a_client_gets_the_slots_that_others_do_not_need():
    recorded = recorded_loop()
    recorded.loop.start(0, long_job("a", samples=16))
    recorded.loop.start(1, long_job("b"))
    recorded.passes(20)
    assert recorded.held() == {"a": 15, "b": 1}


def test_all_batches_together_hold_half_while_a_request_waits():
    recorded = recorded_loop(slots=5)
    for job_id, client in enumerate(("a" + BATCH_CLIENT, "b" + BATCH_CLIENT, "c" + BATCH_CLIENT)):
        recorded.loop.start(job_id, long_job(client, samples=5))
    recorded.passes(20)
    assert sum(recorded.held().values()) == 5
    recorded.loop.start(9, long_job("a", samples=5))
    recorded.passes(30)
    assert recorded.held()["a"] == 3


def test_batches_share_their_half_while_requests_wait():
    recorded = recorded_loop(slots=4)
    recorded.loop.start(0, long_job("a" + BATCH_CLIENT, samples=4))
    recorded.passes(20)
    recorded.loop.start(1, long_job("c", samples=4))
    recorded.loop.start(2, long_job("d", samples=4))
    recorded.passes(40)
    assert recorded.held() == {"a" + BATCH_CLIENT: 2, "c": 1, "d": 1}
    recorded.loop.start(3, long_job("b" + BATCH_CLIENT, samples=4))
    recorded.passes(20)
    assert recorded.held() == {"a" + BATCH_CLIENT: 1, "b" + BATCH_CLIENT: 1, "c": 1, "d": 1}


def test_no_sample_is_preempted_for_a_request_of_the_same_client():
    recorded = recorded_loop(slots=4)
    wanted = {0: long_job(samples=4), 1: short_job("a"), 2: short_job("a")}
    for job_id, each in wanted.items():
        recorded.loop.start(job_id, each)
    while recorded.step():
        assert not any(state.queued and state.queued[0].paused for state in recorded.loop._scheduler._admitted.values())
    assert recorded.runner.computed == 3 + 4 * 199 + 2 * 2
    recorded.check(wanted)


@pytest.mark.parametrize("grid", [1, 4])
def test_more_clients_than_slots_take_turns(grid):
    recorded = recorded_loop(slots=2, grid=grid)
    wanted = {job_id: long_job(client) for job_id, client in enumerate("abc")}
    for job_id, each in wanted.items():
        recorded.loop.start(job_id, each)
    recorded.passes(20)
    assert 2 not in recorded.began
    assert recorded.wait_for(2) <= TURN_PASSES
    while recorded.step():
        pass
    recorded.check(wanted)


def test_a_batch_line_finishes_beside_an_endless_series_of_requests():
    recorded = recorded_loop(slots=1)
    recorded.loop.start(0, job(max_tokens=40, client="a" + BATCH_CLIENT))
    job_id = 1
    while not any(step.ended for step in recorded.steps[0]):
        recorded.loop.start(job_id, job(prompt=(job_id % 20,), max_tokens=8, client="b"))
        recorded.passes(4)
        job_id += 1
        assert job_id < 200


def test_penalties_and_alternatives_survive_a_preemption():
    """A sampled token depends on the counts of all tokens so far."""
    recorded = recorded_loop(slots=2)
    sampling = Sampling(frequency_penalty=0.7, presence_penalty=0.2, repetition_penalty=1.2)
    each = msgspec.structs.replace(long_job(samples=2, alternatives=2), sampling=sampling)
    recorded.loop.start(0, each)
    recorded.passes(50)
    recorded.loop.start(1, long_job("b"))
    recorded.passes(50)
    assert recorded.held() == {"a": 1, "b": 1}
    while recorded.step():
        pass
    recorded.check({0: each})
    undisturbed = EngineLoop(HistoryRunner(2, 16))
    undisturbed.start(0, each)
    expected = [pair for step in finish(undisturbed)[0] for pair in step.sampled]
    assert sorted(expected, key=lambda pair: pair[0]) == sorted(
        (pair for step in recorded.steps[0] for pair in step.sampled), key=lambda pair: pair[0]
    )


def test_with_a_grid_generated_tokens_are_recomputed_one_by_one():
    recorded = recorded_loop(slots=2, grid=4)
    recorded.loop.start(0, job(prompt=tuple(range(9)), samples=2, max_tokens=60, client="a"))
    recorded.passes(40)
    recorded.loop.start(1, job(prompt=(5,), max_tokens=30, client="b"))
    while recorded.step():
        pass
    for batch in recorded.runner.batches:
        for row in batch.entries:
            assert row.position + len(row.tokens) <= 9 or len(row.tokens) == 1


def test_a_preempted_sample_can_be_dropped():
    recorded = recorded_loop(slots=2)
    recorded.loop.start(0, long_job(samples=2))
    recorded.passes(20)
    recorded.loop.start(1, long_job("b"))
    recorded.passes(5)
    (paused,) = recorded.loop._scheduler._admitted[0].queued
    recorded.loop.drop(0, paused.sample)
    assert recorded.loop.load() == Load(2, 2, 0)
    recorded.loop.close(0)
    recorded.loop.close(1)
    assert recorded.loop.load() == Load(2, 0, 0)
    assert recorded.loop.step() is None


def test_shares_of_an_odd_number_of_slots():
    shares = FairShare(5)
    for client, count in (("a", 3), ("b", 2)):
        for _ in range(count):
            shares.acquire(client)
    shares.set_waiting(["b"], now=0)
    assert not shares.exceeds("a", "b")
    shares.acquire("a")
    shares.release("b")
    assert shares.exceeds("a", "b")
    assert not shares.exceeds("b", "a")


def test_of_equal_clients_the_one_that_waits_longest_is_first():
    shares = FairShare(2)
    shares.set_waiting(["a", "b"], now=0)
    shares.served("a")
    shares.set_waiting(["a", "b", "c"], now=1)
    assert shares.order(has_free_slot=True) == ["b", "a", "c"]
    assert shares.overdue("b", TURN_PASSES)
    assert not shares.overdue("a", TURN_PASSES)


def test_batch_lines_have_another_client_name_than_requests():
    request = parse(b'{"prompt": [1, 2], "max_tokens": 1}', RequestLimits())
    model_info = ModelInfo(0, 64, 2, (b"a",) * 9, (0,), None, 0, False, False, 1, None, "fp")
    for name in ("", "key"):
        row = make_plan(
            request, model_info, Tokenized(((1, 2),), ()), 0, ClientIdentity(name, queue=BATCH_CLIENT.strip())
        )
        assert row.prompts[0].job.client == name + BATCH_CLIENT
        assert (
            make_plan(request, model_info, Tokenized(((1, 2),), ()), 0, ClientIdentity(name)).prompts[0].job.client
            == name
        )
