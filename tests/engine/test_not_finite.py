"""Tests that NaN and infinity end the request in which they occur, and reach no other, for every kind of attention."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from history_runner import HistoryRunner

from afterword.engine.core.engine_loop import EngineLoop
from afterword.engine.core.forward_batch import BatchEntry, CopyPrefix, ForwardBatch, Logits, Truncate
from afterword.engine.core.sampler import finite_rows
from afterword.engine.llama import accelerator, library
from afterword.engine.llama.runner import LlamaRunner
from afterword.engine.messages import KvType, LoadModel
from afterword.engine.protocol import Job, Sampling, Step
from oracle.architectures import write_random

library.initialize(verbose=False)

POISON = 200
GREEDY = Sampling(temperature=0.0)


def job(prompt: tuple[int, ...], *, samples: int = 1, tokens: int = 4, **more: object) -> Job:
    return Job(prompt, samples, tokens, GREEDY, (), b"k" * 16, **more)  # type: ignore[arg-type]


def run_jobs(loop: EngineLoop, jobs: dict[int, Job]) -> dict[int, list[Step]]:
    for job_id, each in jobs.items():
        loop.start(job_id, each)
    steps: dict[int, list[Step]] = {job_id: [] for job_id in jobs}
    while (passed := loop.step()) is not None:
        for job_id, step in passed.items():
            steps[job_id].append(step)
    loop.check()
    return steps


def failed(steps: list[Step]) -> bool:
    return any(step.failed for step in steps)


# ---- logits rows


@pytest.mark.parametrize(
    ("row", "finite"),
    [
        ([1.0, 2.0, 3.0], True),
        ([-math.inf, 2.0, 3.0], True),
        ([math.nan, 2.0, 3.0], False),
        ([1.0, 2.0, math.inf], False),
        ([-math.inf] * 3, False),
        ([math.nan] * 3, False),
    ],
)
def test_a_row_is_finite_if_its_largest_value_is(row, finite):
    assert finite_rows(np.array([[0.0] * 3, row], np.float32)).tolist() == [True, finite]


# ---- jobs, with a runner whose logits are a function of the tokens


class PoisonedRunner(HistoryRunner):
    """A runner with logits that are not finite while token 9 is in the slot."""

    def __init__(self, value: float, slots: int = 3) -> None:
        super().__init__(slots, chunk=4)
        self.value = value

    def run(self, batch: ForwardBatch) -> Logits:
        logits = super().run(batch)
        rows = [row for row in batch.entries for _ in range(row.outputs)]
        for index, row in enumerate(rows):
            if 9 in self.state[row.slot]:
                logits[index] = self.value
        return logits


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "bad",
    [
        job((1, 2, 9, 3, 4, 5)),
        job((1, 2, 9, 3), samples=5),
        job((1, 2, 9, 3, 4, 5), tokens=0, prompt_alternatives=2),
        job((1, 2, 3, 4), tokens=30, samples=4, alternatives=1),
    ],
    ids=["a prompt", "samples", "scored", "while generating"],
)
def test_a_job_whose_logits_are_not_finite_ends_alone(value, bad):
    bias = ((9, 100.0),) if 9 not in bad.prompt else ()
    bad = msgspec.structs.replace(bad, sampling=Sampling(0.0, logit_bias=bias))
    good = {1: job((1, 2, 5, 6, 7)), 3: job((4, 4, 4, 2), samples=2)}
    alone = run_jobs(EngineLoop(HistoryRunner(3, 4)), good)
    runner = PoisonedRunner(value)
    loop = EngineLoop(runner)
    steps = run_jobs(loop, {1: good[1], 2: bad, 3: good[3]})
    assert failed(steps[2])
    assert steps[2][-1] == Step(failed=True)
    for job_id in (1, 3):
        assert sampled(steps[job_id]) == sampled(alone[job_id])
    assert sampled(run_jobs(loop, {4: good[1]})[4]) == sampled(alone[1])
    assert not any(9 in state for state in runner.state), "the failed job's slot is truncated before it is used again"


def sampled(steps: list[Step]) -> list[object]:
    return sorted((pair for step in steps for pair in step.sampled), key=lambda pair: pair[0])


# ---- slots, with llama.cpp


def open_runner(path: object, kv_type: KvType, use_kernels: bool = True) -> LlamaRunner:
    return LlamaRunner(LoadModel(str(path), 128, 3, 1, 64, kv_type, 0, False, use_kernels=use_kernels))


def row(slot: int, *tokens: int, position: int = 0) -> BatchEntry:
    return BatchEntry(slot, position, tokens, 1)


def run_one(runner: LlamaRunner, row: BatchEntry, *moves: CopyPrefix | Truncate) -> Logits:
    return runner.run(ForwardBatch(moves, (row,)))[0].copy()


ATTENTIONS = [
    *(("llama", kv_type, True, "F16") for kv_type in ("exact", "f16", "f32")),
    *(("llama", kv_type, True, "Q8_0") for kv_type in ("exact", "f16")),
    ("llama", "exact", False, "F16"),  # the library's attention for keys and values of different types
    *((name, "exact", True, "Q8_0") for name in ("gemma3", "mamba", "jamba", "lfm2")),
    ("jamba", "f16", True, "F16"),
    ("gemma3", "f16", True, "Q8_0"),
]


@pytest.mark.parametrize("case", ATTENTIONS, ids=str)
def test_non_finite_values_do_not_reach_the_next_sequence_of_a_slot(tmp_path, monkeypatch, case):
    """Both after logits were computed and for a sequence that ended without logits. Other slots keep their states."""
    architecture, kv_type, use_kernels, file_type = case
    if not use_kernels:
        monkeypatch.setattr(accelerator, "computes_all_attention", lambda: False)
    path = write_random(tmp_path / "tiny.gguf", architecture, file_type, poison={POISON: math.nan})
    runner = open_runner(path, kv_type)
    other = run_one(runner, row(2, 8, 9, 10))
    clean = run_one(runner, row(0, 5, 6, 7))
    continued = run_one(runner, row(2, 11, position=3))
    assert np.isfinite(clean).sum() > len(clean) - 2  # one is not, if the embeddings are also the output matrix
    run_one(runner, row(2, 8, 9, 10), Truncate(2, 0))
    bad = run_one(runner, row(0, 1, 2, POISON, 3, 4, 5), Truncate(0, 0))
    assert not finite_rows(bad[None])[0]
    assert np.array_equal(run_one(runner, row(0, 5, 6, 7), Truncate(0, 0)), clean, equal_nan=True)
    runner.run(ForwardBatch((Truncate(0, 0),), (BatchEntry(0, 0, (1, 2, POISON, 3, 4, 5), 0),)))
    assert np.array_equal(run_one(runner, row(1, 5, 6, 7), CopyPrefix(2, 0, 3), Truncate(0, 0)), clean, equal_nan=True)
    assert np.array_equal(run_one(runner, row(0, 5, 6, 7)), clean, equal_nan=True)
    assert np.array_equal(run_one(runner, row(2, 11, position=3)), continued, equal_nan=True)
    assert np.array_equal(run_one(runner, row(2, 8, 9, 10), Truncate(2, 0)), other, equal_nan=True)


def test_a_full_slot_without_logits_is_truncated(tmp_path):
    """A full slot has no cell for the additional token, so its last token is replaced."""
    runner = open_runner(write_random(tmp_path / "tiny.gguf", "gemma3", "Q8_0"), "f16")
    wanted = run_one(runner, row(0, *range(5, 45)))
    for start in (40, 104):
        tokens = tuple(range(start, min(start + 64, 128)))
        runner.run(ForwardBatch((), (BatchEntry(0, start, tokens, 0),)))
    assert np.array_equal(run_one(runner, row(0, 44, position=39), Truncate(0, 39)), wanted)


@pytest.mark.parametrize("kv_type", ["exact", "f16", "f32"])
def test_a_prefix_can_be_continued_after_non_finite_values_were_truncated(tmp_path, kv_type):
    path = write_random(tmp_path / "tiny.gguf", "llama", poison={POISON: math.nan})
    runner = open_runner(path, kv_type)
    run_one(runner, row(0, 5, 6, 7))
    wanted = run_one(runner, row(0, 8, position=3))
    runner.run(ForwardBatch((Truncate(0, 3),), (BatchEntry(0, 3, (POISON, 3, 4), 0),)))
    assert np.array_equal(run_one(runner, row(0, 8, position=3), Truncate(0, 3)), wanted)


@pytest.mark.parametrize("kv_type", ["exact", "f16"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_poisoned_request_does_not_change_other_requests(tmp_path, kv_type, value):
    path = write_random(tmp_path / "tiny.gguf", "llama", poison={POISON: value})
    good = [job(tuple(range(5 + i, 45 + i)), samples=1 + i % 2, alternatives=1) for i in range(6)]
    expected = [sampled(run_jobs(EngineLoop(open_runner(path, kv_type)), {0: each})[0]) for each in good]
    loop = EngineLoop(open_runner(path, kv_type))
    for turn, each in enumerate(good):
        bad = job((*range(30, 90), POISON, 4, 5), samples=1 + turn % 3, client="another")
        steps = run_jobs(loop, {2 * turn: bad, 2 * turn + 1: each})
        assert failed(steps[2 * turn])
        assert sampled(steps[2 * turn + 1]) == expected[turn]
