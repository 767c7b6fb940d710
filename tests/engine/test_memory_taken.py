"""Compares the estimated memory of a model with the memory that its worker uses under the largest load."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import numpy as np
import psutil
import pytest
from gguf import GGUFWriter, TokenType

from afterword.cli.model_setup import fit_models
from afterword.config import EngineSettings
from afterword.engine.parent.supervisor import Supervisor
from afterword.engine.protocol import Job, Sampling
from afterword.models.gguf_facts import read_facts
from afterword.models.memory_fit import HEADROOM
from afterword.models.registry import Model
from oracle.architectures import write_random
from oracle.tiny import Shape, Vocabulary, add_vocabulary, byte_vocabulary, random_weights, write_model

FACTOR = 1.6
"""The estimate without headroom is at most so many times the used memory. The whole estimate is never less than it."""
BASE = 40 << 20  # bytes of a worker process without a model, which are part of the headroom


def wide_vocabulary(size: int) -> Vocabulary:
    """A vocabulary of `size` tokens, most of which are fillers."""
    few = byte_vocabulary(infill=False, add_bos=False)
    more = tuple(f"filler{number}" for number in range(size - len(few.tokens)))
    return dataclasses.replace(few, tokens=few.tokens + more, types=few.types + (TokenType.NORMAL,) * len(more))


def write_wide(path: Path, size: int, **shape: int) -> Path:
    """A small model with a vocabulary of `size` tokens."""
    vocabulary, wanted = wide_vocabulary(size), Shape(**({"context": 512} | shape))
    return write_model(path, wanted, vocabulary, random_weights(wanted, vocabulary), "Q8_0")


def write_mamba(path: Path, inner: int, states: int) -> Path:
    """A recurrent model with large states."""
    width, rank, layers = inner // 2, 4, 2
    vocabulary = byte_vocabulary(infill=False, add_bos=False)
    writer = GGUFWriter(path, "mamba")
    numbers = {"ssm.conv_kernel": 4, "ssm.inner_size": inner, "ssm.state_size": states, "ssm.time_step_rank": rank}
    numbers |= {"context_length": 512, "embedding_length": width, "block_count": layers, "feed_forward_length": 0}
    for name, number in (numbers | {"attention.head_count": 0}).items():
        writer.add_uint32(f"mamba.{name}", number)
    writer.add_layer_norm_rms_eps(1e-5)
    add_vocabulary(writer, vocabulary)
    random = np.random.default_rng(0)

    def normal(*size: int) -> np.ndarray:
        return (0.1 * random.standard_normal(size)).astype(np.float32)

    writer.add_tensor("token_embd.weight", normal(len(vocabulary.tokens), width))
    writer.add_tensor("output_norm.weight", 1 + normal(width))
    for layer in range(layers):
        parts = {
            "attn_norm.weight": 1 + normal(width),
            "ssm_in.weight": normal(2 * inner, width),
            "ssm_conv1d.weight": normal(inner, 4),
            "ssm_conv1d.bias": normal(inner),
            "ssm_x.weight": normal(rank + 2 * states, inner),
            "ssm_dt.weight": normal(inner, rank),
            "ssm_dt.bias": normal(inner),
            "ssm_a": -np.abs(normal(inner, states)),
            "ssm_d": normal(inner),
            "ssm_out.weight": normal(width, inner),
        }
        for name, weight in parts.items():
            writer.add_tensor(f"blk.{layer}.{name}", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


async def estimated_and_used(path: Path, settings: EngineSettings) -> tuple[int, int]:
    """The estimated bytes, and the worker's resident bytes after prompts filled all sequences.

    All tokens of the prompts are scored. Without the memory for snapshots, which are taken when prompts come.
    """
    (model,) = fit_models([(Model("m", path, "file"), read_facts(path))], settings)
    message = model.load_message
    engine = Supervisor(message)

    async def fill(number: int) -> None:
        prompt = (65 + number, *(65 + at % 26 for at in range(message.context - 2)))
        async for _ in engine.start(Job(prompt, 1, 1, Sampling(), (), bytes(16), prompt_alternatives=1)):
            pass

    try:
        await engine.open()
        await asyncio.gather(*(fill(number) for number in range(message.sequences)))
        assert engine.pid is not None
        return model.memory_bytes - message.snapshot_bytes, psutil.Process(engine.pid).memory_info().rss
    finally:
        await engine.close()


def compare(path: Path, **settings: int) -> None:
    planned, used = asyncio.run(estimated_and_used(path, EngineSettings(**settings)))  # type: ignore[arg-type]
    assert used <= planned
    assert planned - HEADROOM <= FACTOR * (used - BASE)


def test_the_logits_of_a_large_vocabulary_are_included(tmp_path: Path) -> None:
    compare(write_wide(tmp_path / "wide.gguf", 100_000), parallel=2)


def test_the_states_of_recurrent_layers_are_included(tmp_path: Path) -> None:
    compare(write_mamba(tmp_path / "mamba.gguf", inner=1024, states=512), parallel=32, context=64)


def test_the_keys_and_values_are_included(tmp_path: Path) -> None:
    compare(write_wide(tmp_path / "long.gguf", 1000, layers=8, width=256, kv_heads=2, context=2048), parallel=16)


def test_the_keys_and_values_of_layers_with_a_window_are_included(tmp_path: Path) -> None:
    """A layer with a window has a cell for every token of the context."""
    large = {"context_length": 2048, "embedding_length": 128, "attention.head_count_kv": 2, "block_count": 12}
    heads = {"attention.key_length": 64, "attention.value_length": 64, "rope.dimension_count": 64}
    compare(write_random(tmp_path / "windowed.gguf", "gemma3", also=large | heads), parallel=16)


def test_layers_that_share_keys_and_values_are_not_included(tmp_path: Path) -> None:
    few = {"block_count": 12, "attention.shared_kv_layers": 9, "feed_forward_length": (128,) * 12}
    large = {"context_length": 2048, "embedding_length": 128, "attention.head_count_kv": 2}
    sizes = (f"attention.{kind}_length{layers}" for kind in ("key", "value") for layers in ("", "_swa"))
    windows = {"attention.sliding_window_pattern": (True, True, False) * 4}
    also = {**few, **large, **dict.fromkeys(sizes, 128), **windows}
    compare(write_random(tmp_path / "shared.gguf", "gemma4", also=also), parallel=16)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "settings"), [(262_144, {"parallel": 16}), (262_144, {"batch": 1024, "parallel": 1})])
def test_larger_vocabularies_and_batches_are_included(tmp_path: Path, size: int, settings: dict[str, int]) -> None:
    compare(write_wide(tmp_path / "wide.gguf", size, context=2048), **settings)
