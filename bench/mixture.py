"""Writes mixtures of experts in the form of Qwen 3's with random weights, half a billion of them used for each token.

Random routers select every expert about equally often. All layers hold the same experts' weights: speed does not depend
on them, and so only one layer's are in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter, LlamaFileType
from numpy.typing import NDArray

from oracle import tiny

Matrix = NDArray[np.float16] | NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class MixtureShape:
    """The hyperparameters of a mixture. `hidden`: the elements of the hidden layer of one expert."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    experts: int
    used: int
    hidden: int
    context: int
    rope_base: float = 1e6
    epsilon: float = 1e-6


def write_mixture(path: Path, shape: MixtureShape, vocabulary: tiny.Vocabulary, seed: int = 0) -> None:
    """Write a GGUF file of type F16, one tensor after the other. The output matrix is the token embedding."""
    writer = GGUFWriter(path, "qwen3moe")
    head = shape.width // shape.heads
    sizes = (shape.width, shape.layers, shape.heads, shape.kv_heads, shape.hidden, shape.context)
    tiny.add_shape(writer, tiny.Shape("qwen2", *sizes, shape.rope_base, shape.epsilon), len(vocabulary.tokens))
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_expert_count(shape.experts)
    writer.add_expert_used_count(shape.used)
    writer.add_expert_feed_forward_length(shape.hidden)
    writer.add_file_type(LlamaFileType.MOSTLY_F16)
    tiny.add_vocabulary(writer, vocabulary)
    for name, weight in _tensors(shape, len(vocabulary.tokens), seed):
        writer.add_tensor_info(name, weight.shape, weight.dtype, weight.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, weight in _tensors(shape, len(vocabulary.tokens), seed):
        writer.write_tensor_data(weight)
    writer.close()


def _tensors(shape: MixtureShape, size: int, seed: int) -> Iterator[tuple[str, Matrix]]:
    """The names and weights of all tensors, in the order of the file."""
    random = np.random.default_rng(seed)

    def matrix(*sizes: int) -> Any:
        return (random.standard_normal(sizes, dtype=np.float32) / sizes[-1] ** 0.5).astype(np.float16)

    keys, head = shape.width // shape.heads * shape.kv_heads, shape.width // shape.heads
    ones, head_ones = np.ones(shape.width, np.float32), np.ones(head, np.float32)
    experts = {
        "ffn_gate_exps.weight": matrix(shape.experts, shape.hidden, shape.width),
        "ffn_up_exps.weight": matrix(shape.experts, shape.hidden, shape.width),
        "ffn_down_exps.weight": matrix(shape.experts, shape.width, shape.hidden),
    }
    yield "token_embd.weight", random.standard_normal((size, shape.width), dtype=np.float32).astype(np.float16)
    for layer in range(shape.layers):
        parts = {
            "attn_norm.weight": ones,
            "attn_q.weight": matrix(shape.width, shape.width),
            "attn_k.weight": matrix(keys, shape.width),
            "attn_v.weight": matrix(keys, shape.width),
            "attn_q_norm.weight": head_ones,
            "attn_k_norm.weight": head_ones,
            "attn_output.weight": matrix(shape.width, shape.width),
            "ffn_norm.weight": ones,
            "ffn_gate_inp.weight": matrix(shape.experts, shape.width).astype(np.float32),
            **experts,
        }
        yield from ((f"blk.{layer}.{name}", weight) for name, weight in parts.items())
    yield "output_norm.weight", tiny.PEAK / shape.width**0.5 * random.standard_normal(shape.width, dtype=np.float32)
