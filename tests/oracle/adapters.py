"""Writes LoRA adapters with random weights for a model file, and the model whose weights contain an adapter's part."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from numpy.typing import NDArray

Pair = tuple[NDArray[np.float32], NDArray[np.float32]]
"""A: (rank, inputs), and B: (outputs, rank)."""

_ADAPTED = ("attn_q.weight", "attn_v.weight", "attn_output.weight", "ffn_down.weight")


def random_pairs(base: Path, rank: int, seed: int = 0) -> dict[str, Pair]:
    """Matrices A and B for matrices of the base model in each layer, by the names of its tensors."""
    rng = np.random.default_rng(seed)
    found = {}
    for tensor in GGUFReader(base).tensors:
        if tensor.name.endswith(_ADAPTED):
            inputs, outputs = map(int, tensor.shape)
            a = rng.standard_normal((rank, inputs), np.float32) / inputs**0.5
            b = rng.standard_normal((outputs, rank), np.float32) / rank**0.5
            found[tensor.name] = (a.astype(np.float16).astype(np.float32), b.astype(np.float16).astype(np.float32))
    return found


def write_adapter(
    path: Path,
    pairs: Mapping[str, Pair],
    *,
    alpha: float = 8.0,
    file_type: str = "F32",
    architecture: str = "llama",
    invocation: tuple[int, ...] = (),
) -> Path:
    """Write an adapter as llama.cpp's own converter does. `invocation`: tokens that activate it (activated LoRA)."""
    kind = GGMLQuantizationType[file_type]
    writer = GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    if invocation:
        key = "adapter.alora.invocation_tokens"
        writer.add_key_value(key, invocation, GGUFValueType.ARRAY, sub_type=GGUFValueType.UINT32)
    for name, (a, b) in pairs.items():
        for suffix, matrix in (("lora_a", a), ("lora_b", b)):
            data = matrix if file_type == "F32" else matrix.astype(np.float16)
            writer.add_tensor(f"{name}.{suffix}", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_merged(path: Path, base: Path, pairs: Mapping[str, Pair], *, alpha: float = 8.0, scale: float = 1.0) -> Path:
    """Write a copy of a model with F32 weights, to which the adapter's part is added."""
    shutil.copy(base, path)
    for tensor in GGUFReader(path, "r+").tensors:
        if tensor.name in pairs:
            a, b = pairs[tensor.name]
            assert tensor.tensor_type == GGMLQuantizationType.F32
            tensor.data[:] += scale * alpha / len(a) * (b @ a)
    return path
