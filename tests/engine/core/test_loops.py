"""Tests of loops that end a sample, with and without drafts and banned phrases."""

from __future__ import annotations

from random import Random

import msgspec
import pytest
from history_runner import VOCABULARY, HistoryRunner
from hypothesis import given
from hypothesis import strategies as st

from afterword.engine.core.engine_loop import EngineLoop
from afterword.engine.core.loops import ends_in_loop
from afterword.engine.protocol import BannedText, Job, RepetitionDetection, Sampling, Step


def reference(tokens: list[int], detection: RepetitionDetection) -> bool:
    """Whether the text ends with a pattern in a row, by comparing texts."""
    for size in range(detection.min_size, detection.max_size + 1):
        pattern = tokens[-size:]
        if len(tokens) >= size * detection.min_count and tokens[-size * detection.min_count :] == (
            pattern * detection.min_count
        ):
            return True
    return False


@given(
    st.lists(st.integers(0, 1), min_size=1, max_size=30),
    st.integers(1, 4),
    st.integers(0, 6),
    st.integers(2, 5),
)
def test_a_loop_is_found_by_its_definition(tokens, smallest, more, count):
    detection = RepetitionDetection(smallest + more, smallest, count)
    assert ends_in_loop(tokens, detection) == reference(tokens, detection)


class Counted(list[int]):
    """A text that counts the tokens which are copied out of it."""

    copied = 0

    def __getitem__(self, index):
        found = super().__getitem__(index)
        Counted.copied += len(found) if isinstance(index, slice) else 0
        return found


def test_few_tokens_are_compared_where_sizes_differ_early() -> None:
    text = Counted(Random(3).choices((0, 1), k=20_000))
    Counted.copied = 0
    ends_in_loop(text, RepetitionDetection(512, 20, 32))
    assert Counted.copied <= 512 * 2 * 16


@given(st.lists(st.integers(0, 2), min_size=1, max_size=6), st.integers(1, 30), st.integers(0, 3))
def test_long_loops_are_found_by_their_definition(pattern, count, changed):
    tokens = [0, 1, 2] + pattern * count
    tokens[-changed] ^= 1
    detection = RepetitionDetection(24, 1, 7)
    assert ends_in_loop(tokens, detection) == reference(tokens, detection)


def job(bias: tuple[tuple[int, float], ...], **fields: object) -> Job:
    sampling = Sampling(temperature=0.0, logit_bias=bias)
    plain = Job((1, 2), 1, 30, sampling, (), b"k" * 16, repetition_detection=RepetitionDetection(4, 1, 5))
    return msgspec.structs.replace(plain, **fields)


def run(loop: EngineLoop, wanted: Job) -> tuple[list[int], str, int]:
    """The tokens of the only sample, why it ended, and how many were verified as drafts."""
    loop.start(0, wanted)
    steps: list[Step] = []
    drafted = 0
    while (passed := loop.step()) is not None:
        steps += passed.values()
        drafted += loop.pass_stats().accepted_tokens
    loop.check()
    (end,) = [end for step in steps for end in step.ended]
    return [token.id for step in steps for _, token in step.sampled], end[1], drafted


ALWAYS = ((6, 100.0),)


def test_a_sample_that_loops_is_ended() -> None:
    assert run(EngineLoop(HistoryRunner(1, 4)), job(ALWAYS)) == ([6] * 5, "repetition", 0)
    assert run(EngineLoop(HistoryRunner(1, 4)), job(ALWAYS, repetition_detection=None))[1] == "length"


def test_the_fewest_tokens_and_other_ends_come_first() -> None:
    assert run(EngineLoop(HistoryRunner(1, 4)), job(ALWAYS, min_tokens=9))[:2] == ([6] * 9, "repetition")
    assert run(EngineLoop(HistoryRunner(1, 4)), job(ALWAYS, max_tokens=5))[:2] == ([6] * 5, "length")
    assert run(EngineLoop(HistoryRunner(1, 4)), job(ALWAYS, end_tokens=(6,)))[:2] == ([6], "stop")


def test_only_generated_tokens_are_compared() -> None:
    assert run(EngineLoop(HistoryRunner(1, 4)), job(ALWAYS, prompt=(6,) * 10))[0] == [6] * 5


@pytest.mark.parametrize("count", [7, 11, 20])
def test_a_loop_inside_a_verified_draft_ends_the_sample_there(count: int) -> None:
    wanted = job(ALWAYS, prediction=(6,) * 60, max_tokens=60, repetition_detection=RepetitionDetection(2, 1, count))
    ticks = iter(range(10**6))
    loop = EngineLoop(HistoryRunner(1, 64), clock=lambda: float(next(ticks)))
    tokens, reason, drafted = run(loop, wanted)
    assert (tokens, reason) == ([6] * count, "repetition")
    assert drafted > 0


def test_held_tokens_of_a_loop_are_sent() -> None:
    loop = EngineLoop(HistoryRunner(1, 4))
    loop.use_pieces((b"a",) * VOCABULARY)
    banned = BannedText(exact=("a" * 20,))
    assert run(loop, job(ALWAYS, banned_text=banned))[:2] == ([6] * 5, "repetition")
