"""How many tokens of prompts a pass computes while other sequences run."""

from __future__ import annotations

import pytest
from history_runner import HistoryRunner

from afterword.engine.core.engine_loop import PASS_SECONDS, EngineLoop
from afterword.engine.core.forward_batch import ForwardBatch, Logits
from afterword.engine.core.prefill_queue import MIN_CHUNK
from afterword.engine.protocol import Job, Sampling

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
