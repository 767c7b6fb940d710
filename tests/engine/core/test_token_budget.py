"""Tests with fewer tokens of memory than all slots could hold. `HistoryRunner` fails if its slots hold more."""

from __future__ import annotations

from collections import defaultdict

import pytest
from history_runner import HistoryRunner, alone, scores
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_engine_loop import finish, job, sampled, shapes
from test_fair_share import contending_jobs, frequent_preemption

from afterword.engine.core import token_budget
from afterword.engine.core.engine_loop import EngineLoop
from afterword.engine.protocol import Load, Step

__all__ = ["frequent_preemption"]


@pytest.fixture
def little_growth(monkeypatch: pytest.MonkeyPatch, frequent_preemption: None) -> None:
    """Admit sequences that fit with one more token, so that memory ends while they generate."""
    monkeypatch.setattr(token_budget, "GROWTH", 1)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(contending_jobs, min_size=2, max_size=8), st.integers(1, 5), st.data())
def test_every_sample_ends_with_its_tokens_in_little_memory(little_growth, wanted, slots, data):
    """The memory holds the longest sample and a few tokens. Jobs are paused and resumed at any time."""
    shape = data.draw(shapes)
    capacity = max(len(each.prompt) + each.max_tokens for each in wanted) + data.draw(st.integers(0, 30))
    loop = EngineLoop(HistoryRunner(slots, chunk=5, capacity=capacity, **shape))
    for job_id, each in enumerate(wanted):
        loop.start(job_id, each)
    paused: set[int] = set()
    steps: defaultdict[int, list[Step]] = defaultdict(list)
    while (passed := loop.step()) is not None or paused:
        for job_id, step in (passed or {}).items():
            steps[job_id].append(step)
        loop._scheduler.check()
        if passed is None:
            loop.resume(paused.pop())
        elif data.draw(st.integers(0, 3)) == 0:
            job_id = data.draw(st.integers(0, len(wanted) - 1))
            loop.pause(job_id)
            paused.add(job_id)
    for job_id, each in enumerate(wanted):
        for sample in range(each.samples):
            assert sampled(steps[job_id], sample) == alone(each, sample)
        assert [token for step in steps[job_id] for token in step.scored] == scores(each)
    assert loop.load() == Load(slots, 0, 0)
    loop.check()


def test_jobs_that_do_not_fit_wait_and_then_run():
    runner = HistoryRunner(slots=4, chunk=8, capacity=48)
    loop = EngineLoop(runner)
    for job_id in range(3):
        loop.start(job_id, job(tuple(range(job_id, job_id + 12)), max_tokens=8))
    loop.step()
    loop.step()
    assert loop.load().running == 2, "three jobs of 20 tokens and a pass of 8 need more than 48"
    steps = finish(loop)
    assert [len(sampled(steps[job_id], 0)) for job_id in range(3)] == [8, 8, 8]


def test_cached_prefixes_are_evicted_for_new_tokens_oldest_first():
    runner = HistoryRunner(slots=4, chunk=16, capacity=40)
    loop = EngineLoop(runner)
    texts = [tuple(range(start, start + 12)) for start in (0, 4, 8)]
    for job_id, text in enumerate(texts):
        loop.start(job_id, job(text, max_tokens=1))
        finish(loop)
    assert sorted(map(len, runner.state)) == [0, 12, 12, 12]
    loop.start(3, job((20, 21, 22, 23, 20, 21), max_tokens=1))
    finish(loop)
    assert [text for text in texts if list(text) in runner.state] == texts[1:]


def test_a_prefix_whose_copy_does_not_fit_is_continued_in_its_slot():
    runner = HistoryRunner(slots=3, chunk=32, capacity=30)
    loop = EngineLoop(runner)
    shared = tuple(range(14))
    loop.start(0, job((*shared, 20, 21, 22, 23, 20, 21), max_tokens=1))
    finish(loop)
    computed = runner.computed
    loop.start(1, job((*shared, 15), max_tokens=1))
    finish(loop)
    assert runner.computed - computed == 1, "the prefix was found"


def test_samples_that_outgrow_the_memory_are_preempted_and_end(little_growth):
    runner = HistoryRunner(slots=4, chunk=8, capacity=48)
    loop = EngineLoop(runner)
    wanted = [job((number, 1, 2, 3), max_tokens=30) for number in range(4)]
    for number, each in enumerate(wanted):
        loop.start(number, each)
    steps = finish(loop)
    assert [sampled(steps[number], 0) for number in range(4)] == [alone(each, 0) for each in wanted]
    assert runner.computed > 4 * 33, "some tokens were computed again"


def test_memory_that_others_take_is_given_back_and_running_jobs_end():
    """The machine has memory for 60 tokens, then for 14, then for 60 again."""
    runner, clock = HistoryRunner(slots=4, chunk=8), [0.0]
    loop = EngineLoop(runner, clock=lambda: clock[0])
    wanted = [job((number, 1, 2, 3), max_tokens=20) for number in range(3)]
    for number, each in enumerate(wanted):
        loop.start(number, each)
    steps: defaultdict[int, list[Step]] = defaultdict(list)
    for clock[0], runner.memory, passes in ((0.0, 60, 10), (2.0, 14, 4), (4.0, 60, 1000)):
        for _ in range(passes):
            for number, step in (loop.step() or {}).items():
                steps[number].append(step)
        filled = sum(bool(tokens) for tokens in runner.state)
        assert filled == {0.0: 3, 2.0: 1, 4.0: filled}[clock[0]], "one sequence always continues"
    assert [sampled(steps[number], 0) for number in range(3)] == [alone(each, 0) for each in wanted]


def test_an_idle_engine_gives_back_the_prefixes_used_least_recently():
    runner = HistoryRunner(slots=4, chunk=16)
    loop = EngineLoop(runner)
    texts = [tuple(range(start, start + 12)) for start in (0, 4, 8)]
    for job_id, text in enumerate(texts):
        loop.start(job_id, job(text, max_tokens=1))
        finish(loop)
    runner.memory = 30
    loop.give_back_memory()
    loop.give_back_memory()
    assert sorted(map(len, runner.state)) == [0, 0, 12, 12]
    loop.check()
    assert [text for text in texts if list(text) in runner.state] == texts[1:]
