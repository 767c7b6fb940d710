"""What a client holds while another waits; and that a sample that is paused for it brings the same as undisturbed."""

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
SOON = 3  # passes until a short request begins while no sample is protected from a pause

clients = st.sampled_from(["one", "two", "three", "one batch", "two batch"])
crowded = st.builds(
    lambda each, client, samples, max_tokens: msgspec.structs.replace(
        each, client=client, samples=samples, max_tokens=max_tokens
    ),
    jobs,
    clients,
    st.integers(1, 6),
    st.integers(0, 24),
)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples are paused again after a few tokens, so that short ones are paused several times."""
    monkeypatch.setattr(preemption, "MIN_TOKENS_PER_TURN", 2)
    monkeypatch.setattr(scheduler, "REST_PASSES", (1, 3))
    monkeypatch.setattr(preemption, "TURN_PASSES", 4)
    monkeypatch.setattr(fair_share, "TURN_PASSES", 4)


@dataclass
class Crowd:
    """A loop, what each run brought, and in which pass each began."""

    loop: EngineLoop
    runner: HistoryRunner
    steps: dict[int, list[Step]] = field(default_factory=lambda: defaultdict(list))
    began: dict[int, int] = field(default_factory=dict)

    def step(self) -> bool:
        """Compute a pass, or let jobs begin; whether there was anything to do."""
        passed = self.loop.step()
        for run, step in (passed or {}).items():
            self.steps[run].append(step)
            self.began.setdefault(run, len(self.runner.batches))
        return passed is not None

    def passes(self, count: int) -> None:
        end = len(self.runner.batches) + count
        while len(self.runner.batches) < end:
            assert self.step(), "idle"

    def wait_for(self, run: int) -> int:
        """Passes until a run begins."""
        start = len(self.runner.batches)
        while run not in self.began:
            assert self.step(), "idle"
        return self.began[run] - start

    def held(self) -> Counter[str]:
        """Sequences of each client in the last pass."""
        return Counter(sequence.work.job.client for sequence in self.loop._scheduler._active.values())

    def check(self, wanted: dict[int, Job]) -> None:
        """Everything brought is what each job has alone."""
        for run, each in wanted.items():
            for sample in range(each.samples):
                assert sampled(self.steps[run], sample) == alone(each, sample)
            assert [token for step in self.steps[run] for token in step.scored] == scores(each)


def crowd(slots: int = SLOTS, chunk: int = 16, grid: int = 1, can_truncate: bool = True) -> Crowd:
    """A pass takes a twentieth of a second."""
    runner, ticks = HistoryRunner(slots, chunk, grid=grid, can_truncate=can_truncate), itertools.count()
    return Crowd(EngineLoop(runner, clock=lambda: next(ticks) / 20), runner)


def run_all(loop: EngineLoop, wanted: list[Job], pauses: Iterator[int]) -> dict[int, list[Step]]:
    """Jobs that arrive so many steps after one another."""
    steps: defaultdict[int, list[Step]] = defaultdict(list)
    for run, each in enumerate(wanted):
        loop.start(run, each)
        for _ in range(next(pauses)):
            for name, step in (loop.step() or {}).items():
                steps[name].append(step)
            loop._scheduler.check()
    for name, more in finish(loop).items():
        steps[name] += more
    return steps


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(crowded, min_size=2, max_size=8), st.integers(1, 5), shapes, st.data())
def test_paused_samples_bring_what_they_bring_alone(hurried, wanted, slots, shape, data):
    runner = HistoryRunner(slots, chunk=5, grid=shape[0], can_truncate=shape[1])
    loop = EngineLoop(runner)
    steps = run_all(loop, wanted, iter(lambda: data.draw(st.integers(0, 12)), None))
    for run, each in enumerate(wanted):
        ended = dict(end for step in steps[run] for end in step.ended)
        assert sorted(ended) == list(range(each.samples))
        for sample in range(each.samples):
            assert sampled(steps[run], sample) == alone(each, sample)
        assert [token for step in steps[run] for token in step.scored] == scores(each)
    assert loop.load() == Load(slots, 0, 0)
    loop.check()


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(crowded, min_size=2, max_size=8), st.integers(1, 4), shapes, st.data())
def test_paused_samples_can_be_dropped_and_closed(hurried, wanted, slots, shape, data):
    runner = HistoryRunner(slots, 4, grid=shape[0], can_truncate=shape[1])
    loop = EngineLoop(runner)
    for run, each in enumerate(wanted):
        loop.start(run, each)
    disturbed: set[int] = set()
    steps: defaultdict[int, list[Step]] = defaultdict(list)
    while (passed := loop.step()) is not None:
        for run, step in passed.items():
            steps[run].append(step)
        act = data.draw(st.sampled_from(["none"] * 6 + ["close", "drop"]))
        run = data.draw(st.integers(0, len(wanted) - 1))
        if act == "close":
            loop.close(run)
            disturbed.add(run)
        elif act == "drop":
            loop.drop(run, data.draw(st.integers(0, 5)))
            disturbed.add(run)
        loop._scheduler.check()
    for run, each in enumerate(wanted):
        for sample in range(each.samples):
            got, expected = sampled(steps[run], sample), alone(each, sample)
            assert got == expected[: len(got)]
            assert run in disturbed or got == expected
    assert loop.load() == Load(slots, 0, 0)
    loop.check()


def long_job(client: str = "a", samples: int = 1, **fields: object) -> Job:
    """A job whose samples go on longer than any test that watches it."""
    return job(prompt=(1, 2, 3), samples=samples, max_tokens=200, client=client, **fields)


def short_job(client: str = "b") -> Job:
    return job(prompt=(4, 5), max_tokens=1, client=client)


HOLDERS = {
    "n=16": [long_job(samples=16)],
    "best_of=20": [long_job(samples=20)],
    "16 single requests": [long_job() for _ in range(SLOTS)],
    "a row of a batch with n=16": [long_job("a" + BATCH_CLIENT, samples=16)],
    "8 rows of a batch with n=2": [long_job("a" + BATCH_CLIENT, samples=2) for _ in range(8)],
    "rows of 16 keys": [long_job(f"{key}{BATCH_CLIENT}") for key in range(SLOTS)],
    "two keys with n=16": [long_job(samples=16), long_job("c", samples=16)],
}


@pytest.mark.parametrize("grid", [1, 4])
@pytest.mark.parametrize("holders", HOLDERS.values(), ids=list(HOLDERS))
def test_a_short_request_begins_at_once_whatever_another_client_holds(holders, grid):
    there = crowd(grid=grid)
    for run, each in enumerate(holders):
        there.loop.start(run, each)
    there.passes(60)
    there.loop.start(99, short_job())
    assert there.wait_for(99) <= SOON


@pytest.mark.parametrize("scored", [None, 1])
def test_a_client_that_arrives_while_prompts_are_computed_begins_at_once(scored):
    there = crowd(slots=4)
    wanted = {
        run: job(prompt=(run, *[7] * 200), max_tokens=2, client="a", prompt_alternatives=scored) for run in range(4)
    }
    for run, each in wanted.items():
        there.loop.start(run, each)
    there.passes(12)
    wanted[99] = short_job()
    there.loop.start(99, wanted[99])
    assert there.wait_for(99) <= SOON
    while there.step():
        pass
    there.check(wanted)


def test_a_stream_of_short_requests_is_served_while_a_long_one_comes_to_its_end():
    there = crowd(slots=4)
    wanted = {0: long_job(samples=4)}
    there.loop.start(0, wanted[0])
    there.passes(20)
    run, longest = 1, 0
    while len([end for step in there.steps[0] for end in step.ended]) < 4:
        wanted[run] = short_job()
        there.loop.start(run, wanted[run])
        longest = max(longest, there.wait_for(run))
        while not any(step.ended for step in there.steps[run]):
            there.step()
        run += 1
    assert longest <= MIN_TOKENS_PER_TURN + SOON
    assert run > 50
    computed = sum(len(row.tokens) for batch in there.runner.batches for row in batch.entries)
    assert computed < 2 * (4 * 203 + 2 * run)
    there.check(wanted)


def test_clients_hold_equal_numbers_while_they_want_more():
    there = crowd()
    there.loop.start(0, long_job("a", samples=16))
    there.passes(20)
    there.loop.start(1, long_job("b", samples=16))
    there.passes(20)
    assert there.held() == {"a": 8, "b": 8}
    there.loop.start(2, long_job("c", samples=3))
    there.passes(20)
    assert sorted(there.held().items()) == [("a", 7), ("b", 6), ("c", 3)] or there.held() == {"a": 6, "b": 7, "c": 3}


def test_what_a_client_does_not_want_others_have():
    there = crowd()
    there.loop.start(0, long_job("a", samples=16))
    there.loop.start(1, long_job("b"))
    there.passes(20)
    assert there.held() == {"a": 15, "b": 1}


def test_all_batches_together_hold_half_while_others_want_more():
    there = crowd(slots=5)
    for run, client in enumerate(("a" + BATCH_CLIENT, "b" + BATCH_CLIENT, "c" + BATCH_CLIENT)):
        there.loop.start(run, long_job(client, samples=5))
    there.passes(20)
    assert sum(there.held().values()) == 5
    there.loop.start(9, long_job("a", samples=5))
    there.passes(30)
    assert there.held()["a"] == 3


def test_a_batch_gets_its_part_of_the_half_that_batches_hold_while_others_want_more():
    there = crowd(slots=4)
    there.loop.start(0, long_job("a" + BATCH_CLIENT, samples=4))
    there.passes(20)
    there.loop.start(1, long_job("c", samples=4))
    there.loop.start(2, long_job("d", samples=4))
    there.passes(40)
    assert there.held() == {"a" + BATCH_CLIENT: 2, "c": 1, "d": 1}
    there.loop.start(3, long_job("b" + BATCH_CLIENT, samples=4))
    there.passes(20)
    assert there.held() == {"a" + BATCH_CLIENT: 1, "b" + BATCH_CLIENT: 1, "c": 1, "d": 1}


def test_nothing_is_paused_for_requests_of_the_same_client():
    there = crowd(slots=4)
    wanted = {0: long_job(samples=4), 1: short_job("a"), 2: short_job("a")}
    for run, each in wanted.items():
        there.loop.start(run, each)
    while there.step():
        assert not any(work.queued and work.queued[0].paused for work in there.loop._scheduler._begun.values())
    assert there.runner.computed == 3 + 4 * 199 + 2 * 2
    there.check(wanted)


@pytest.mark.parametrize("grid", [1, 4])
def test_more_clients_than_sequences_take_turns(grid):
    there = crowd(slots=2, grid=grid)
    wanted = {run: long_job(client) for run, client in enumerate("abc")}
    for run, each in wanted.items():
        there.loop.start(run, each)
    there.passes(20)
    assert 2 not in there.began
    assert there.wait_for(2) <= TURN_PASSES
    while there.step():
        pass
    there.check(wanted)


def test_a_row_of_a_batch_comes_to_its_end_beside_requests_that_never_cease():
    there = crowd(slots=1)
    there.loop.start(0, job(max_tokens=40, client="a" + BATCH_CLIENT))
    run = 1
    while not any(step.ended for step in there.steps[0]):
        there.loop.start(run, job(prompt=(run % 20,), max_tokens=8, client="b"))
        there.passes(4)
        run += 1
        assert run < 200


def test_penalties_and_alternatives_survive_a_pause():
    """What is drawn depends on all tokens so far, and on how often each was there."""
    there = crowd(slots=2)
    sampling = Sampling(frequency_penalty=0.7, presence_penalty=0.2, repetition_penalty=1.2)
    each = msgspec.structs.replace(long_job(samples=2, alternatives=2), sampling=sampling)
    there.loop.start(0, each)
    there.passes(50)
    there.loop.start(1, long_job("b"))
    there.passes(50)
    assert there.held() == {"a": 1, "b": 1}
    while there.step():
        pass
    there.check({0: each})
    undisturbed = EngineLoop(HistoryRunner(2, 16))
    undisturbed.start(0, each)
    told = [pair for step in finish(undisturbed)[0] for pair in step.sampled]
    assert sorted(told, key=lambda pair: pair[0]) == sorted(
        (pair for step in there.steps[0] for pair in step.sampled), key=lambda pair: pair[0]
    )


def test_where_grouping_matters_generated_tokens_are_computed_one_by_one_again():
    there = crowd(slots=2, grid=4)
    there.loop.start(0, job(prompt=tuple(range(9)), samples=2, max_tokens=60, client="a"))
    there.passes(40)
    there.loop.start(1, job(prompt=(5,), max_tokens=30, client="b"))
    while there.step():
        pass
    for batch in there.runner.batches:
        for row in batch.entries:
            assert row.position + len(row.tokens) <= 9 or len(row.tokens) == 1


def test_a_paused_sample_can_be_dropped():
    there = crowd(slots=2)
    there.loop.start(0, long_job(samples=2))
    there.passes(20)
    there.loop.start(1, long_job("b"))
    there.passes(5)
    (paused,) = there.loop._scheduler._begun[0].queued
    there.loop.drop(0, paused.sample)
    assert there.loop.load() == Load(2, 2, 0)
    there.loop.close(0)
    there.loop.close(1)
    assert there.loop.load() == Load(2, 0, 0)
    assert there.loop.step() is None


def test_a_client_gets_its_share_of_an_odd_number():
    held = FairShare(5)
    for client, count in (("a", 3), ("b", 2)):
        for _ in range(count):
            held.acquire(client)
    held.want(["b"], now=0)
    assert not held.exceeds("a", "b")
    held.acquire("a")
    held.release("b")
    assert held.exceeds("a", "b")
    assert not held.exceeds("b", "a")


def test_of_clients_that_hold_as_much_the_one_that_waits_longest_is_first():
    held = FairShare(2)
    held.want(["a", "b"], now=0)
    held.served("a")
    held.want(["a", "b", "c"], now=1)
    assert held.order(room=True) == ["b", "a", "c"]
    assert held.overdue("b", TURN_PASSES)
    assert not held.overdue("a", TURN_PASSES)


def test_rows_of_batches_are_told_apart_from_requests():
    request = parse(b'{"prompt": [1, 2], "max_tokens": 1}', RequestLimits())
    model_info = ModelInfo(0, 64, 2, (b"a",) * 9, (0,), None, 0, False, False, 1, None, "fp")
    for name in ("", "key"):
        row = make_plan(
            request, model_info, Tokenized(((1, 2),), ()), 0, ClientIdentity(name, line=BATCH_CLIENT.strip())
        )
        assert row.prompts[0].job.client == name + BATCH_CLIENT
        assert (
            make_plan(request, model_info, Tokenized(((1, 2),), ()), 0, ClientIdentity(name)).prompts[0].job.client
            == name
        )
