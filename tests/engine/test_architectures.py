"""Tests of the promise for each architecture.

A request must have the same result alone and concurrently with other requests, with its prompt computed or found in the
prefix cache. A token must have the same numbers whether it is read or generated.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from afterword.config import TESTED_ARCHITECTURES, TESTED_MIXTURES
from afterword.engine.core.engine_loop import EngineLoop
from afterword.engine.llama import accelerator, library
from engine.test_reproducible import CHUNK_GRID, compare, open_runner, requests, sequential
from oracle.architectures import EXPERTS, UNEQUAL_HEADS, WINDOWED, write_random, write_unequal, write_windowed

library.initialize(verbose=False)

VOCABULARY = 280
FEW = ("qwen3", "gemma2", "gemma3n", "phi3", "gpt2", "minicpm3", "mpt", "lfm2", "mamba", "qwen35")
"""Among them capped scores (Gemma 2), ALiBi (MPT), heads of different sizes (MiniCPM 3) and recurrent states."""
ALWAYS_WINDOWED = {"gemma4", "granite_swa", "muse-glimmer", "spark2_5"}
UNPROMISED = ("hunyuan_vl", "nanbeige")
"""Architectures that were not tested."""

FEW_MIXTURES = ("qwen3moe", "qwen2moe", "granitemoe", "deepseek2", "qwen3next")
WINDOWED_MIXTURES = {"maple", "mimo2", "step35"}


def check(path: Path, count: int) -> None:
    if not accelerator.supports_quantized():
        pytest.skip("this processor has no instructions for it")
    runner = open_runner(path, "exact", 8)
    assert runner.uses_own_attention or not runner.can_truncate  # Mamba and RWKV have no attention
    assert (runner.promise, runner.grid) == ("exact", 1)
    compare(EngineLoop(runner), count, VOCABULARY)


@pytest.mark.parametrize("architecture", FEW)
def test_some_architectures(tmp_path, architecture):
    check(write_random(tmp_path / "tiny.gguf", architecture), 12)


@pytest.mark.slow
@pytest.mark.parametrize("file_type", ["Q8_0", "F16"])
@pytest.mark.parametrize("architecture", sorted(TESTED_ARCHITECTURES - ALWAYS_WINDOWED))
def test_every_promised_architecture(tmp_path, architecture, file_type):
    check(write_random(tmp_path / "tiny.gguf", architecture, file_type), 60)


@pytest.mark.parametrize("name", ["gemma3", "granite_swa"])
def test_some_architectures_with_a_window(tmp_path, name):
    check(write_windowed(tmp_path / "tiny.gguf", name), 12)


@pytest.mark.slow
@pytest.mark.parametrize("file_type", ["Q8_0", "F16"])
@pytest.mark.parametrize("name", sorted(WINDOWED))
def test_every_promised_architecture_with_a_window(tmp_path, name, file_type):
    check(write_windowed(tmp_path / "tiny.gguf", name, file_type), 60)


@pytest.mark.parametrize("name", ["deepseek2/stretched"])
def test_some_architectures_with_heads_of_different_sizes(tmp_path, name):
    check(write_unequal(tmp_path / "tiny.gguf", name), 12)


@pytest.mark.slow
@pytest.mark.parametrize("file_type", ["Q8_0", "F16"])
@pytest.mark.parametrize("name", sorted(UNEQUAL_HEADS))
def test_every_promised_architecture_with_heads_of_different_sizes(tmp_path, name, file_type):
    check(write_unequal(tmp_path / "tiny.gguf", name, file_type), 60)


@pytest.mark.parametrize("architecture", FEW_MIXTURES)
def test_some_mixtures_of_experts(tmp_path, architecture):
    check(write_random(tmp_path / "tiny.gguf", architecture, also=EXPERTS), 12)


@pytest.mark.slow
@pytest.mark.parametrize("file_type", ["Q8_0", "F16"])
@pytest.mark.parametrize("architecture", sorted(TESTED_MIXTURES - WINDOWED_MIXTURES))
def test_every_promised_mixture_of_experts(tmp_path, architecture, file_type):
    check(write_random(tmp_path / "tiny.gguf", architecture, file_type, also=EXPERTS), 60)


@pytest.mark.slow
@pytest.mark.parametrize("file_type", ["Q8_0", "F16"])
@pytest.mark.parametrize("architecture", sorted(WINDOWED_MIXTURES))
def test_every_promised_mixture_with_a_window(tmp_path, architecture, file_type):
    check(write_windowed(tmp_path / "tiny.gguf", architecture, file_type), 60)


def test_attention_that_the_kernels_do_not_support_ends_the_promise_of_latent_values(tmp_path, monkeypatch):
    """llama.cpp refuses keys and values of different types, with which it would compute query by query."""
    monkeypatch.setattr(accelerator, "computes_all_attention", lambda: False)
    runner = open_runner(write_random(tmp_path / "tiny.gguf", "deepseek2"), "exact", 4)
    assert (runner.uses_own_attention, runner.promise, runner.grid) == (False, "none", CHUNK_GRID)
    assert sequential(EngineLoop(runner), requests(2, 1, VOCABULARY))


def test_a_mixture_of_experts_is_reproducible_with_halves_of_keys_and_values(tmp_path):
    if not accelerator.supports_quantized():
        pytest.skip("this processor has no instructions for it")
    runner = open_runner(write_random(tmp_path / "tiny.gguf", "qwen3moe", also=EXPERTS), "f16", 8)
    assert (runner.promise, runner.grid) == ("reproducible", CHUNK_GRID)
    compare(EngineLoop(runner), 12, VOCABULARY)


@pytest.mark.parametrize("kv_type", ["exact", "f16"])
def test_experts_that_the_kernels_do_not_support_end_the_promise(tmp_path, kv_type):
    """The matrices after the experts' hidden layer have 80 columns; the kernels compute in steps of 32."""
    if not accelerator.supports_quantized():
        pytest.skip("this processor has no instructions for it")
    odd = {**EXPERTS, "expert_feed_forward_length": 80}
    runner = open_runner(write_random(tmp_path / "odd.gguf", "qwen3moe", "F16", also=odd), kv_type, 4)
    assert runner.uses_kernels
    assert (runner.promise, runner.grid, runner.computes_all) == ("none", CHUNK_GRID, False)


def test_experts_with_biases_have_similar_numbers(tmp_path):
    """gpt-oss adds a row of biases to the output of each selected expert."""
    path = write_random(tmp_path / "tiny.gguf", "gpt-oss", "F32", also=EXPERTS)
    jobs = [msgspec.structs.replace(job, max_tokens=0, prompt_alternatives=0) for job in requests(6, 1, VOCABULARY)]
    ours, theirs = (sequential(EngineLoop(open_runner(path, "exact", 4, own=own)), jobs) for own in (True, False))
    for own, other in zip(ours, theirs, strict=True):
        assert [token.logprob for token in own[0]] == pytest.approx([token.logprob for token in other[0]], abs=0.01)


@pytest.mark.parametrize("architecture", UNPROMISED)
def test_other_architectures_have_no_promise_and_similar_numbers(tmp_path, architecture):
    assert architecture not in TESTED_ARCHITECTURES
    runner = open_runner(write_random(tmp_path / "tiny.gguf", architecture, "Q8_0"), "exact", 4)
    assert (runner.promise, runner.grid) == ("none", CHUNK_GRID)
    loop = EngineLoop(runner)
    jobs = [msgspec.structs.replace(job, max_tokens=0, prompt_alternatives=0) for job in requests(12, 1, VOCABULARY)]
    for cold, warm in zip(sequential(loop, jobs), concurrent_scores(loop, jobs), strict=True):
        assert [token.logprob for token in warm] == pytest.approx([token.logprob for token in cold[0]], abs=0.05)


def concurrent_scores(loop: EngineLoop, jobs):
    scored = {job_id: [] for job_id in range(-len(jobs), 0)}
    for job_id, job in zip(scored, jobs, strict=True):
        loop.start(job_id, job)
    while (passed := loop.step()) is not None:
        for job_id, step in passed.items():
            scored[job_id] += step.scored
    return list(scored.values())


# ---- the promise depends on the loaded model, not only on the types in its file


def test_a_width_that_the_kernels_do_not_support_ends_the_promise(tmp_path):
    """The kernels compute in steps of 32 elements; the types in the file do not show the width."""
    if not accelerator.supports_quantized():
        pytest.skip("this processor has no instructions for it")
    odd = {"embedding_length": 80, "rope.dimension_count": 40}
    runner = open_runner(write_random(tmp_path / "odd.gguf", "llama", "F16", also=odd), "exact", 4)
    assert runner.uses_kernels
    assert (runner.promise, runner.grid) == ("none", CHUNK_GRID)


def test_a_recurrent_model_needs_all_products_of_the_kernels(tmp_path, monkeypatch):
    """The library multiplies the tokens of one sequence and of several by different kernels."""
    if not accelerator.supports_quantized():
        pytest.skip("this processor has no instructions for it")
    narrow = write_random(tmp_path / "narrow.gguf", "mamba", also={"ssm.time_step_rank": 48})
    assert open_runner(narrow, "exact", 4).promise == "none"
    path = write_random(tmp_path / "tiny.gguf", "lfm2")
    assert [open_runner(path, kv_type, 4).promise for kv_type in ("exact", "f16")] == ["exact", "none"]
    assert open_runner(path, "exact", 4, own=False).promise == "none"


def test_a_product_of_two_computed_operands_ends_the_promise(tmp_path, monkeypatch):
    path = write_random(tmp_path / "tiny.gguf", "llama")
    monkeypatch.setattr(accelerator, "has_unsupported_products", lambda: True)
    assert open_runner(path, "exact", 4).promise == "none"
    assert open_runner(path, "f16", 4).promise == "reproducible", "attention without flash attention has such products"


def test_the_librarys_query_by_query_attention_is_exact(tmp_path, monkeypatch):
    if not accelerator.supports_quantized():
        pytest.skip("this processor has no instructions for it")
    monkeypatch.setattr(accelerator, "computes_all_attention", lambda: False)
    runner = open_runner(write_random(tmp_path / "tiny.gguf", "llama"), "exact", 8)
    assert (runner.uses_own_attention, runner.promise) == (False, "exact")
    compare(EngineLoop(runner), 40, VOCABULARY)
