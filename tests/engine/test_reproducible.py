"""Tests that the same request has the same result alone and concurrently with other requests.

Every request is computed twice: alone in its own namespace, so that it cannot use the prefix cache, and concurrently
with requests that share prefixes, arrive at random and are partly cancelled. Every float must be equal.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from afterword.config import CHUNK_GRID, WeightTypes
from afterword.engine.core import preemption
from afterword.engine.core.engine_loop import EngineLoop
from afterword.engine.llama import accelerator, library
from afterword.engine.llama.runner import LlamaRunner
from afterword.engine.messages import KvType, LoadModel
from afterword.engine.protocol import Job, Sampling, Step
from afterword.models.gguf_facts import read_facts
from afterword.models.memory_fit import ModelShape
from afterword.models.registry import builtin_path
from oracle import quantizer

library.initialize(verbose=False)

SAMPLINGS = (
    Sampling(temperature=0.0),
    Sampling(),
    Sampling(temperature=0.8, top_p=0.9),
    Sampling(top_k=40, min_p=0.02, presence_penalty=0.5, frequency_penalty=0.3),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("weights")


def quantized(folder: Path, file_type: str) -> Path:
    """The built-in model requantized to another type: these tests compare arithmetic, not quality."""
    if file_type == "Q8_0":
        return builtin_path()
    path = folder / f"{file_type}.gguf"
    if not path.exists():
        name = "MXFP4_MOE" if file_type == "MXFP4" else file_type
        pure = file_type == "MXFP4"  # otherwise only experts get this type
        quantizer.quantize(builtin_path(), path, name, pure=pure)
    return path


def open_runner(
    path: Path, kv_type: KvType, sequences: int = 12, *, own: bool = True, threads: int = 1, context: int = 512
) -> LlamaRunner:
    """A runner with the settings that the server would choose. `own`: with the kernels' matmuls."""
    facts = read_facts(path)
    weights = WeightTypes(facts.architecture, facts.matrix_types, facts.experts)
    settings = LoadModel(
        *(str(path), context, sequences, threads, 128, kv_type, 0, False),
        grid=CHUNK_GRID,
        repack=weights.repacked,
        use_kernels=own and weights.uses_kernels,
        joins_prompts=facts.experts > 0,
        promise=weights.promise(kv_type, with_kernels=True),
        promise_without_kernels=weights.promise(kv_type, with_kernels=False),
        snapshot_bytes=ModelShape(context, sequences, facts).snapshot_bytes,
    )
    return LlamaRunner(settings)


def requests(count: int, seed: int, vocabulary: int = 4000) -> list[Job]:
    """Random jobs with prompts of many lengths that share prefixes."""
    rng = random.Random(seed)
    contexts = [tuple(rng.randrange(4, vocabulary) for _ in range(rng.choice([20, 64, 150, 260]))) for _ in range(6)]
    jobs = []
    for index in range(count):
        start = rng.choice([*contexts, ()])
        own = tuple(rng.randrange(4, vocabulary) for _ in range(rng.randrange(0 if start else 1, 40)))
        scored = rng.choice([None, None, 0, 2, 5])
        max_tokens = rng.choice([0, 1, 8, 20]) if scored is not None else rng.randrange(1, 24)
        jobs.append(
            Job(
                prompt=start[: rng.choice([len(start), len(start) // 2])] + own or (5,),
                samples=rng.choice([1, 1, 1, 2, 4]),
                max_tokens=max_tokens,
                sampling=rng.choice(SAMPLINGS),
                end_tokens=(0,),
                key=index.to_bytes(16, "big"),
                alternatives=rng.choice([None, 0, 3]),
                prompt_alternatives=scored,
                client=rng.choice(["", "someone", "someone batch"]),
            )
        )
    return jobs


def continued(jobs: list[Job], results: list[list[Any]], count: int) -> list[Job]:
    """Jobs with prompts that continue the prompts and the outputs of earlier jobs."""
    continuations = []
    for job, (_, samples, _) in itertools.islice(zip(jobs, results, strict=True), count):
        prompt = (*job.prompt, *(token.id for token in samples[0]), 7, 8, 9)
        continuations.append(msgspec.structs.replace(job, prompt=prompt, max_tokens=8))
    return continuations


def numbers(steps: list[Step], job: Job) -> list[Any]:
    """The result of a request by prompt and samples, independent of its division into steps and of cached tokens."""
    scored = [token for step in steps for token in step.scored]
    samples = [[t for step in steps for index, t in step.sampled if index == sample] for sample in range(job.samples)]
    return [scored, samples, sorted(end for step in steps for end in step.ended)]


def sequential(loop: EngineLoop, jobs: list[Job]) -> list[list[Any]]:
    results = []
    for job in jobs:
        job_id = next(_names)
        loop.start(job_id, msgspec.structs.replace(job, namespace=f"alone {job_id}"))
        steps: list[Step] = []
        while (passed := loop.step()) is not None:
            steps += passed.values()
        results.append(numbers(steps, job))
    loop.check()
    return results


def concurrent(loop: EngineLoop, jobs: list[Job], seed: int) -> list[list[Any]]:
    """Run all jobs with random arrival, together with similar jobs that are closed before their end."""
    rng = random.Random(seed)
    waiting = [(next(_names), job) for job in jobs]
    names = dict(waiting)
    steps: dict[int, list[Step]] = {job_id: [] for job_id in names}
    abandoned: list[int] = []
    while True:
        while waiting and rng.random() < 0.5:
            loop.start(*waiting.pop(rng.randrange(min(len(waiting), 4))))
            if rng.random() < 0.2:
                abandoned.append(next(_names))
                loop.start(
                    abandoned[-1], msgspec.structs.replace(rng.choice(jobs), max_tokens=200, prompt_alternatives=None)
                )
        if abandoned and rng.random() < 0.1:
            loop.close(abandoned.pop(0))
        passed = loop.step()
        if passed is None and not waiting:
            break
        for job_id, step in (passed or {}).items():
            if job_id in steps:
                steps[job_id].append(step)
        if not waiting and all(sum(len(s.ended) for s in steps[job_id]) == names[job_id].samples for job_id in names):
            for job_id in abandoned:
                loop.close(job_id)
            abandoned.clear()
    loop.check()
    return [numbers(steps[job_id], job) for job_id, job in names.items()]


_names = itertools.count()


def check(path: Path, kv_type: KvType, count: int, *, own: bool = True) -> None:
    runner = open_runner(path, kv_type, own=own)
    assert runner.promise == ("exact" if kv_type == "exact" else "reproducible")
    assert runner.grid == (1 if kv_type == "exact" else CHUNK_GRID)
    compare(EngineLoop(runner), count)


def compare(loop: EngineLoop, count: int, vocabulary: int = 4000) -> None:
    for job, found, wanted in in_company(loop, count, vocabulary):
        assert found == wanted, job


def in_company(loop: EngineLoop, count: int, vocabulary: int = 4000) -> Iterator[tuple[Job, list[Any], list[Any]]]:
    """Jobs, with their results concurrently with the others and with their results alone."""
    jobs = requests(count * 3 // 4, count, vocabulary)
    expected = sequential(loop, jobs)
    continuations = continued(jobs, expected, count // 4)
    later = sequential(loop, continuations)
    # Insert each continuation soon after the job that it continues, while the job's prefix is cached.
    for index in reversed(range(len(continuations))):
        jobs.insert(index + 6, continuations[index])
        expected.insert(index + 6, later[index])
    yield from zip(jobs, concurrent(loop, jobs, seed=1), expected, strict=True)


def test_200_requests_of_the_built_in_model(folder):
    check(quantized(folder, "Q8_0"), "exact", count=200)


@pytest.mark.parametrize(
    ("file_type", "kv_type"),
    [
        *(("Q8_0", "f16"), ("Q4_0", "exact"), ("Q4_0", "f16"), ("Q4_K_M", "exact"), ("Q6_K", "exact")),
        *((name, "exact") for name in ("Q4_1", "IQ4_NL", "Q5_1", "IQ4_XS", "MXFP4", "Q2_K", "Q3_K_M")),
        *(("F32", "exact"), ("F16", "exact"), ("F16", "f16"), ("BF16", "exact")),
    ],
)
def test_other_types_of_weights_and_of_keys_and_values(folder, file_type, kv_type):
    skip_without_kernels(file_type)
    check(quantized(folder, file_type), kv_type, count=20)


def skip_without_kernels(file_type: str) -> None:
    if file_type in WITH_KERNELS_ONLY and not accelerator.supports_quantized():
        pytest.skip(f"{file_type} has no promise without the kernels' matmuls")


def test_passes_of_a_fixed_shape_are_reproducible(folder):
    """The fixed shape that GPUs need."""
    path = quantized(folder, "F16")
    compare(
        EngineLoop(LlamaRunner(LoadModel(str(path), 320, 7, 1, 64, "f16", 0, False, grid=64, fixed_shape=True))),
        count=40,
    )


@pytest.mark.parametrize(("file_type", "kv_type"), [("Q8_0", "exact"), ("Q8_0", "f16")])
def test_preempted_samples_are_reproducible(folder, monkeypatch, file_type, kv_type):
    """One client holds all slots while another sends short requests. With `f16` the state of a preempted sample is
    computed again token by token.
    """
    monkeypatch.setattr(preemption, "RESUME_PASSES", (2, 6))
    loop = EngineLoop(open_runner(quantized(folder, file_type), kv_type, sequences=4))
    wanted = [
        msgspec.structs.replace(
            each, samples=5, max_tokens=40, prompt_alternatives=scored, client="many", end_tokens=()
        )
        for each, scored in zip(requests(2, seed=5), (None, 2), strict=True)
    ]
    expected = sequential(loop, wanted)
    names = [next(_names) for _ in wanted]
    for name, each in zip(names, wanted, strict=True):
        loop.start(name, each)
    steps: dict[int, list[Step]] = {name: [] for name in names}
    pauses = 0
    while (passed := loop.step()) is not None:
        for name in passed.keys() & steps.keys():
            steps[name].append(passed[name])
        begun = loop._scheduler._admitted
        pauses = max(pauses, sum(sequence.paused for name in names if name in begun for sequence in begun[name].queued))
        if len(begun) == len(loop._scheduler._jobs) and any(name in begun for name in names):
            job_id = next(_names)  # the next short request starts as soon as the one before is admitted
            loop.start(job_id, Job((job_id % 4000, 5, 6), 1, 3, Sampling(), (), bytes(16), client="few"))
    loop.check()
    assert pauses
    assert [numbers(steps[name], each) for name, each in zip(names, wanted, strict=True)] == expected


FLOATS = ("BF16", "F16", "F32")
QUANTIZED = (
    *("Q8_0", "Q4_0", "IQ4_NL", "IQ4_XS", "Q4_1", "Q5_0", "Q5_1", "MXFP4"),
    *("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K"),
)
WITH_KERNELS_ONLY = (*FLOATS, "MXFP4")
EVERY_PROMISE = [(name, kv_type) for name in (*QUANTIZED, *FLOATS) for kv_type in ("exact", "f16")]


@pytest.mark.parametrize(
    ("file_type", "computes_all"),
    [("Q8_0", True), ("Q4_1", True), ("Q3_K_M", True), ("Q4_K_M", True), ("IQ3_S", False)],
)
@pytest.mark.usefixtures("kernel_products")
def test_the_runner_knows_whether_the_kernels_compute_everything(folder, file_type, computes_all):
    """If the kernels compute everything, the elementwise operations of a single token use one thread, else all."""
    assert open_runner(quantized(folder, file_type), "exact", 1, threads=2).computes_all == computes_all


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("file_type", "kv_type"), EVERY_PROMISE)
def test_many_requests_of_every_type(folder, file_type, kv_type):
    skip_without_kernels(file_type)
    check(quantized(folder, file_type), kv_type, count=2000 if file_type in ("Q8_0", "Q4_0") else 300)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kv_type", ["exact", "f16"])
@pytest.mark.parametrize("file_type", [name for name in QUANTIZED if name not in WITH_KERNELS_ONLY])
def test_many_requests_with_the_librarys_matmuls(folder, file_type, kv_type):
    """Without the kernels' matmuls, as on a machine where no compiler built the kernels."""
    check(quantized(folder, file_type), kv_type, count=100, own=False)
