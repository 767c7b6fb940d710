"""Tests of predictions and n-grams with real models: every text and every float is the same with and without.

Each job is computed alone without a prediction. Its tokens are the prediction of the same job, whole or changed, alone
and in a crowd.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import msgspec
import pytest

from afterword.engine.core.engine_loop import EngineLoop
from afterword.engine.core.forward_batch import ForwardBatch, Truncate
from afterword.engine.core.verification import can_verify
from afterword.engine.llama import library
from afterword.engine.llama.runner import LlamaRunner
from afterword.engine.protocol import Job, PassStats, Sampling
from afterword.models.registry import builtin_path
from engine.test_reproducible import SAMPLINGS, concurrent, open_runner, sequential
from oracle.architectures import write_random

library.initialize(verbose=False)

VOCABULARY = 280
CROWD = 100  # jobs that are compared at a time
PENALIZED = (
    Sampling(temperature=0.0, repetition_penalty=1.3),
    Sampling(temperature=0.9, logit_bias=((5, 3.0), (6, -100.0)), frequency_penalty=1.0),
)


class CountingLoop(EngineLoop):
    """An engine loop whose passes all seem to take no time, so that every draft is verified. It counts drafts."""

    def __init__(self, runner: LlamaRunner) -> None:
        super().__init__(runner, clock=lambda: 0.0)
        self.drafted = self.accepted = 0

    def step(self):
        steps = super().step()
        stats: PassStats = self.pass_stats()
        self.drafted += stats.drafted_tokens
        self.accepted += stats.accepted_tokens
        return steps


def make_jobs(count: int, vocabulary: int, seed: int = 0) -> list[Job]:
    rng = random.Random(seed)
    jobs = []
    for index in range(count):
        prompt = tuple(rng.randrange(4, vocabulary) for _ in range(rng.choice([2, 9, 40, 150])))
        jobs.append(
            Job(
                prompt=prompt,
                samples=rng.choice([1, 1, 1, 3]),
                max_tokens=rng.randrange(24, 70),
                sampling=rng.choice(SAMPLINGS + PENALIZED),
                end_tokens=(0,),
                key=index.to_bytes(16, "big"),
                min_tokens=rng.choice([0, 20]),
                alternatives=rng.choice([None, 0, 3]),
            )
        )
    return jobs


def predicting(job: Job, tokens: list[int], rng: random.Random, vocabulary: int) -> Job:
    """The job with a right, wrong or partly right prediction of its tokens."""
    kind = rng.choice(["right", "right", "changed", "inserted", "wrong"])
    if kind == "wrong":
        tokens = [rng.randrange(4, vocabulary) for _ in tokens]
    if kind == "changed":
        tokens = [rng.randrange(4, vocabulary) if rng.random() < 0.04 else token for token in tokens]
    if kind == "inserted":
        at = rng.randrange(len(tokens))
        tokens = [*tokens[:at], *(rng.randrange(4, vocabulary) for _ in range(5)), *tokens[at:]]
    return msgspec.structs.replace(job, prediction=tuple(tokens))


def compare(path: Path, count: int, vocabulary: int) -> None:
    runner = open_runner(path, "exact")
    assert (runner.promise, can_verify(runner)) == ("exact", True)
    for seed in range(-(-count // CROWD)):
        compare_crowd(CountingLoop(cleared(runner)), make_jobs(min(CROWD, count), vocabulary, seed), vocabulary)


def cleared(runner: LlamaRunner) -> LlamaRunner:
    """The runner with empty slots, as a new loop expects them."""
    runner.run(ForwardBatch(tuple(Truncate(slot, 0) for slot in range(runner.slots)), ()))
    return runner


def compare_crowd(loop: CountingLoop, jobs: list[Job], vocabulary: int) -> None:
    expected = sequential(loop, jobs)
    assert loop.drafted == 0
    rng = random.Random(1)
    predicted = [
        predicting(job, [token.id for token in samples[0]], rng, vocabulary)
        for job, (_, samples, _) in zip(jobs, expected, strict=True)
    ]
    check(loop, predicted, expected)
    assert len(jobs) < loop.accepted < loop.drafted, "many tokens are accepted and some are rejected"
    loop.draft_ngrams()
    check(loop, predicted, expected)
    check(loop, jobs, expected)


def check(loop: EngineLoop, jobs: list[Job], expected: list[Any]) -> None:
    """Compare the results of jobs, alone and in a crowd, with the expected ones."""
    for results in (sequential(loop, jobs), concurrent(loop, jobs, seed=2)):
        for job, found, wanted in zip(jobs, results, expected, strict=True):
            assert found == wanted, job


def test_requests_of_a_dense_model_are_the_same_with_predictions(tmp_path: Path) -> None:
    compare(write_random(tmp_path / "tiny.gguf", "llama"), 100, VOCABULARY)


def test_requests_of_the_built_in_model_are_the_same_with_predictions() -> None:
    compare(builtin_path(), 6, 4000)


def test_drafts_from_texts_of_the_built_in_model_change_nothing() -> None:
    loop = CountingLoop(cleared(open_runner(builtin_path(), "exact")))
    biases = tuple((token, 100.0) for token in (300, 301))
    samplings = [Sampling(value, logit_bias=biases) for value in (0.0, 2.0, 4.0)]
    jobs = [
        msgspec.structs.replace(job, max_tokens=90, sampling=sampling)
        for job, sampling in zip(make_jobs(6, 4000), samplings * 2, strict=True)
    ]
    expected = sequential(loop, jobs)
    assert loop.drafted == 0
    loop.draft_ngrams()
    check(loop, jobs, expected)
    assert 0 < loop.accepted < loop.drafted, "some tokens are accepted and some are rejected"


@pytest.mark.slow
def test_500_requests_of_the_built_in_model_are_the_same_with_predictions() -> None:
    compare(builtin_path(), 500, 4000)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["qwen2", "gemma3", "gpt-oss", "qwen3moe"])
@pytest.mark.usefixtures("kernel_products")
def test_500_requests_of_an_architecture_are_the_same_with_predictions(tmp_path: Path, architecture: str) -> None:
    """A dense shape, two with sliding windows, of which one is a mixture of experts, and a mixture."""
    compare(write_random(tmp_path / "tiny.gguf", architecture), 500, VOCABULARY)


def test_a_recurrent_model_verifies_no_drafts(tmp_path: Path) -> None:
    assert not can_verify(open_runner(write_random(tmp_path / "tiny.gguf", "mamba"), "exact", 4))
