"""Refuses files with headers that would make llama.cpp abort the process, with an error message instead.

Each rule stands for an abort that was observed with a corrupted header (`tests/chaos`, gate G14).
"""

from __future__ import annotations

import math
from pathlib import Path

from afterword.errors import SettingError
from afterword.models.gguf_header import Header

MAX_LAYERS = 512
MAX_HEADS = 2**16 - 1  # also the most elements of a head: llama.cpp computes the product in 32 bits
FULL_ROPE_ARCHITECTURES = frozenset(
    (
        *("llama", "mistral3", "qwen2", "qwen2moe", "qwen3", "qwen3moe"),
        *("internlm2", "olmo", "olmo2", "starcoder2", "granite", "smollm3"),
    )
)
"""Architectures that apply RoPE to all elements of an attention head."""
NON_MATRIX_TYPES = frozenset(("Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"))
"""Types for which ggml has no matmul."""
TABLE_ROUTED_ARCHITECTURES = frozenset(("deepseek4",))
"""Architectures with integer tensors: tables of the experts of each token."""


def check_gguf(path: Path, architecture: str, header: Header) -> None:
    """Raise `SettingError` for a file that would make the worker abort."""
    fault = _layers(architecture, header) or _numbers(architecture, header)
    fault = fault or _types(architecture, header) or _tokens(header)
    if fault:
        raise SettingError(f"{path} is damaged: {fault}.")


def _layers(architecture: str, header: Header) -> str | None:
    layers = header.values.get(f"{architecture}.block_count", 1)
    if not isinstance(layers, int) or not 0 < layers <= MAX_LAYERS:
        return f"it has {layers} layers"
    ahead = header.values.get(f"{architecture}.nextn_predict_layers", 0)
    if not isinstance(ahead, int) or not 0 <= ahead <= layers:
        return f"{ahead} of its {layers} layers predict further tokens"
    return None


def _numbers(architecture: str, header: Header) -> str | None:
    for name in ("layer_norm_rms_epsilon", "layer_norm_epsilon"):
        epsilon = header.values.get(f"{architecture}.attention.{name}", 0.0)
        if not isinstance(epsilon, float | int) or not 0 <= epsilon < math.inf:
            return f"its {name} is {epsilon}"
    for name in ("head_count", "head_count_kv", "key_length", "value_length"):
        value = header.values.get(f"{architecture}.attention.{name}", 0)
        for number in value if isinstance(value, tuple) else (value,):  # one number per layer, or one for all layers
            if not isinstance(number, int) or not 0 <= number <= MAX_HEADS:
                return f"its {name} is {number}"
    width = header.values.get(f"{architecture}.embedding_length")
    heads = header.values.get(f"{architecture}.attention.head_count")
    if architecture in FULL_ROPE_ARCHITECTURES and isinstance(width, int) and isinstance(heads, int) and heads > 0:
        length = header.values.get(f"{architecture}.attention.key_length", width // heads)
        rotated = header.values.get(f"{architecture}.rope.dimension_count", length)
        if rotated != length:
            return f"{rotated} of the {length} elements of its heads are rotated"
    return None


def _types(architecture: str, header: Header) -> str | None:
    wrong = NON_MATRIX_TYPES & set(header.tensor_bytes)
    if architecture in TABLE_ROUTED_ARCHITECTURES:
        wrong -= {"I32"}
    return f"it has weights of type {min(wrong)}" if wrong else None


def _tokens(header: Header) -> str | None:
    """Check for duplicate tokens and missing byte tokens.

    Texts end at a NUL, as in C. An empty text is replaced by `[EMPTY_index]`, as llama.cpp does.
    """
    tokens = [token.partition(b"\0")[0] for token in header.tokens]
    spelled = {token or b"[EMPTY_%d]" % index for index, token in enumerate(tokens)}
    if len(spelled) < len(tokens):
        return f"{len(tokens) - len(spelled)} of its tokens are duplicates"
    if header.values.get("tokenizer.ggml.model") == "llama" and header.tokens:
        missing = [byte for byte in range(256) if not {b"<0x%02X>" % byte, bytes([byte])} & spelled]
        if missing:
            return f"no token stands for the byte {missing[0]}"
    return None
