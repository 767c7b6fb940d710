"""Tests that requests with all samplers and chosen ids have the same result alone, in a crowd and with drafts."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec

from afterword.completion.request import CompletionRequest
from afterword.completion.sampler_fields import SAMPLER_NAMES, sampling_of
from afterword.engine.llama import library
from afterword.engine.protocol import Dry, Job, SamplerChain, Sampling
from afterword.models.registry import builtin_path
from engine.test_predictions import CountingLoop, check, make_jobs, predicting
from engine.test_reproducible import concurrent, open_runner, requests, sequential
from oracle.architectures import write_random

library.initialize(verbose=False)

VOCABULARY, TINY = 4000, 280


def random_sampling(rng: random.Random, vocabulary: int) -> Sampling:
    """A random combination of samplers."""
    request = CompletionRequest(
        temperature=rng.choice([0.0, 0.7, 1.0, 1.5]),
        top_k=rng.choice([0, 0, 30]),
        top_p=rng.choice([1.0, 0.9]),
        min_p=rng.choice([0.0, 0.05]),
        repetition_penalty=rng.choice([1.0, 1.1]),
        presence_penalty=rng.choice([0.0, 0.5]),
        typical_p=rng.choice([1.0, 0.9]),
        top_n_sigma=rng.choice([-1.0, 2.0]),
        xtc_probability=rng.choice([0.0, 0.5]),
        xtc_threshold=rng.choice([0.1, 0.02]),
        dynatemp_range=rng.choice([0.0, 0.0, 0.5]),
        dry_multiplier=rng.choice([0.0, 0.8]),
        dry_allowed_length=rng.choice([1, 2]),
        dry_penalty_last_n=rng.choice([64, -1]),
        mirostat=rng.choice([0, 0, 0, 1, 2]),
        mirostat_tau=rng.choice([3.0, 5.0]),
        samplers=rng.choice([None, None, tuple(rng.sample(SAMPLER_NAMES, 5))]),
        adaptive_target=rng.choice([-1.0, -1.0, 0.3]),
        adaptive_decay=rng.choice([0.9, 0.5]),
        min_keep=rng.choice([0, 0, 3]),
        repeat_last_n=rng.choice([None, None, -1, 5, 64]),
        allowed_token_ids=rng.choice([None, None, tuple(range(0, vocabulary, 3))]),
    )
    breakers = bytes(rng.randrange(256) & rng.randrange(256) & rng.randrange(256) for _ in range(64))
    return sampling_of(request, vocabulary, breakers, (((100, 101), (102,)),))


def mixed(plain: list[Job], vocabulary: int) -> list[Job]:
    """The jobs, of which most have a chain of samplers, and some report ids of their own."""
    rng = random.Random(2)
    jobs = []
    for job in plain:
        sampling = rng.choice([*(random_sampling(rng, vocabulary) for _ in range(2)), job.sampling])
        ids = rng.choice([(), (), (5, 1), (7, 8, 9)])
        given = {"alternatives": job.alternatives, "prompt_alternatives": job.prompt_alternatives}
        counts = {name: len(ids) if ids and value is not None else value for name, value in given.items()}
        jobs.append(msgspec.structs.replace(job, sampling=sampling, reported=ids, **counts))
    return jobs


def test_all_samplers_are_reproducible_alone_and_in_a_crowd() -> None:
    jobs = mixed(requests(120, seed=3), VOCABULARY)
    assert sum(job.sampling.chain is not None for job in jobs) > 60
    loop = CountingLoop(open_runner(builtin_path(), "exact"))
    expected = sequential(loop, jobs)
    for job, mine, wanted in zip(jobs, concurrent(loop, jobs, seed=1), expected, strict=True):
        assert mine == wanted, job


def test_all_samplers_are_reproducible_with_drafts(tmp_path: Path) -> None:
    jobs = mixed(make_jobs(40, TINY), TINY)
    loop = CountingLoop(open_runner(write_random(tmp_path / "tiny.gguf", "llama"), "exact"))
    expected = sequential(loop, jobs)
    rng = random.Random(4)
    predicted = [
        predicting(job, [token.id for token in samples[0]], rng, TINY)
        for job, (_, samples, _) in zip(jobs, expected, strict=True)
    ]
    loop.draft_ngrams()
    check(loop, predicted, expected)
    assert len(jobs) < loop.accepted < loop.drafted


def test_scores_of_chosen_ids_come_from_the_cache_only_for_the_same_ids() -> None:
    loop = CountingLoop(open_runner(builtin_path(), "exact"))
    prompt = tuple(range(100, 228))
    plain = Job(prompt, 1, 1, Sampling(), (), bytes(16), prompt_alternatives=2)
    jobs = [
        msgspec.structs.replace(plain, reported=(5, 6)),
        plain,
        msgspec.structs.replace(plain, reported=(5, 6), prompt=(*prompt, 9)),
        msgspec.structs.replace(plain, reported=(6, 5)),
    ]
    expected = sequential(loop, jobs)
    cached = []
    for number, (job, wanted) in enumerate(zip(jobs, expected, strict=True)):
        loop.start(1000 + number, job)
        steps = []
        while (passed := loop.step()) is not None:
            steps += passed.values()
        cached.append(sum(step.cached for step in steps))
        assert [token for step in steps for token in step.scored] == wanted[0]
    assert cached[:2] == [0, 0]
    assert cached[2] > 100
    assert cached[3] == 0
    assert [[each for each, _ in token.top] for token in expected[0][0]] == [[5, 6]] * 127


def test_a_chain_with_dry_of_a_long_prompt_is_kept_for_all_samples() -> None:
    """The samples of a job share the repetitions of the prompt, and each continues with its own."""
    dry = SamplerChain(("dry",), dry=Dry(2.0, 1.75, 1, -1))
    job = Job((7, 8, 9) * 30, 4, 12, Sampling(chain=dry), (), bytes(16))
    loop = CountingLoop(open_runner(builtin_path(), "exact"))
    (together,) = sequential(loop, [job])
    without = sequential(loop, [msgspec.structs.replace(job, sampling=Sampling())])
    assert together != without
    assert concurrent(loop, [job] * 3, seed=1) == [together] * 3
