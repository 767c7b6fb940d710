"""The core's law: what a job gets depends on the job alone, whoever else is there and whatever is cancelled."""

from __future__ import annotations

import itertools
from collections import defaultdict

from history import HistoryRunner, alone, logits_after, scores
from hypothesis import given, settings
from hypothesis import strategies as st

from afterword.engine.core.batch import Fork
from afterword.engine.core.loop import Loop
from afterword.engine.protocol import Job, Load, Sampling, Step

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
    ends=st.just((3, 7)),
    key=st.binary(min_size=16, max_size=16),
    alternatives=st.sampled_from([None, 0, 2]),
    min_tokens=st.sampled_from([0, 0, 4]),
    prompt_alternatives=st.sampled_from([None, 0, 2]),
    namespace=st.sampled_from(["", "", "salt"]),
    client=st.sampled_from(["", "someone"]),
)
shapes = st.sampled_from([(1, True), (1, False), (3, True)])  # grid, and whether slots can be cut


def job(prompt: tuple[int, ...] = (1, 2), samples: int = 1, max_tokens: int = 4, **fields: object) -> Job:
    return Job(prompt, samples, max_tokens, PLAIN, ends=(), key=b"k" * 16, **fields)  # type: ignore[arg-type]


def finish(loop: Loop) -> dict[int, list[Step]]:
    """Run until idle; all steps of every run."""
    steps: defaultdict[int, list[Step]] = defaultdict(list)
    while (passed := loop.step()) is not None:
        for run, step in passed.items():
            steps[run].append(step)
    return steps


def sampled(steps: list[Step], sample: int) -> list[int]:
    return [token.id for step in steps for index, token in step.sampled if index == sample]


@settings(deadline=None, max_examples=150)
@given(st.lists(jobs, min_size=1, max_size=6), st.integers(1, 5), st.integers(3, 8), shapes)
def test_every_sample_gets_the_tokens_it_would_get_alone(wanted, slots, chunk, shape):
    runner = HistoryRunner(slots, chunk, grid=shape[0], rewinds=shape[1])
    loop = Loop(runner)
    for run, each in enumerate(wanted):
        loop.start(run, each)
    steps = finish(loop)
    for run, each in enumerate(wanted):
        ended = dict(end for step in steps[run] for end in step.ended)
        assert sorted(ended) == list(range(each.samples))
        for sample in range(each.samples):
            expected = alone(each, sample)
            assert sampled(steps[run], sample) == expected
            assert ended[sample] == ("stop" if expected and expected[-1] in each.ends else "length")
        assert [token for step in steps[run] for token in step.scored] == scores(each)
    assert loop.load() == Load(slots, 0, 0)
    loop.check()


@settings(deadline=None, max_examples=150)
@given(st.lists(jobs, min_size=2, max_size=6), st.integers(1, 4), shapes, st.data())
def test_leaving_and_dropping_disturb_nobody_and_leave_nothing_behind(wanted, slots, shape, data):
    runner = HistoryRunner(slots, 4, grid=shape[0], rewinds=shape[1])
    loop = Loop(runner)
    for run, each in enumerate(wanted):
        loop.start(run, each)
    disturbed: set[int] = set()
    steps: defaultdict[int, list[Step]] = defaultdict(list)
    while (passed := loop.step()) is not None:
        for run, step in passed.items():
            steps[run].append(step)
        act = data.draw(st.sampled_from(["none", "none", "close", "drop"]))
        run = data.draw(st.integers(0, len(wanted) - 1))
        if act == "close":
            loop.close(run)
            disturbed.add(run)
        elif act == "drop":
            loop.drop(run, data.draw(st.integers(0, 4)))
            disturbed.add(run)
    for run, each in enumerate(wanted):
        for sample in range(each.samples):
            got, expected = sampled(steps[run], sample), alone(each, sample)
            assert got == expected[: len(got)]
            assert run in disturbed or got == expected
        assert run in disturbed or [token for step in steps[run] for token in step.scored] == scores(each)
    assert loop.load() == Load(slots, 0, 0)
    loop.check()


def test_a_prompt_is_computed_once_for_all_its_samples():
    runner = HistoryRunner(slots=8, chunk=4)
    loop = Loop(runner)
    loop.start(0, job(prompt=tuple(range(10)), samples=6, max_tokens=3))
    finish(loop)
    assert runner.computed == 10 + 6 * 2  # the last token of a sample is never computed


def test_samples_beyond_the_slots_take_over_a_siblings_prompt():
    runner = HistoryRunner(slots=2, chunk=16)
    loop = Loop(runner)
    loop.start(0, job(prompt=tuple(range(10)), samples=7, max_tokens=3))
    finish(loop)
    assert runner.computed == 10 + 7 * 2


def test_the_first_tokens_of_all_samples_come_with_the_prompts_last_pass():
    loop = Loop(HistoryRunner(slots=1, chunk=4))
    loop.start(0, job(prompt=tuple(range(10)), samples=5))
    for _ in range(3):  # it begins; two passes without the prompt's end
        assert not loop.step()[0].sampled
    assert [sample for sample, _ in loop.step()[0].sampled] == [0, 1, 2, 3, 4]


def test_scored_tokens_are_the_prompts_own_from_the_second_on():
    loop = Loop(HistoryRunner(slots=1, chunk=3))
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
    loop = Loop(runner, clock=lambda: float(next(seconds)))  # a pass takes longer than prompts may at a time
    loop.start(0, job(max_tokens=8))
    loop.step()
    loop.start(1, job(prompt=tuple(range(10)), max_tokens=1))
    finish(loop)
    kinds = [batch.rows[0].slot for batch in runner.batches[1:10]]
    assert kinds == [0, 1, 0, 1, 0, 1, 0, 1, 0]


def test_many_prompts_are_computed_before_few_sequences_run():
    """A pass takes a tenth of a second: two fit the time for prompts, and up to six while few sequences run."""
    tenths = itertools.count()
    runner = HistoryRunner(slots=16, chunk=32)
    loop = Loop(runner, clock=lambda: next(tenths) / 10)
    for run in range(12):
        loop.start(run, job(prompt=(run, *range(1, 20), *range(12)), max_tokens=40))
    finish(loop)
    kinds = ["prompt" if len(batch.rows[0].tokens) > 1 else "step" for batch in runner.batches]
    lengths = [len(list(group)) for kind, group in itertools.groupby(kinds) if kind == "prompt"]
    assert lengths[1] > lengths[-1]
    assert max(lengths) <= 8


def test_a_short_prompt_does_not_wait_for_a_long_one():
    runner = HistoryRunner(slots=2, chunk=2)
    loop = Loop(runner)
    loop.start(0, job(prompt=tuple(range(20)), max_tokens=1))
    loop.start(1, job(prompt=(5, 6), max_tokens=1))
    passes = 0
    while 1 not in (done := loop.step()) or not done[1].ended:
        passes += 1
    assert passes <= 1


def test_closing_frees_the_sequences_before_the_next_pass():
    loop = Loop(HistoryRunner(slots=2, chunk=4))
    for run in range(4):
        loop.start(run, job(samples=2, max_tokens=50))
    for _ in range(6):
        loop.step()
    for run in range(4):
        loop.close(run)
    assert loop.load() == Load(2, 0, 0)
    assert loop.step() is None


def test_gaps_that_others_leave_are_closed():
    runner = HistoryRunner(slots=6, chunk=4)
    loop = Loop(runner)
    jobs = [job(prompt=(run + 1,), max_tokens=40) for run in range(6)]
    for run, each in enumerate(jobs):
        loop.start(run, each)
    early = defaultdict(list)
    for _ in range(20):
        for run, step in (loop.step() or {}).items():
            early[run].append(step)
    for run in (0, 2, 3):
        loop.close(run)
    passes = len(runner.batches)
    steps = finish(loop)
    slots = [row.slot for row in runner.batches[passes + 3].rows]
    assert slots == list(range(slots[0], slots[0] + 3))
    for run in (1, 4, 5):
        assert sampled(early[run] + steps[run], 0) == alone(jobs[run], 0)


def test_one_move_brings_the_outermost_to_the_others():
    runner = HistoryRunner(slots=8, chunk=4)
    loop = Loop(runner)
    for run in range(8):
        loop.start(run, job(prompt=(run + 1,), max_tokens=40))
    for _ in range(24):
        loop.step()
    for run in (1, 2, 3, 4):
        loop.close(run)
    finish(loop)
    moves = [move for batch in runner.batches for move in batch.moves if isinstance(move, Fork)]
    assert [(move.source, move.target) for move in moves][-1] == (0, 4)
    assert [4, 5, 6, 7] in [[row.slot for row in batch.rows] for batch in runner.batches]


def test_late_messages_about_unknown_jobs_are_ignored():
    loop = Loop(HistoryRunner(slots=1, chunk=4))
    loop.close(9)
    loop.drop(9, 0)
    loop.start(0, job())
    loop.drop(0, 0)  # nothing sampled yet: there is no text that could be complete
    assert len(sampled(finish(loop)[0], 0)) == 4
