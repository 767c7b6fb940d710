"""What is computed once: beginnings of prompts across jobs, and their scores; and who is served first."""

from __future__ import annotations

import pytest
from history_runner import HistoryRunner, alone, scores
from test_engine_loop import finish, job, sampled

from afterword.engine.core.engine_loop import EngineLoop
from afterword.engine.core.scheduler import MAX_OVERTAKEN
from afterword.engine.protocol import Job, Step

COMMON = tuple(range(20))


def brought(loop: EngineLoop, *jobs: Job) -> list[list[Step]]:
    """Run jobs at the same time; the steps of each."""
    for run, each in enumerate(jobs):
        loop.start(run, each)
    steps = finish(loop)
    loop.check()
    return [steps[run] for run in range(len(jobs))]


def cached(steps: list[Step]) -> int:
    return sum(step.cached for step in steps)


def test_jobs_at_the_same_time_share_what_one_of_them_computes():
    runner = HistoryRunner(slots=8, chunk=8)
    jobs = [job(prompt=(*COMMON, index, index), max_tokens=3) for index in range(6)]
    steps = brought(EngineLoop(runner), *jobs)
    assert runner.computed == 20 + 6 * (2 + 2)
    assert [cached(each) for each in steps] == [0, 20, 20, 20, 20, 20]
    assert [sampled(each, 0) for each in steps] == [alone(each, 0) for each in jobs]


def test_jobs_with_nothing_in_common_do_not_wait_for_each_other():
    runner = HistoryRunner(slots=4, chunk=8)
    loop = EngineLoop(runner)
    loop.start(0, job(prompt=COMMON))
    loop.start(1, job(prompt=(*COMMON, 1)))
    loop.start(2, job(prompt=(9, 9, 9)))
    for _ in range(4):
        loop.step()
    assert {batch.entries[0].tokens[0] for batch in runner.batches} >= {0, 9}


def test_a_later_job_starts_from_what_an_earlier_one_left():
    runner = HistoryRunner(slots=2, chunk=8)
    loop = EngineLoop(runner)
    first = sampled(brought(loop, job(prompt=COMMON, max_tokens=5))[0], 0)
    grown = (*COMMON, *first, 1, 2, 3)
    computed = runner.computed
    steps = brought(loop, job(prompt=grown, max_tokens=1))[0]
    assert cached(steps) == len(COMMON) + 4  # all but the last, which was never computed
    assert runner.computed == computed + 1 + 3
    assert not any(batch.slot_operations for batch in runner.batches), "a text that grows stays where it is"


def test_on_a_grid_only_whole_passes_over_a_prompt_are_shared():
    runner = HistoryRunner(slots=2, chunk=8, grid=4)
    loop = EngineLoop(runner)
    generated = sampled(brought(loop, job(prompt=COMMON[:18], max_tokens=5))[0], 0)
    assert cached(brought(loop, job(prompt=(*COMMON[:18], *generated, 1)))[0]) == 16
    assert cached(brought(loop, job(prompt=COMMON[:16]))[0]) == 12, "the last pass gives the first token's logits"
    sizes = [
        (row.position, len(row.tokens)) for batch in runner.batches for row in batch.entries if len(row.tokens) > 1
    ]
    assert sizes[:3] == [(0, 8), (8, 8), (16, 2)]


def test_the_same_prompt_again_computes_its_last_token_only():
    runner = HistoryRunner(slots=2, chunk=32)
    loop = EngineLoop(runner)
    one = sampled(brought(loop, job(prompt=COMMON, max_tokens=1))[0], 0)
    two = brought(loop, job(prompt=COMMON, max_tokens=1))[0]
    assert runner.computed == 20 + 1
    assert cached(two) == 19
    assert sampled(two, 0) == one


def test_namespaces_share_nothing():
    runner = HistoryRunner(slots=4, chunk=32)
    loop = EngineLoop(runner)
    steps = [brought(loop, job(prompt=COMMON, max_tokens=1, namespace=name))[0] for name in ("", "a", "b", "a")]
    assert [cached(each) for each in steps] == [0, 0, 0, 19]


def test_the_slot_that_was_longest_unused_is_given_up():
    runner = HistoryRunner(slots=2, chunk=32)
    loop = EngineLoop(runner)
    for first in (1, 2, 1, 3, 1):  # 3 takes the place of 2
        steps = brought(loop, job(prompt=(first, *COMMON), max_tokens=1))[0]
    assert cached(steps) == 20
    assert cached(brought(loop, job(prompt=(2, *COMMON), max_tokens=1))[0]) == 0


def test_the_samples_of_one_prompt_leave_the_other_slots_their_memory():
    runner = HistoryRunner(slots=4, chunk=32)
    loop = EngineLoop(runner)
    brought(loop, job(prompt=(7, *COMMON), max_tokens=1))
    brought(loop, job(prompt=COMMON, samples=3, max_tokens=3))
    brought(loop, job(prompt=COMMON[::-1], samples=2, max_tokens=3))
    assert cached(brought(loop, job(prompt=(7, *COMMON), max_tokens=1))[0]) == 20


@pytest.mark.parametrize("again", [2, 1, 0])
def test_what_was_scored_once_costs_nothing_again(again):
    runner = HistoryRunner(slots=2, chunk=8)
    loop = EngineLoop(runner)
    brought(loop, job(prompt=COMMON, max_tokens=0, prompt_alternatives=2))
    passes = len(runner.batches)
    wanted = job(prompt=COMMON, max_tokens=0, prompt_alternatives=again)
    steps = brought(loop, wanted)[0]
    assert len(runner.batches) == passes
    assert [token for step in steps for token in step.scored] == scores(wanted)
    assert [end for step in steps for end in step.ended] == [(0, "length")]


def test_what_is_scored_often_is_not_given_up_first():
    loop = EngineLoop(HistoryRunner(slots=2, chunk=32))
    often, other, third = (job(prompt=(first, *COMMON), max_tokens=0, prompt_alternatives=0) for first in (1, 2, 3))
    for each in (often, other, often, third):
        brought(loop, each)
    assert cached(brought(loop, often)[0]) == 20


def test_more_alternatives_than_are_known_are_computed():
    runner = HistoryRunner(slots=2, chunk=8)
    loop = EngineLoop(runner)
    brought(loop, job(prompt=COMMON, max_tokens=0, prompt_alternatives=1))
    wanted = job(prompt=COMMON, max_tokens=0, prompt_alternatives=3)
    assert [token for step in brought(loop, wanted)[0] for token in step.scored] == scores(wanted)
    assert runner.computed == 40


def test_choices_after_one_context_score_their_own_tokens_only():
    runner = HistoryRunner(slots=8, chunk=32)
    jobs = [job(prompt=(*COMMON, index, 5), max_tokens=0, prompt_alternatives=1) for index in range(4)]
    steps = brought(EngineLoop(runner), *jobs)
    assert runner.computed == 22 + 3 * (1 + 2)  # the context's last token predicts the first that differs
    for each, wanted in zip(steps, jobs, strict=True):
        assert [token for step in each for token in step.scored] == scores(wanted)


def test_a_scored_job_does_not_wait_for_one_that_is_not():
    runner = HistoryRunner(slots=2, chunk=4)
    plain, scored = job(prompt=COMMON, max_tokens=1), job(prompt=COMMON, max_tokens=0, prompt_alternatives=1)
    steps = brought(EngineLoop(runner), plain, scored)
    assert [token for step in steps[1] for token in step.scored] == scores(scored)
    assert runner.computed == 40


def test_who_waits_for_a_prompt_goes_on_alone_when_its_owner_leaves():
    loop = EngineLoop(HistoryRunner(slots=4, chunk=4))
    wanted = job(prompt=(*COMMON, 1))
    loop.start(0, job(prompt=COMMON))
    loop.start(1, wanted)
    loop.step()  # the first begins
    loop.step()
    loop.close(0)
    steps = finish(loop)[1]
    assert cached(steps) == 4
    assert sampled(steps, 0) == alone(wanted, 0)


def served(loop: EngineLoop, jobs: list[Job]) -> list[int]:
    """Runs in the order in which they end."""
    for run, each in enumerate(jobs):
        loop.start(run, each)
    order = []
    while (passed := loop.step()) is not None:
        order += [run for run, step in passed.items() if step.ended]
    return order


def test_a_prompt_that_is_warm_goes_first_but_not_for_ever():
    warm, cold = job(prompt=COMMON, max_tokens=1), job(prompt=COMMON[::-1], max_tokens=1)
    loop = EngineLoop(HistoryRunner(slots=1, chunk=32))
    brought(loop, warm)
    order = served(loop, [cold, *[warm] * (MAX_OVERTAKEN + 4)])
    assert order.index(0) == MAX_OVERTAKEN


def test_a_client_with_many_jobs_does_not_keep_out_one_with_few():
    loop = EngineLoop(HistoryRunner(slots=2, chunk=32))
    many = [job(prompt=(run, 1), max_tokens=4, client="many") for run in range(20)]
    order = served(loop, [*many, job(prompt=(3, 3), max_tokens=4, client="one")])
    assert order.index(20) <= 3


def test_a_job_of_many_samples_does_not_keep_out_another_client():
    loop = EngineLoop(HistoryRunner(slots=2, chunk=32))
    many = [job(prompt=(1, 2, 3), samples=20, max_tokens=4, client="many")]
    for run, each in enumerate([*many, job(prompt=(3, 3), max_tokens=4, client="one")]):
        loop.start(run, each)
    ended: list[tuple[int, int]] = []
    while (passed := loop.step()) is not None:
        ended += [(run, sample) for run, step in passed.items() for sample, _ in step.ended]
    assert ended.index((1, 0)) <= 4
    assert len(ended) == 21


def test_passes_over_a_prompt_are_short_only_while_others_wait():
    seconds = iter(range(10**6))
    runner = HistoryRunner(slots=2, chunk=128)
    loop = EngineLoop(runner, clock=lambda: float(next(seconds)))  # a pass takes a second: half a one is fewer tokens
    loop.start(0, job(prompt=tuple(i % 24 for i in range(256)), max_tokens=2))
    loop.step()
    loop.step()
    loop.start(1, job(prompt=tuple(i % 23 for i in range(256)), max_tokens=2))
    loop.step()
    loop.step()
    assert [len(batch.entries[0].tokens) for batch in runner.batches] == [128, 64]


def test_a_score_of_a_token_that_was_never_computed_is_not_kept():
    loop = EngineLoop(HistoryRunner(slots=1, chunk=4))
    loop.start(0, job(prompt=COMMON, max_tokens=0, prompt_alternatives=1))
    loop.step()
    loop.step()
    loop.close(0)  # four tokens are computed, and the fifth has a score
    brought(loop, job(prompt=(*COMMON[:4], 9, 9), max_tokens=1))
    wanted = job(prompt=(*COMMON[:4], 9, 9, 9), max_tokens=0, prompt_alternatives=1)
    assert [token for step in brought(loop, wanted)[0] for token in step.scored] == scores(wanted)
