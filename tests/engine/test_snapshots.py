"""Tests of prefixes shared by snapshots, with tiny recurrent and hybrid models and with `HistoryRunner`."""

from __future__ import annotations

import numpy as np
import pytest
from history_runner import HistoryRunner, alone
from hypothesis import given, settings
from hypothesis import strategies as st

from afterword.engine.core.engine_loop import EngineLoop
from afterword.engine.core.forward_batch import (
    BatchEntry,
    CopyPrefix,
    ForwardBatch,
    Logits,
    SaveState,
    SlotOperation,
    Truncate,
)
from afterword.engine.core.snapshots import Snapshots
from afterword.engine.llama import accelerator, library
from afterword.engine.llama.runner import LlamaRunner
from afterword.engine.protocol import Job, Sampling, Token
from engine.runs import Runs
from engine.test_reproducible import open_runner
from oracle.architectures import write_random

library.initialize(verbose=False)

FEW = ("mamba2", "lfm2", "qwen35")
RECURRENT = ("falcon-h1", "granitehybrid", "jamba", "mamba", "nemotron_h", "qwen3next", "rwkv7", *FEW)
TEXT = tuple(np.random.default_rng(5).integers(4, 280, 400).tolist())
OTHER = tuple(np.random.default_rng(6).integers(4, 280, 400).tolist())


def greedy(prompt: tuple[int, ...], samples: int = 1, max_tokens: int = 4, scored: int | None = None) -> Job:
    return Job(
        *(prompt, samples, max_tokens, Sampling(temperature=0.0), (), bytes(16)),
        alternatives=0,
        prompt_alternatives=scored,
    )


def runs_of(runner: LlamaRunner) -> Runs:
    return Runs(EngineLoop(runner), -(-runner.min_shared_tokens // runner.grid) * runner.grid)


def are_close(some: list[list[Token]], others: list[list[Token]]) -> bool:
    numbers_of = [[[token.logprob for token in row] for row in rows] for rows in (some, others)]
    return all(row == pytest.approx(other, abs=1e-3) for row, other in zip(*numbers_of, strict=True))


# ---- real models


def check_hits(runner: LlamaRunner) -> None:
    """Every kind of request that finds a prefix in a dense model's cache finds one here, up to a border less."""
    assert not runner.can_truncate
    assert runner.max_snapshots > 2 * runner.slots
    runs = runs_of(runner)
    border = runs.border
    halves = [greedy((*TEXT[:200], *OTHER[start : start + 70])) for start in (0, 100)]
    wanted = {
        "the first prompt": (greedy(TEXT[:300]), 0),
        "the same prompt": (greedy(TEXT[:300]), border(299)),
        "a prompt and more": (greedy(TEXT[:350]), border(300)),
        "a prompt that shares a part, at its first time": (halves[0], 0),
        "another prompt that shares the same part": (halves[1], border(200)),
        "a scored prompt": (greedy(OTHER[:300], max_tokens=0, scored=1), 0),
        "the scored prompt again": (greedy(OTHER[:300], max_tokens=0, scored=1), border(299)),
        "several samples": (greedy(TEXT[:300], samples=6), border(299)),
    }
    results = {name: runs.run(job)[0] for name, (job, _) in wanted.items()}
    assert dict(zip(wanted, runs.cached, strict=True)) == {name: cached for name, (_, cached) in wanted.items()}
    assert results["the same prompt"] == results["the first prompt"], "a restored state has the same bits"
    for name, (job, _) in wanted.items():
        cold = runs.cold(job)
        assert runner.promise != "exact" or results[name] == cold, name
        assert are_close(results[name], cold), name


@pytest.mark.parametrize("architecture", FEW)
def test_prefixes_of_recurrent_models_are_found(tmp_path, architecture):
    check_hits(open_runner(write_random(tmp_path / "tiny.gguf", architecture), "exact", 12))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", RECURRENT)
@pytest.mark.parametrize("file_type", ["Q8_0", "F16"])
def test_prefixes_of_all_recurrent_models_are_found(tmp_path, architecture, file_type):
    check_hits(open_runner(write_random(tmp_path / "tiny.gguf", architecture, file_type), "exact", 12))


@pytest.mark.parametrize("architecture", FEW)
def test_concurrent_prompts_with_a_common_beginning_compute_it_once(tmp_path, architecture):
    runs = runs_of(open_runner(write_random(tmp_path / "tiny.gguf", architecture), "exact", 6))
    crowd = [greedy((*TEXT[:200], *OTHER[start : start + 30])) for start in range(0, 360, 30)]
    found = runs.run(*crowd)
    assert runs.cached == [0] + [runs.border(200)] * 11
    for job, result in zip(crowd, found, strict=True):
        assert are_close(result, runs.cold(job))


@pytest.mark.parametrize(("own", "found"), [(True, [0, 129, 0, 192, 96]), (False, [0, 64, 0, 192, 64])])
def test_a_chat_continues(tmp_path, own, found):
    """On the grid 1 a chat continues after what was generated. An edited turn starts from a prompt."""
    if own and not accelerator.supports_quantized():
        pytest.skip("this processor has no instructions for it")
    runs = runs_of(open_runner(write_random(tmp_path / "tiny.gguf", "qwen35"), "exact", 4, own=own))
    _, sample = runs.run(greedy(TEXT[:100], max_tokens=30))[0]
    text = (*TEXT[:100], *(token.id for token in sample), *TEXT[:70])
    runs.run(greedy(text, max_tokens=30), greedy(OTHER[:150]))
    runs.run(greedy((*text, *OTHER[:90])), greedy((*TEXT[:100], *OTHER[:90])))
    assert runs.cached == found


# ---- the KV cache


def compute(runner: LlamaRunner, entry: BatchEntry, *operations: SlotOperation) -> Logits:
    return np.array(runner.run(ForwardBatch(operations, (entry,))))


@pytest.mark.parametrize("architecture", ["mamba", "qwen35"])
def test_a_state_is_restored_in_place_and_in_another_slot(tmp_path, architecture):
    runner = open_runner(write_random(tmp_path / "tiny.gguf", architecture), "exact", 4)
    compute(runner, BatchEntry(0, 0, TEXT[:40], 1))
    wanted = compute(runner, BatchEntry(0, 40, TEXT[40:50], 10), SaveState(0, 3))
    in_place = compute(runner, BatchEntry(0, 40, TEXT[40:50], 10), Truncate(0, 40, 3))
    compute(runner, BatchEntry(2, 0, OTHER[:20], 1))
    compute(runner, BatchEntry(0, 50, OTHER[:5], 1))
    copied = compute(runner, BatchEntry(2, 40, TEXT[40:50], 10), CopyPrefix(0, 2, 40, 3))
    assert np.array_equal(wanted, in_place)
    assert np.array_equal(wanted, copied)
    assert [runner.cached_tokens(slot) for slot in range(4)] == [55, 0, 50, 0]
    emptied = compute(runner, BatchEntry(0, 0, TEXT[:40], 1), Truncate(0, 0))
    assert np.array_equal(emptied, compute(runner, BatchEntry(1, 0, TEXT[:40], 1)))


@pytest.mark.parametrize("architecture", ["mamba", "qwen35"])
def test_not_a_number_does_not_survive_a_restored_state(tmp_path, architecture):
    poison = 9
    path = write_random(tmp_path / "tiny.gguf", architecture, "F16", poison={poison: np.nan})
    clean = tuple(token if token != poison else 8 for token in TEXT)
    runner = open_runner(path, "exact", 3)
    wanted = compute(runner, BatchEntry(1, 0, clean[:20], 1))
    compute(runner, BatchEntry(0, 0, clean[:20], 1))
    other = compute(runner, BatchEntry(0, 20, clean[20:30], 1), SaveState(0, 0))
    for entry in (BatchEntry(0, 30, (poison,), 1), BatchEntry(0, 20, (poison, 5), 0)):
        compute(runner, entry, *([Truncate(0, 20, 0)] if entry.position == 20 else []))
        assert np.array_equal(compute(runner, BatchEntry(0, 20, clean[20:30], 1), Truncate(0, 20, 0)), other)
        assert np.array_equal(compute(runner, BatchEntry(2, 0, clean[:20], 1), Truncate(2, 0)), wanted)
    compute(runner, BatchEntry(1, 20, (poison,), 0), SaveState(1, 1))
    compute(runner, BatchEntry(1, 21, (5,), 0), SaveState(1, 2))  # the snapshot 2 holds NaN
    assert np.array_equal(compute(runner, BatchEntry(2, 20, clean[20:30], 1), CopyPrefix(1, 2, 20, 1)), other)
    compute(runner, BatchEntry(0, 30, (5,), 1), CopyPrefix(1, 2, 21, 2))
    for slot in (2, 1):
        assert np.array_equal(compute(runner, BatchEntry(slot, 0, clean[:20], 1), Truncate(slot, 0)), wanted)


# ---- which snapshots are taken and kept


def recurrent(slots: int, max_snapshots: int = 20, grid: int = 4, chunk: int = 8) -> HistoryRunner:
    return HistoryRunner(slots, chunk, can_truncate=False, grid=grid, max_snapshots=max_snapshots)


def plain(*prompt: int, samples: int = 1, max_tokens: int = 2) -> Job:
    return greedy(prompt, samples, max_tokens)


def test_a_busy_engine_takes_snapshots_where_waiting_prompts_part():
    """The second prompt waits without a slot while the first one is computed."""
    runner = recurrent(slots=1)
    runs = Runs(EngineLoop(runner))
    runs.run(*(plain(*range(14), *[last] * 9) for last in range(14, 20)))
    assert runs.cached == [0, 12, 12, 12, 12, 12]


def test_waiting_samples_start_from_the_prompt():
    runner = recurrent(slots=2)
    runs = Runs(EngineLoop(runner))
    job = plain(*range(11), samples=7, max_tokens=4)
    runs.run(job)
    assert runner.computed == 11 + 7 * 3


def test_the_slots_of_a_prompts_samples_do_not_evict_other_prompts():
    runs = Runs(EngineLoop(recurrent(slots=4)))
    runs.run(plain(7, *range(11)))
    runs.run(plain(*range(11), samples=3, max_tokens=5))
    runs.run(plain(*range(11, 0, -1), samples=2, max_tokens=5))
    runs.run(plain(7, *range(11)))
    assert runs.cached == [0, 0, 0, 8]


def test_a_long_prompt_has_snapshots_at_regular_distances():
    runs = Runs(EngineLoop(recurrent(slots=2, chunk=128)))
    long = tuple(index * index % 23 for index in range(900))
    runs.run(plain(*long))
    runs.run(plain(*long[:600], 23, 23))
    assert runs.cached == [0, 512]


def test_with_few_snapshots_a_long_prompt_keeps_them_spread():
    runner = recurrent(slots=2, chunk=128, max_snapshots=4)
    loop = EngineLoop(runner)
    Runs(loop).run(plain(*(index * index % 23 for index in range(4000))))
    lengths = sorted(loop._scheduler._slots[0].snapshots)
    assert len(lengths) == 4
    assert lengths[-1] == 3996
    assert lengths[0] <= 2048


def test_a_free_number_is_chosen_first_then_the_least_useful_snapshot():
    snapshots = Snapshots(3, distance=1)
    for number in range(3):
        snapshots.mark_used(number, now=10)
    assert snapshots.choose([{5: 0}, {5: 0, 9: 2}], now=10) == 1
    assert snapshots.choose([{50: 0, 60: 1, 100: 2}], now=10) == 1, "it saves the fewest tokens"
    assert snapshots.choose([{50: 0}, {60: 1}, {100: 2}], now=10) == 0
    snapshots.mark_used(0, now=30)
    assert snapshots.choose([{50: 0}, {60: 1}, {100: 2}], now=30) == 1, "it was not used for longer"


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 3)), min_size=1, max_size=12), st.integers(1, 6))
def test_any_number_of_snapshots_gives_the_same_tokens(prompts, max_snapshots):
    runner = recurrent(slots=2, max_snapshots=max_snapshots, grid=3)
    loop = EngineLoop(runner)
    for name, (length, last) in enumerate(prompts):
        job = plain(*(index % 20 for index in range(length)), last, max_tokens=3)
        loop.start(name, job)
        tokens = []
        while (passed := loop.step()) is not None:
            tokens += [token.id for step in passed.values() for _, token in step.sampled]
        loop.check()
        assert tokens == alone(job, 0)
