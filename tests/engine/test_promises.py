"""Tests that the promise depends on the loaded model, not only on its architecture and the types in its file.

`tests/architectures` tests the promise of every architecture.
"""

from __future__ import annotations

import msgspec
import pytest

from afterword.engine.core.engine_loop import EngineLoop
from afterword.engine.core.forward_batch import ForwardBatch
from afterword.engine.llama import accelerator, library
from engine.test_reproducible import CHUNK_GRID, compare, open_runner, requests, sequential
from oracle.architectures import write_random
from oracle.forms import EXPERTS

library.initialize(verbose=False)

VOCABULARY = 280


FAMILIES = {
    "a sliding window in five of six layers": ("gemma3", {}),
    "32 experts": ("qwen3moe", {"expert_count": 32, "expert_used_count": 4}),
    "128 experts": ("qwen3moe", {"expert_count": 128, "expert_used_count": 8}),
    "recurrent layers": ("qwen35", {}),
    "windows, sinks and experts": ("gpt-oss", {}),
    "latent attention and experts": ("deepseek2", {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.usefixtures("kernel_products")
def test_many_requests_of_the_families_of_today(tmp_path, name):
    form, also = FAMILIES[name]
    runner = open_runner(write_random(tmp_path / "tiny.gguf", form, "Q8_0", also=also), "exact")
    assert (runner.promise, runner.grid) == ("exact", 1)
    compare(EngineLoop(runner), 2000, VOCABULARY)


@pytest.mark.usefixtures("kernel_products")
def test_prompts_of_a_mixture_in_one_pass_have_the_numbers_of_each_alone(tmp_path):
    form, also = FAMILIES["32 experts"]
    runner = open_runner(write_random(tmp_path / "tiny.gguf", form, "Q8_0", also=also), "exact")
    assert runner.joins_prompts
    passes: list[ForwardBatch] = []
    run = runner.run
    runner.run = lambda batch: passes.append(batch) or run(batch)  # type: ignore[method-assign, func-returns-value]
    compare(EngineLoop(runner), 60, VOCABULARY)
    assert any(len(batch.entries) > 1 and len(batch.entries[0].tokens) > 1 for batch in passes)


@pytest.mark.parametrize(("form", "kv_type"), [("llama", "exact"), ("qwen3moe", "f16")])
@pytest.mark.usefixtures("kernel_products")
def test_only_mixtures_with_exact_numbers_join_prompts(tmp_path, form, kv_type):
    """The first is dense. The second is only `reproducible`, so its passes end on a grid."""
    runner = open_runner(write_random(tmp_path / "tiny.gguf", form, "Q8_0"), kv_type, 4)
    assert not runner.joins_prompts


def test_attention_that_the_kernels_do_not_support_ends_the_promise_of_latent_values(tmp_path, monkeypatch):
    """llama.cpp refuses keys and values of different types, with which it would compute query by query."""
    monkeypatch.setattr(accelerator, "computes_all_attention", lambda: False)
    runner = open_runner(write_random(tmp_path / "tiny.gguf", "deepseek2"), "exact", 4)
    assert (runner.uses_own_attention, runner.promise, runner.grid) == (False, "none", CHUNK_GRID)
    assert sequential(EngineLoop(runner), requests(2, 1, VOCABULARY))


@pytest.mark.parametrize("form", ["qwen3moe", "gemma4/experts", "granite_swa/experts", "mistral3/experts"])
@pytest.mark.usefixtures("kernel_products")
def test_a_mixture_of_experts_is_reproducible_with_halves_of_keys_and_values(tmp_path, form):
    runner = open_runner(write_random(tmp_path / "tiny.gguf", form), "f16", 8)
    assert (runner.promise, runner.grid) == ("reproducible", CHUNK_GRID)
    compare(EngineLoop(runner), 12, VOCABULARY)


@pytest.mark.parametrize("kv_type", ["exact", "f16"])
@pytest.mark.usefixtures("kernel_products")
def test_experts_that_the_kernels_do_not_support_end_the_promise(tmp_path, kv_type):
    """The matrices after the experts' hidden layer have 80 columns; the kernels compute in steps of 32."""
    odd = {**EXPERTS, "expert_feed_forward_length": 80}
    runner = open_runner(write_random(tmp_path / "odd.gguf", "qwen3moe", "F16", also=odd), kv_type, 4)
    assert runner.uses_kernels
    assert (runner.promise, runner.grid, runner.computes_all) == ("none", CHUNK_GRID, False)


def test_experts_with_biases_have_similar_numbers(tmp_path):
    """gpt-oss adds a row of biases to the output of each selected expert."""
    path = write_random(tmp_path / "tiny.gguf", "gpt-oss", "F32")
    jobs = [msgspec.structs.replace(job, max_tokens=0, prompt_alternatives=0) for job in requests(6, 1, VOCABULARY)]
    ours, theirs = (sequential(EngineLoop(open_runner(path, "exact", 4, own=own)), jobs) for own in (True, False))
    for own, other in zip(ours, theirs, strict=True):
        assert [token.logprob for token in own[0]] == pytest.approx([token.logprob for token in other[0]], abs=0.01)


@pytest.mark.usefixtures("kernel_products")
def test_a_width_that_the_kernels_do_not_support_ends_the_promise(tmp_path):
    """The kernels compute in steps of 32 elements; the types in the file do not show the width."""
    odd = {"embedding_length": 80, "rope.dimension_count": 40}
    runner = open_runner(write_random(tmp_path / "odd.gguf", "llama", "F16", also=odd), "exact", 4)
    assert runner.uses_kernels
    assert (runner.promise, runner.grid) == ("none", CHUNK_GRID)


@pytest.mark.usefixtures("kernel_products")
def test_a_recurrent_model_needs_all_products_of_the_kernels(tmp_path, monkeypatch):
    """The library multiplies the tokens of one sequence and of several by different kernels."""
    narrow = write_random(tmp_path / "narrow.gguf", "mamba", also={"ssm.time_step_rank": 48})
    assert open_runner(narrow, "exact", 4).promise == "none"
    path = write_random(tmp_path / "tiny.gguf", "lfm2")
    assert [open_runner(path, kv_type, 4).promise for kv_type in ("exact", "f16")] == ["exact", "none"]
    assert open_runner(path, "exact", 4, own=False).promise == "none"


@pytest.mark.usefixtures("kernel_products")
def test_a_product_of_two_computed_operands_ends_the_promise(tmp_path, monkeypatch):
    path = write_random(tmp_path / "tiny.gguf", "llama")
    monkeypatch.setattr(accelerator, "has_unsupported_products", lambda: True)
    assert open_runner(path, "exact", 4).promise == "none"
    assert open_runner(path, "f16", 4).promise == "reproducible", "attention without flash attention has such products"


@pytest.mark.usefixtures("kernel_products")
def test_the_librarys_query_by_query_attention_is_exact(tmp_path, monkeypatch):
    monkeypatch.setattr(accelerator, "computes_all_attention", lambda: False)
    runner = open_runner(write_random(tmp_path / "tiny.gguf", "llama"), "exact", 8)
    assert (runner.uses_own_attention, runner.promise) == (False, "exact")
    compare(EngineLoop(runner), 40, VOCABULARY)
