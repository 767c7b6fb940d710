"""How many tokens of prompts a pass computes while other sequences run."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from history_runner import HistoryRunner

from afterword.engine.core.engine_loop import PASS_SECONDS, EngineLoop
from afterword.engine.core.forward_batch import ForwardBatch, Logits
from afterword.engine.core.prefill_queue import MAX_ROWS, MIN_CHUNK, PrefillQueue
from afterword.engine.core.sequence import JobState, Sequence
from afterword.engine.core.slot import PrefixQuery, Slot
from afterword.engine.protocol import Job, Sampling
from afterword.engine.token_row import MAX_LISTED

SPEED = 256  # tokens of prompts in a second
BUDGET = int(SPEED * PASS_SECONDS)


class TimedRunner(HistoryRunner):
    """A pass takes its number of tokens divided by `SPEED` seconds."""

    now = 0.0

    def run(self, batch: ForwardBatch) -> Logits:
        self.now += sum(len(entry.tokens) for entry in batch.entries) / SPEED
        return super().run(batch)


def chunks_beside_two_streams(lengths: list[int], *, joins_prompts: bool = False) -> list[list[int]]:
    """The tokens of each entry of the prefill passes over prompts of these lengths, while two sequences run."""
    runner = TimedRunner(slots=8, chunk=256, joins_prompts=joins_prompts)
    loop = EngineLoop(runner, clock=lambda: runner.now)
    for job_id in range(2):
        loop.start(job_id, _job((job_id,) * BUDGET, max_tokens=100))
    while not runner.batches or len(runner.batches[-1].entries) < 2:
        loop.step()
    runner.batches.clear()
    for job_id, length in enumerate(lengths, start=2):
        loop.start(job_id, _job((job_id,) * length, max_tokens=1))
    while loop.step() is not None:
        pass
    passes = [[len(entry.tokens) for entry in batch.entries] for batch in runner.batches]
    return [chunks for chunks in passes if max(chunks) > 1]


def _job(prompt: tuple[int, ...], max_tokens: int) -> Job:
    return Job(prompt, 1, max_tokens, Sampling(temperature=0.0), end_tokens=(), key=b"k" * 16)


# Half of the time for prompts is added for one prompt that waits beside two streams.
@pytest.mark.parametrize(
    ("length", "chunks"),
    [
        (BUDGET * 3 // 2, [[BUDGET * 3 // 2]]),
        (BUDGET * 3 // 2 + MIN_CHUNK - 1, [[BUDGET * 3 // 2 + MIN_CHUNK - 1]]),
        (BUDGET * 3 // 2 + MIN_CHUNK, [[BUDGET * 3 // 2], [MIN_CHUNK]]),
    ],
)
def test_no_short_rest_of_a_prompt_is_left_for_another_pass(length, chunks):
    """It would take about as long as a pass of `MIN_CHUNK` tokens."""
    assert chunks_beside_two_streams([length]) == chunks


def test_a_prompt_joins_another_if_the_pass_exceeds_the_budget_by_little():
    both = BUDGET * 2 + MIN_CHUNK  # the budget is doubled while two prompts wait beside two streams
    assert chunks_beside_two_streams([both // 2, both // 2], joins_prompts=True) == [[both // 2, both // 2]]
    assert chunks_beside_two_streams([both // 2, both // 2 + 1], joins_prompts=True) == [[both // 2], [both // 2 + 1]]


def next_tokens(
    length: int,
    budget: int,
    *,
    grid: int = 1,
    border: int | None = None,
    rows: bool = False,
    client: str = "",
    others: tuple[int, ...] = (),
    chunk: int = 256,
) -> list[int]:
    """The tokens of each entry of a pass with this time budget, for a prompt beside many running sequences."""
    queue = PrefillQueue(chunk, grid, joins_prompts=bool(others))
    for index, each in enumerate((length, *others)):
        queue.add(_sequence(index, each, rows=rows))
    if border is not None:
        for each in queue:
            assert each.slot is not None
            each.slot.borders.add(border)
    running = [_sequence(8 + index, 1, client=client) for index in range(500)]
    return [len(entry.tokens) for entry in queue.next_chunks(running, budget)]


def _sequence(index: int, length: int, *, rows: bool = False, client: str = "") -> Sequence:
    job = msgspec.structs.replace(
        _job((1,) * length, 9), client=client, prompt_alternatives=MAX_LISTED + 1 if rows else None
    )
    query = PrefixQuery(b"", "", np.array(job.prompt, np.int32), 0, job.prompt_alternatives)
    sequence = Sequence(JobState(index, job, query), 0)
    sequence.assign_slot(Slot(index, 1), chunk_generated=False)
    return sequence


@pytest.mark.parametrize(
    ("length", "budget", "tokens"),
    [
        (65, 47, 65),  # prompts of 65 tokens in the scenario of docs/log.md
        (69, 47, 69),
        (70, 47, 47),
        (36, 10, 36),  # a pass has `MIN_CHUNK` tokens also where the budget is less
        (37, 10, 32),
        (63, 10, 32),
        (131, 100, 131),
        (132, 100, 100),
    ],
)
def test_a_chunk_exceeds_the_budget_by_at_most_half_of_it(length: int, budget: int, tokens: int) -> None:
    assert next_tokens(length, budget) == [tokens]


def test_a_chunk_that_does_not_complete_the_prompt_keeps_to_the_budget() -> None:
    assert next_tokens(110, 100) == [110]
    assert next_tokens(110, 100, border=105) == [100]
    assert next_tokens(110, 100, border=50) == [50]
    assert next_tokens(110, 100, grid=16) == [96]
    assert next_tokens(112, 100, grid=16) == [112]
    assert next_tokens(110, 100, chunk=104) == [100]


def test_a_chunk_whose_logits_are_kept_is_never_larger() -> None:
    assert next_tokens(MAX_ROWS + 1, 100, rows=True) == [MAX_ROWS]
    assert next_tokens(MAX_ROWS, 10, rows=True) == [MAX_ROWS]


def test_a_chunk_beside_other_clients_keeps_to_its_share() -> None:
    assert next_tokens(210, 200, client="other") == [40]
    assert next_tokens(50, 200, client="other") == [40]
    assert next_tokens(20, 200, client="other", others=(25,)) == [20]


def test_prompts_join_within_the_chunk_of_the_runner() -> None:
    assert next_tokens(60, 100, others=(60,)) == [60, 60]
    assert next_tokens(60, 100, others=(60,), chunk=119) == [60]
    assert next_tokens(60, 100, others=(60,), chunk=120) == [60, 60]
