"""Tests of the prefix cache: shared prefixes and their scores are computed once. Also the order of admission."""

from __future__ import annotations

import pytest
from history_runner import HistoryRunner, alone, scores
from test_engine_loop import finish, job, sampled

from afterword.engine.core.engine_loop import EngineLoop
from afterword.engine.core.scheduler import MAX_TIMES_PASSED_OVER
from afterword.engine.core.slot import reported_key
from afterword.engine.protocol import Job, Step
from afterword.engine.token_row import ReportedAt

COMMON = tuple(range(20))


def run_jobs(loop: EngineLoop, *jobs: Job) -> list[list[Step]]:
    """Run jobs concurrently and return the steps of each."""
    for job_id, each in enumerate(jobs):
        loop.start(job_id, each)
    steps = finish(loop)
    loop.check()
    return [steps[job_id] for job_id in range(len(jobs))]


def cached(steps: list[Step]) -> int:
    return sum(step.cached for step in steps)


def test_concurrent_jobs_share_a_prefix_that_one_of_them_computes():
    runner = HistoryRunner(slots=8, chunk=8)
    jobs = [job(prompt=(*COMMON, index, index), max_tokens=3) for index in range(6)]
    steps = run_jobs(EngineLoop(runner), *jobs)
    assert runner.computed == 20 + 6 * (2 + 2)
    assert [cached(each) for each in steps] == [0, 20, 20, 20, 20, 20]
    assert [sampled(each, 0) for each in steps] == [alone(each, 0) for each in jobs]


def test_the_key_of_lists_by_position_is_short_and_tells_positions_apart():
    def key(*lists: tuple[int, ...]) -> tuple[int, ...]:
        return reported_key(job(prompt=COMMON, prompt_alternatives=0, reported_at=ReportedAt(lists, ())))

    assert key(*[tuple(range(1000))] * 20)[0] == -1
    assert len(key(*[tuple(range(1000))] * 20)) == len(key((1,)))
    assert key((1,), (2, 3)) == key((1,), (2, 3))
    assert len({key((1,), (2, 3)), key((1, 2), (3,)), key((1,), (2,)), key((), (1, 2, 3)), key()}) == 5


def test_jobs_with_nothing_in_common_do_not_wait_for_each_other():
    runner = HistoryRunner(slots=4, chunk=8)
    loop = EngineLoop(runner)
    loop.start(0, job(prompt=COMMON))
    loop.start(1, job(prompt=(*COMMON, 1)))
    loop.start(2, job(prompt=(9, 9, 9)))
    for _ in range(4):
        loop.step()
    assert {batch.entries[0].tokens[0] for batch in runner.batches} >= {0, 9}


def test_a_later_job_reuses_the_slot_of_an_ended_job():
    runner = HistoryRunner(slots=2, chunk=8)
    loop = EngineLoop(runner)
    first = sampled(run_jobs(loop, job(prompt=COMMON, max_tokens=5))[0], 0)
    longer = (*COMMON, *first, 1, 2, 3)
    computed = runner.computed
    steps = run_jobs(loop, job(prompt=longer, max_tokens=1))[0]
    assert cached(steps) == len(COMMON) + 4  # all but the last generated token, which was never computed
    assert runner.computed == computed + 1 + 3
    assert not any(batch.slot_operations for batch in runner.batches), "a longer text continues in its slot"


def test_with_a_grid_only_prefixes_that_end_on_the_grid_are_shared():
    runner = HistoryRunner(slots=2, chunk=8, grid=4)
    loop = EngineLoop(runner)
    generated = sampled(run_jobs(loop, job(prompt=COMMON[:18], max_tokens=5))[0], 0)
    assert cached(run_jobs(loop, job(prompt=(*COMMON[:18], *generated, 1)))[0]) == 16
    assert cached(run_jobs(loop, job(prompt=COMMON[:16]))[0]) == 12, (
        "the last chunk is computed again for the logits of the first token"
    )
    sizes = [
        (row.position, len(row.tokens)) for batch in runner.batches for row in batch.entries if len(row.tokens) > 1
    ]
    assert sizes[:3] == [(0, 8), (8, 8), (16, 2)]


def test_the_same_prompt_again_computes_its_last_token_only():
    runner = HistoryRunner(slots=2, chunk=32)
    loop = EngineLoop(runner)
    one = sampled(run_jobs(loop, job(prompt=COMMON, max_tokens=1))[0], 0)
    two = run_jobs(loop, job(prompt=COMMON, max_tokens=1))[0]
    assert runner.computed == 20 + 1
    assert cached(two) == 19
    assert sampled(two, 0) == one


def test_namespaces_share_nothing():
    runner = HistoryRunner(slots=4, chunk=32)
    loop = EngineLoop(runner)
    steps = [run_jobs(loop, job(prompt=COMMON, max_tokens=1, namespace=name))[0] for name in ("", "a", "b", "a")]
    assert [cached(each) for each in steps] == [0, 0, 0, 19]


def test_the_least_recently_used_slot_is_evicted():
    runner = HistoryRunner(slots=2, chunk=32)
    loop = EngineLoop(runner)
    for first in (1, 2, 1, 3, 1):  # 3 evicts 2
        steps = run_jobs(loop, job(prompt=(first, *COMMON), max_tokens=1))[0]
    assert cached(steps) == 20
    assert cached(run_jobs(loop, job(prompt=(2, *COMMON), max_tokens=1))[0]) == 0


def test_the_samples_of_one_prompt_do_not_evict_other_prompts():
    runner = HistoryRunner(slots=4, chunk=32)
    loop = EngineLoop(runner)
    run_jobs(loop, job(prompt=(7, *COMMON), max_tokens=1))
    run_jobs(loop, job(prompt=COMMON, samples=3, max_tokens=3))
    run_jobs(loop, job(prompt=COMMON[::-1], samples=2, max_tokens=3))
    assert cached(run_jobs(loop, job(prompt=(7, *COMMON), max_tokens=1))[0]) == 20


@pytest.mark.parametrize("again", [2, 1, 0])
def test_scoring_a_prompt_again_computes_nothing(again):
    runner = HistoryRunner(slots=2, chunk=8)
    loop = EngineLoop(runner)
    run_jobs(loop, job(prompt=COMMON, max_tokens=0, prompt_alternatives=2))
    passes = len(runner.batches)
    wanted = job(prompt=COMMON, max_tokens=0, prompt_alternatives=again)
    steps = run_jobs(loop, wanted)[0]
    assert len(runner.batches) == passes
    assert [token for step in steps for token in step.scored] == scores(wanted)
    assert [end for step in steps for end in step.ended] == [(0, "length")]


def test_frequently_scored_prompts_are_not_evicted_first():
    loop = EngineLoop(HistoryRunner(slots=2, chunk=32))
    often, other, third = (job(prompt=(first, *COMMON), max_tokens=0, prompt_alternatives=0) for first in (1, 2, 3))
    for each in (often, other, often, third):
        run_jobs(loop, each)
    assert cached(run_jobs(loop, often)[0]) == 20


def test_more_alternatives_than_are_cached_are_computed():
    runner = HistoryRunner(slots=2, chunk=8)
    loop = EngineLoop(runner)
    run_jobs(loop, job(prompt=COMMON, max_tokens=0, prompt_alternatives=1))
    wanted = job(prompt=COMMON, max_tokens=0, prompt_alternatives=3)
    assert [token for step in run_jobs(loop, wanted)[0] for token in step.scored] == scores(wanted)
    assert runner.computed == 40


def test_continuations_of_one_context_score_their_own_tokens_only():
    runner = HistoryRunner(slots=8, chunk=32)
    jobs = [job(prompt=(*COMMON, index, 5), max_tokens=0, prompt_alternatives=1) for index in range(4)]
    steps = run_jobs(EngineLoop(runner), *jobs)
    assert runner.computed == 22 + 3 * (1 + 2)  # the context's last token predicts the first that differs
    for each, wanted in zip(steps, jobs, strict=True):
        assert [token for step in each for token in step.scored] == scores(wanted)


def test_a_scored_job_does_not_wait_for_an_unscored_one():
    runner = HistoryRunner(slots=2, chunk=4)
    plain, scored = job(prompt=COMMON, max_tokens=1), job(prompt=COMMON, max_tokens=0, prompt_alternatives=1)
    steps = run_jobs(EngineLoop(runner), plain, scored)
    assert [token for step in steps[1] for token in step.scored] == scores(scored)
    assert runner.computed == 40


def test_a_job_that_waits_for_a_shared_prefix_continues_when_the_other_job_is_closed():
    loop = EngineLoop(HistoryRunner(slots=4, chunk=4))
    wanted = job(prompt=(*COMMON, 1))
    loop.start(0, job(prompt=COMMON))
    loop.start(1, wanted)
    loop.step()  # admits the first job
    loop.step()
    loop.close(0)
    steps = finish(loop)[1]
    assert cached(steps) == 4
    assert sampled(steps, 0) == alone(wanted, 0)


def order_of_ends(loop: EngineLoop, jobs: list[Job]) -> list[int]:
    """The ids of the jobs in the order in which they end."""
    for job_id, each in enumerate(jobs):
        loop.start(job_id, each)
    order = []
    while (passed := loop.step()) is not None:
        order += [job_id for job_id, step in passed.items() if step.ended]
    return order


def test_cached_prompts_are_preferred_but_not_for_ever():
    warm, cold = job(prompt=COMMON, max_tokens=1), job(prompt=COMMON[::-1], max_tokens=1)
    loop = EngineLoop(HistoryRunner(slots=1, chunk=32))
    run_jobs(loop, warm)
    order = order_of_ends(loop, [cold, *[warm] * (MAX_TIMES_PASSED_OVER + 4)])
    assert order.index(0) == MAX_TIMES_PASSED_OVER


def test_a_client_with_many_jobs_does_not_block_a_client_with_one():
    loop = EngineLoop(HistoryRunner(slots=2, chunk=32))
    many = [job(prompt=(job_id, 1), max_tokens=4, client="many") for job_id in range(20)]
    order = order_of_ends(loop, [*many, job(prompt=(3, 3), max_tokens=4, client="one")])
    assert order.index(20) <= 3


def test_a_job_of_many_samples_does_not_block_another_client():
    loop = EngineLoop(HistoryRunner(slots=2, chunk=32))
    many = [job(prompt=(1, 2, 3), samples=20, max_tokens=4, client="many")]
    for job_id, each in enumerate([*many, job(prompt=(3, 3), max_tokens=4, client="one")]):
        loop.start(job_id, each)
    ended: list[tuple[int, int]] = []
    while (passed := loop.step()) is not None:
        ended += [(job_id, sample) for job_id, step in passed.items() for sample, _ in step.ended]
    assert ended.index((1, 0)) <= 4
    assert len(ended) == 21


def test_prefill_passes_are_short_only_while_others_wait():
    seconds = iter(range(10**6))
    runner = HistoryRunner(slots=2, chunk=128)
    loop = EngineLoop(runner, clock=lambda: float(next(seconds)))  # a pass takes 1 second
    loop.start(0, job(prompt=tuple(i % 24 for i in range(256)), max_tokens=2))
    loop.step()
    loop.step()
    loop.start(1, job(prompt=tuple(i % 23 for i in range(256)), max_tokens=2))
    loop.step()
    loop.step()
    assert [len(batch.entries[0].tokens) for batch in runner.batches] == [128, 64]


def test_a_score_of_a_token_that_was_never_computed_is_not_cached():
    loop = EngineLoop(HistoryRunner(slots=1, chunk=4))
    loop.start(0, job(prompt=COMMON, max_tokens=0, prompt_alternatives=1))
    loop.step()
    loop.step()
    loop.close(0)  # four tokens are computed, and the fifth has a score
    run_jobs(loop, job(prompt=(*COMMON[:4], 9, 9), max_tokens=1))
    wanted = job(prompt=(*COMMON[:4], 9, 9, 9), max_tokens=0, prompt_alternatives=1)
    assert [token for step in run_jobs(loop, wanted)[0] for token in step.scored] == scores(wanted)
