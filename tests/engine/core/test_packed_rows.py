"""Rows of a whole vocabulary in the engine: numbers, order, memory, and what the prefix cache keeps of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from history_runner import VOCABULARY, HistoryRunner

from afterword.engine import token_row
from afterword.engine.core import prefill_queue
from afterword.engine.core.engine_loop import EngineLoop
from afterword.engine.core.numpy_kernel import NumpyKernel
from afterword.engine.core.sampler import Sampler, ScoreQuery, make_kernel
from afterword.engine.core.sampler_kernel import RowQuery
from afterword.engine.protocol import Job, Sampling, Step, Token
from afterword.engine.token_row import TokenRow


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let more than 5 alternatives be packed: the runner's vocabulary is small."""
    monkeypatch.setattr(token_row, "MAX_LISTED", 5)


def job(**fields: Any) -> Job:
    given = {"prompt": tuple(range(12)), "samples": 1, "max_tokens": 3, "sampling": Sampling(0.0), "end_tokens": ()}
    return Job(**given | {"key": bytes(16)} | fields)


def collect(loop: EngineLoop) -> list[dict[int, Step]]:
    found = []
    while (steps := loop.step()) is not None:
        found.append(steps)
    return found


def tokens_of(steps: list[dict[int, Step]], job_id: int) -> tuple[list[Token], list[Token]]:
    mine = [step[job_id] for step in steps if job_id in step]
    return [t for step in mine for t in step.scored], [t for step in mine for _, t in step.sampled]


@pytest.mark.parametrize("size", [7, 1000, 50_000])
@pytest.mark.parametrize("kernel", [make_kernel(2), NumpyKernel()], ids=lambda each: type(each).__name__)
def test_the_whole_row_has_the_order_and_the_numbers_of_a_part(kernel: Any, size: int) -> None:
    row = np.random.default_rng(size).normal(0, 3, size).astype(np.float32)
    row[1:5] = row[0]
    listed = kernel.read(row[None], [RowQuery(reported=True, top=5)])[0].top
    ids, values = kernel.most_likely(row, size)
    assert tuple(zip(ids.tolist(), values.tolist(), strict=True))[:5] == listed
    assert ids.tolist() == sorted(range(size), key=lambda token: (-row[token], token))
    exact = row.astype(np.float64) - np.log(np.exp(row.astype(np.float64)).sum())
    assert np.abs(values - exact[ids]).max() < 1e-5


def test_a_row_is_packed_once(packs: None) -> None:
    sampler = Sampler()
    logits = np.random.default_rng(0).normal(0, 3, (1, 40)).astype(np.float32)
    (((token,),)) = sampler.read(logits, [ScoreQuery(3, 40)])
    assert token.row == TokenRow(40, logits.tobytes())
    done = sampler.packed(token.row)
    assert sampler.packed(done) is done
    assert dict(done.pairs())[3] == token.logprob
    assert [pair for pair, _ in zip(done.pairs(), range(2), strict=False)] == list(done.pairs(2))


@pytest.mark.parametrize("grid", [1, 4])
def test_rows_have_the_numbers_of_listed_alternatives(packs: None, grid: int) -> None:
    def run(count: int) -> tuple[list[Token], list[Token]]:
        loop = EngineLoop(HistoryRunner(2, 8, grid=grid))
        loop.start(1, job(alternatives=count, prompt_alternatives=count, samples=2))
        return tokens_of(collect(loop), 1)

    for rows, listed in zip(run(VOCABULARY), run(5), strict=True):
        assert len(rows) == len(listed)
        for row, few in zip(rows, listed, strict=True):
            assert (row.id, row.logprob, row.rank, row.top) == (few.id, few.logprob, few.rank, ())
            assert row.row is not None
            pairs = list(row.row.pairs())
            assert pairs[:5] == list(few.top)
            assert sorted(token for token, _ in pairs) == list(range(VOCABULARY))


def test_a_portion_and_a_pass_have_a_bounded_size(packs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_queue, "MAX_ROWS", 4)
    monkeypatch.setattr(prefill_queue, "MIN_CHUNK", 1)
    runner = HistoryRunner(2, 64)
    row = VOCABULARY * 4
    loop = EngineLoop(runner, max_step_bytes=2 * (row + 200))
    loop.start(1, job(prompt=tuple(i % VOCABULARY for i in range(60)), max_tokens=0, prompt_alternatives=VOCABULARY))
    loop.start(2, job(prompt=tuple(i % 7 for i in range(60)), max_tokens=0, prompt_alternatives=0, client="b"))
    steps = collect(loop)
    assert len(tokens_of(steps, 1)[0]) == len(tokens_of(steps, 2)[0]) == 59
    assert max(len(step.scored) for each in steps for job_id, step in each.items() if job_id == 1) <= 2
    by_slot: dict[int, list[int]] = {}
    for batch in runner.batches:
        for entry in batch.entries:
            by_slot.setdefault(entry.slot, []).append(len(entry.tokens))
    few, many = sorted(max(sizes) for sizes in by_slot.values())
    assert few == 4 < many


def test_no_slot_keeps_rows_and_scores_without_them_are_reused(packs: None) -> None:
    runner = HistoryRunner(2, 8)
    loop = EngineLoop(runner)
    wanted = job(max_tokens=0, prompt_alternatives=VOCABULARY)
    loop.start(1, wanted)
    first = tokens_of(collect(loop), 1)[0]
    assert all(score.row is None for slot in loop._slots for score in slot.scores)
    computed = runner.computed
    loop.start(2, job(max_tokens=0, prompt_alternatives=0))
    assert [token.logprob for token in tokens_of(collect(loop), 2)[0]] == [token.logprob for token in first]
    assert runner.computed == computed, "the scores come from the slot"
    loop.start(3, wanted)
    loop.start(4, wanted)
    steps = collect(loop)
    assert tokens_of(steps, 3)[0] == tokens_of(steps, 4)[0] == first


@pytest.mark.parametrize("others", [None, 0, 3], ids=["no scores", "scores", "scores with alternatives"])
@pytest.mark.parametrize("grid", [1, 4])
def test_a_preempted_prompt_continues_after_the_rows_that_were_sent(
    packs: None, monkeypatch: pytest.MonkeyPatch, grid: int, others: int | None
) -> None:
    """Another sequence holds the same prompt."""
    monkeypatch.setattr(prefill_queue, "MAX_ROWS", 4)
    monkeypatch.setattr(prefill_queue, "MIN_CHUNK", 1)
    runner = HistoryRunner(2, 64, grid=grid)
    loop = EngineLoop(runner)
    prompt = tuple(i % VOCABULARY for i in range(60))
    wanted = job(prompt=prompt, max_tokens=0, prompt_alternatives=VOCABULARY)
    loop.start(0, job(prompt=prompt, max_tokens=200, client="c", prompt_alternatives=others))
    steps = [loop.step() or {} for _ in range(6)]
    loop.start(1, wanted)
    while len(tokens_of(steps, 1)[0]) < 20:
        steps.append(loop.step() or {})
    loop.pause(1)
    loop.start(2, job(prompt=(9, 9), client="b"))
    while not any(step[2].ended for step in steps if 2 in step):
        steps.append(loop.step() or {})
    assert not loop._scheduler._admitted[1].live
    before = len(runner.batches)
    sent = loop._scheduler._admitted[1].scores_sent
    loop.resume(1)
    steps += collect(loop)
    loop.check()
    undisturbed = EngineLoop(HistoryRunner(2, 64, grid=grid))
    undisturbed.start(1, wanted)
    assert tokens_of(steps, 1)[0] == tokens_of(collect(undisturbed), 1)[0]
    again = [entry for batch in runner.batches[before:] for entry in batch.entries if len(entry.tokens) > 1]
    assert min(entry.position for entry in again) >= sent - 3


def test_no_scoring_waits_for_rows_that_it_cannot_use(packs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_queue, "MAX_ROWS", 4)
    monkeypatch.setattr(prefill_queue, "MIN_CHUNK", 1)
    prompt = tuple(i % VOCABULARY for i in range(60))

    def rows_before(alternatives: int) -> int:
        """How many rows the first job has when the second one begins."""
        loop = EngineLoop(HistoryRunner(2, 64))
        loop.start(1, job(prompt=prompt, max_tokens=0, prompt_alternatives=VOCABULARY))
        loop.start(2, job(prompt=prompt, max_tokens=0, prompt_alternatives=alternatives, client="b"))
        steps = collect(loop)
        begin = next(index for index, step in enumerate(steps) if 2 in step)
        return len(tokens_of(steps[:begin], 1)[0])

    assert rows_before(0) == 59, "the slot then has the scores without alternatives"
    assert rows_before(2) < 10
