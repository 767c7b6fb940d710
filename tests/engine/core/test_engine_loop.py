"""Tests of `EngineLoop`: a job's results depend on the job alone, not on other jobs and not on their cancellation."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

from history_runner import HistoryRunner, alone, logits_after, scores
from hypothesis import given, settings
from hypothesis import strategies as st

from afterword.engine.core.engine_loop import EngineLoop
from afterword.engine.core.forward_batch import CopyPrefix
from afterword.engine.core.step_buffer import MAX_STEP_BYTES, StepBuffer, split_step
from afterword.engine.protocol import Job, Load, Sampling, Step, Token
from afterword.engine.token_row import MAX_LISTED

PLAIN = Sampling()

tokens = st.integers(0, 23)
beginnings = st.sampled_from([(), (), tuple(range(8)), tuple(range(16))])
jobs = st.builds(
    Job,
    prompt=st.builds(lambda start, rest: start + tuple(rest), beginnings, st.lists(tokens, min_size=1, max_size=12)),
    samples=st.integers(1, 5),
    max_tokens=st.integers(0, 8),
    sampling=st.builds(
        Sampling,
        temperature=st.sampled_from([0.0, 0.7, 1.0]),
        top_p=st.sampled_from([0.5, 1.0]),
        presence_penalty=st.sampled_from([0.0, 1.5]),
        frequency_penalty=st.sampled_from([0.0, -0.5]),
        top_k=st.sampled_from([0, 3]),
        min_p=st.sampled_from([0.0, 0.2]),
        repetition_penalty=st.sampled_from([1.0, 1.3]),
        logit_bias=st.just(()),
    ),
    end_tokens=st.just((3, 7)),
    key=st.binary(min_size=16, max_size=16),
    alternatives=st.sampled_from([None, 0, 2]),
    min_tokens=st.sampled_from([0, 0, 4]),
    prompt_alternatives=st.sampled_from([None, 0, 2]),
    namespace=st.sampled_from(["", "", "salt"]),
    client=st.sampled_from(["", "someone"]),
)
shapes: st.SearchStrategy[dict[str, Any]] = st.sampled_from(
    [
        {},
        {"grid": 3},
        {"joins_prompts": True},
        {"can_truncate": False},
        {"can_truncate": False, "max_snapshots": 2},
        {"can_truncate": False, "max_snapshots": 40},
        {"can_truncate": False, "max_snapshots": 40, "grid": 3},
    ]
)
"""How slots can be truncated, as arguments of `HistoryRunner`."""


def job(prompt: tuple[int, ...] = (1, 2), samples: int = 1, max_tokens: int = 4, **fields: object) -> Job:
    return Job(prompt, samples, max_tokens, PLAIN, end_tokens=(), key=b"k" * 16, **fields)  # type: ignore[arg-type]


def finish(loop: EngineLoop) -> dict[int, list[Step]]:
    """Run until idle and return all steps of each job."""
    steps: defaultdict[int, list[Step]] = defaultdict(list)
    while (passed := loop.step()) is not None:
        for job_id, step in passed.items():
            steps[job_id].append(step)
    return steps


def sampled(steps: list[Step], sample: int) -> list[int]:
    return [token.id for step in steps for index, token in step.sampled if index == sample]


step_sizes = st.sampled_from([1, 500, MAX_STEP_BYTES])  # bytes of one portion of steps


@settings(deadline=None, max_examples=150)
@given(st.lists(jobs, min_size=1, max_size=6), st.integers(1, 5), st.integers(3, 8), shapes, step_sizes)
def test_every_sample_gets_the_tokens_it_would_get_alone(wanted, slots, chunk, shape, max_step_bytes):
    runner = HistoryRunner(slots, chunk, **shape)
    loop = EngineLoop(runner, max_step_bytes=max_step_bytes)
    for job_id, each in enumerate(wanted):
        loop.start(job_id, each)
    steps = finish(loop)
    for job_id, each in enumerate(wanted):
        ended = dict(end for step in steps[job_id] for end in step.ended)
        assert sorted(ended) == list(range(each.samples))
        for sample in range(each.samples):
            expected = alone(each, sample)
            assert sampled(steps[job_id], sample) == expected
            assert ended[sample] == ("stop" if expected and expected[-1] in each.end_tokens else "length")
        assert [token for step in steps[job_id] for token in step.scored] == scores(each)
    assert loop.load() == Load(slots, 0, 0)
    loop.check()


@settings(deadline=None, max_examples=150)
@given(st.lists(jobs, min_size=2, max_size=6), st.integers(1, 4), shapes, step_sizes, st.data())
def test_closing_dropping_and_pausing_a_job_does_not_affect_other_jobs(wanted, slots, shape, max_step_bytes, data):
    runner = HistoryRunner(slots, 4, **shape)
    loop = EngineLoop(runner, max_step_bytes=max_step_bytes)
    for job_id, each in enumerate(wanted):
        loop.start(job_id, each)
    disturbed: set[int] = set()
    paused: set[int] = set()
    steps: defaultdict[int, list[Step]] = defaultdict(list)
    while (passed := loop.step()) is not None or paused:
        for job_id, step in (passed or {}).items():
            assert job_id not in paused
            steps[job_id].append(step)
        if passed is None:
            loop.resume(paused.pop())
        action = data.draw(st.sampled_from(["none", "none", "close", "drop", "pause", "resume"]))
        job_id = data.draw(st.integers(0, len(wanted) - 1))
        if action == "pause":
            loop.pause(job_id)
            paused.add(job_id)
        elif action == "resume":
            loop.resume(job_id)
            paused.discard(job_id)
        elif action == "close":
            loop.close(job_id)
            disturbed.add(job_id)
        elif action == "drop":
            loop.drop(job_id, data.draw(st.integers(0, 4)))
            disturbed.add(job_id)
    for job_id, each in enumerate(wanted):
        for sample in range(each.samples):
            got, expected = sampled(steps[job_id], sample), alone(each, sample)
            assert got == expected[: len(got)]
            assert job_id in disturbed or got == expected
        assert job_id in disturbed or [token for step in steps[job_id] for token in step.scored] == scores(each)
    assert loop.load() == Load(slots, 0, 0)
    loop.check()


def test_a_prompt_is_computed_once_for_all_its_samples():
    runner = HistoryRunner(slots=8, chunk=4)
    loop = EngineLoop(runner)
    loop.start(0, job(prompt=tuple(range(10)), samples=6, max_tokens=3))
    finish(loop)
    assert runner.computed == 10 + 6 * 2  # the last token of a sample is never computed


def test_samples_beyond_the_slots_reuse_the_prompt_of_an_ended_sample():
    runner = HistoryRunner(slots=2, chunk=16)
    loop = EngineLoop(runner)
    loop.start(0, job(prompt=tuple(range(10)), samples=7, max_tokens=3))
    finish(loop)
    assert runner.computed == 10 + 7 * 2


def test_the_first_tokens_of_all_samples_come_with_the_prompts_last_pass():
    loop = EngineLoop(HistoryRunner(slots=1, chunk=4))
    loop.start(0, job(prompt=tuple(range(10)), samples=5))
    for _ in range(3):  # the job's first step, then two passes without the prompt's end
        assert not loop.step()[0].sampled
    assert [sample for sample, _ in loop.step()[0].sampled] == [0, 1, 2, 3, 4]


def test_scored_tokens_are_the_prompts_own_from_the_second_on():
    loop = EngineLoop(HistoryRunner(slots=1, chunk=3))
    wanted = job(prompt=tuple(range(8)), max_tokens=0, prompt_alternatives=2)
    loop.start(0, wanted)
    scored = [token for step in finish(loop)[0] for token in step.scored]
    assert [token.id for token in scored] == list(wanted.prompt[1:])
    assert scored == scores(wanted)
    for position, token in enumerate(scored):
        row = logits_after(list(wanted.prompt[: position + 1]))
        assert token.rank == 1 + sum(row > row[token.id])


def test_prompts_and_running_sequences_take_turns():
    runner = HistoryRunner(slots=2, chunk=2)
    seconds = itertools.count()
    loop = EngineLoop(runner, clock=lambda: float(next(seconds)))  # a pass exceeds PASS_SECONDS
    loop.start(0, job(max_tokens=8))
    loop.step()
    loop.start(1, job(prompt=tuple(range(10)), max_tokens=1))
    finish(loop)
    kinds = [batch.entries[0].slot for batch in runner.batches[1:10]]
    assert kinds == [0, 1, 0, 1, 0, 1, 0, 1, 0]


def test_many_prompts_are_computed_before_few_sequences_run():
    """A pass takes 0.1 seconds: two fit into the time for prefill, and up to six while few sequences run."""
    tenths = itertools.count()
    runner = HistoryRunner(slots=16, chunk=32)
    loop = EngineLoop(runner, clock=lambda: next(tenths) / 10)
    for job_id in range(12):
        loop.start(job_id, job(prompt=(job_id, *range(1, 20), *range(12)), max_tokens=40))
    finish(loop)
    kinds = ["prompt" if len(batch.entries[0].tokens) > 1 else "step" for batch in runner.batches]
    lengths = [len(list(group)) for kind, group in itertools.groupby(kinds) if kind == "prompt"]
    assert lengths[1] > lengths[-1]
    assert max(lengths) <= 8


def first_pass_slots(
    lengths: list[int], clients: list[str], alternatives: int | None = None, **options: Any
) -> list[tuple[int, int]]:
    """The slot and the number of tokens of each entry of the first pass over prompts of these lengths."""
    runner = HistoryRunner(slots=8, chunk=32, **options)
    loop = EngineLoop(runner)
    for job_id, (length, client) in enumerate(zip(lengths, clients, strict=True)):
        prompt = (job_id,) * length
        loop.start(job_id, job(prompt, max_tokens=1, client=client, prompt_alternatives=alternatives))
    finish(loop)
    return [(entry.slot, len(entry.tokens)) for entry in runner.batches[0].entries]


def test_one_pass_computes_the_ends_of_several_prompts_if_the_runner_asks_for_it():
    lengths, clients = [10, 40, 12, 11, 10], [""] * 5
    assert first_pass_slots(lengths, clients) == [(0, 10)]
    assert first_pass_slots(lengths, clients, joins_prompts=True) == [(0, 10), (2, 12), (4, 10)]


def test_a_pass_does_not_join_prompts_of_several_clients():
    assert first_pass_slots([10, 9, 8], ["a", "b", "a"], joins_prompts=True) == [(0, 10), (2, 8)]


def test_a_pass_does_not_join_prompts_whose_whole_rows_are_reported():
    """The rows of a pass are kept in memory until they are sent."""
    assert first_pass_slots([9, 10], ["", ""], alternatives=5, joins_prompts=True) == [(0, 9), (1, 10)]
    assert first_pass_slots([9, 10], ["", ""], alternatives=MAX_LISTED + 1, joins_prompts=True) == [(0, 9)]


def test_a_short_prompt_does_not_wait_for_a_long_one():
    runner = HistoryRunner(slots=2, chunk=2)
    loop = EngineLoop(runner)
    loop.start(0, job(prompt=tuple(range(20)), max_tokens=1))
    loop.start(1, job(prompt=(5, 6), max_tokens=1))
    passes = 0
    while 1 not in (done := loop.step()) or not done[1].ended:
        passes += 1
    assert passes <= 1


def test_closing_frees_the_sequences_before_the_next_pass():
    loop = EngineLoop(HistoryRunner(slots=2, chunk=4))
    for job_id in range(4):
        loop.start(job_id, job(samples=2, max_tokens=50))
    for _ in range(6):
        loop.step()
    for job_id in range(4):
        loop.close(job_id)
    assert loop.load() == Load(2, 0, 0)
    assert loop.step() is None


def test_gaps_between_used_slots_are_closed():
    runner = HistoryRunner(slots=6, chunk=4)
    loop = EngineLoop(runner)
    jobs = [job(prompt=(job_id + 1,), max_tokens=40) for job_id in range(6)]
    for job_id, each in enumerate(jobs):
        loop.start(job_id, each)
    early = defaultdict(list)
    for _ in range(20):
        for job_id, step in (loop.step() or {}).items():
            early[job_id].append(step)
    for job_id in (0, 2, 3):
        loop.close(job_id)
    passes = len(runner.batches)
    steps = finish(loop)
    slots = [row.slot for row in runner.batches[passes + 3].entries]
    assert slots == list(range(slots[0], slots[0] + 3))
    for job_id in (1, 4, 5):
        assert sampled(early[job_id] + steps[job_id], 0) == alone(jobs[job_id], 0)


def test_one_copy_moves_the_outermost_slot_next_to_the_others():
    runner = HistoryRunner(slots=8, chunk=4)
    loop = EngineLoop(runner)
    for job_id in range(8):
        loop.start(job_id, job(prompt=(job_id + 1,), max_tokens=40))
    for _ in range(24):
        loop.step()
    for job_id in (1, 2, 3, 4):
        loop.close(job_id)
    finish(loop)
    moves = [move for batch in runner.batches for move in batch.slot_operations if isinstance(move, CopyPrefix)]
    assert [(move.source, move.target) for move in moves][-1] == (0, 4)
    assert [4, 5, 6, 7] in [[row.slot for row in batch.entries] for batch in runner.batches]


def test_late_messages_about_unknown_jobs_are_ignored():
    loop = EngineLoop(HistoryRunner(slots=1, chunk=4))
    loop.close(9)
    loop.drop(9, 0)
    loop.start(0, job())
    loop.drop(0, 0)  # no effect: the job has no sampled token yet
    assert len(sampled(finish(loop)[0], 0)) == 4


# ---- steps in portions


def scored(count: int, alternatives: int = 2) -> tuple[Token, ...]:
    return tuple(Token(i, -1.0, ((1, -0.5),) * alternatives, 1) for i in range(count))


def test_a_large_step_is_split_into_parts_in_order():
    step = Step(scored(50), tuple((sample, Token(sample)) for sample in range(9)), ((3, "stop"), (4, "length")), 7)
    parts = list(split_step(step, 2000))
    assert len(parts) > 5
    assert all(part.size <= 2000 for part in parts)
    assert tuple(token for part in parts for token in part.scored) == step.scored
    assert tuple(pair for part in parts for pair in part.sampled) == step.sampled
    assert [part.cached for part in parts] == [7] + [0] * (len(parts) - 1)
    assert [part.ended for part in parts] == [()] * (len(parts) - 1) + [step.ended]


def test_jobs_with_large_steps_take_turns_and_a_paused_job_blocks_no_other():
    step_buffer = StepBuffer(max_bytes=4000)
    for job_id in range(3):
        step_buffer.add(job_id, Step(scored(30)))
    assert step_buffer.free_bytes < 0
    step_buffer.paused.add(1)
    order = []
    while taken := step_buffer.take():
        assert sum(step.size for step in taken.values()) <= 4000
        order += list(taken)
    assert order[:4] == [0, 2, 0, 2]
    assert step_buffer.free_bytes == 4000
    step_buffer.paused.discard(1)
    assert list(step_buffer.take()) == [1]


def test_cached_scores_are_returned_in_portions_between_forward_passes():
    runner = HistoryRunner(slots=3, chunk=8, grid=1)
    loop = EngineLoop(runner, max_step_bytes=3000)
    scoring = job(prompt=tuple(range(16)), max_tokens=0, prompt_alternatives=2)
    loop.start(0, scoring)
    finish(loop)
    for job_id in range(1, 40):
        loop.start(job_id, scoring)
    loop.start(100, job(prompt=(5, 6, 7), max_tokens=6, client="another"))
    computed = runner.computed
    got: defaultdict[int, list[Token]] = defaultdict(list)
    generated_after = []
    while (steps := loop.step()) is not None:
        assert sum(step.size for step in steps.values()) <= 3000
        for job_id, step in steps.items():
            got[job_id] += step.scored
            if job_id == 100 and step.sampled:
                generated_after.append(sum(len(tokens) == 15 for tokens in got.values()))
    assert all(got[job_id] == scores(scoring) for job_id in range(1, 40))
    assert runner.computed == computed + 3 + 5  # no token of the scored prompts was computed again
    assert generated_after[-1] < 20, "a job that generates does not wait for all cached scores"


def test_a_paused_job_computes_nothing_and_blocks_no_job_with_the_same_prefix():
    runner = HistoryRunner(slots=2, chunk=4)
    loop = EngineLoop(runner)
    loop.start(0, job(prompt=tuple(range(12)), max_tokens=2))
    loop.step()
    loop.step()  # computes a part of the prompt
    loop.pause(0)
    loop.start(1, job(prompt=(*range(12), 3), max_tokens=2))
    steps = finish(loop)
    assert 0 not in steps
    assert len(sampled(steps[1], 0)) == 2
    loop.resume(0)
    assert len(sampled(finish(loop)[0], 0)) == 2
    loop.check()


def test_pausing_an_unknown_or_ended_job_leaves_no_state():
    loop = EngineLoop(HistoryRunner(slots=1, chunk=4))
    loop.pause(7)
    loop.start(0, job())
    loop.step()
    loop.pause(0)
    loop.drop(0, 0)  # no effect: the job has no sampled token yet
    loop.close(0)
    assert loop.step() is None
    assert not loop._step_buffer.paused


def test_cached_scores_are_bounded_and_evicted_least_recently_used_first(monkeypatch):
    monkeypatch.setattr("afterword.engine.core.prefix_cache.MAX_SCORE_BYTES", 3 * 16 * (160 + 2 * 120))
    runner = HistoryRunner(slots=6, chunk=32, grid=1)
    loop = EngineLoop(runner)
    prompts = [(index, *range(16)) for index in range(5)]
    for job_id, prompt in enumerate(prompts):
        loop.start(job_id, job(prompt=prompt, max_tokens=0, prompt_alternatives=2))
        finish(loop)
    kept = [slot for slot in loop._scheduler._slots if slot.scores]
    assert {slot.tokens[0] for slot in kept} == {2, 3, 4}
    for job_id, prompt in enumerate(prompts, 10):
        wanted = job(prompt=prompt, max_tokens=0, prompt_alternatives=2)
        loop.start(job_id, wanted)
        assert [token for step in finish(loop)[job_id] for token in step.scored] == scores(wanted)
    loop.check()


def test_a_job_with_a_slow_reader_loses_its_slots_to_waiting_jobs_and_resumes_later():
    for grid in (1, 3):
        loop = EngineLoop(HistoryRunner(slots=2, chunk=4, grid=grid))
        slow = job(prompt=(1, 2, 3), samples=2, max_tokens=8)
        loop.start(0, slow)
        steps = [loop.step() for _ in range(4)]
        before = [[token.id for step in steps for at, token in step[0].sampled if at == sample] for sample in range(2)]
        assert all(before)
        loop.pause(0)
        for job_id in (1, 2):
            loop.start(job_id, job(prompt=(job_id, 5), max_tokens=6))
        others = finish(loop)
        assert [sampled(others[job_id], 0) for job_id in (1, 2)] == [
            alone(job(prompt=(job_id, 5), max_tokens=6), 0) for job_id in (1, 2)
        ]
        loop.resume(0)
        after = finish(loop)[0]
        assert [before[sample] + sampled(after, sample) for sample in range(2)] == [alone(slow, at) for at in range(2)]
        loop.check()
