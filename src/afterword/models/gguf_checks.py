"""What llama.cpp takes for granted of a file and ends the process over: here it is a sentence.

Each rule is an abort that a file with something wrong in its header was seen to cause (`tests/chaos`, gate G14).
"""

from __future__ import annotations

import math
from pathlib import Path

from afterword.errors import SettingError
from afterword.models.gguf_header import Header

MAX_LAYERS = 512
MAX_HEADS = 2**16 - 1  # and elements of one: their product is computed in 32 bits
FULL_ROPE_ARCHITECTURES = frozenset(
    (
        *("llama", "mistral3", "qwen2", "qwen2moe", "qwen3", "qwen3moe"),
        *("internlm2", "olmo", "olmo2", "starcoder2", "granite", "smollm3"),
    )
)
"""Architectures whose attention heads are rotated whole."""
NON_MATRIX_TYPES = frozenset(("Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"))
"""Types that ggml has no products for."""
TABLE_ROUTED_ARCHITECTURES = frozenset(("deepseek4",))
"""Architectures with tables of whole numbers: which experts each token has."""


def check_gguf(path: Path, architecture: str, header: Header) -> None:
    """Refuse what would end the engine. Raises `SettingError`."""
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
        for number in value if isinstance(value, tuple) else (value,):  # one a layer, or one for all
            if not isinstance(number, int) or not 0 <= number <= MAX_HEADS:
                return f"its {name} is {number}"
    width = header.values.get(f"{architecture}.embedding_length")
    heads = header.values.get(f"{architecture}.attention.head_count")
    if architecture in FULL_ROPE_ARCHITECTURES and isinstance(width, int) and isinstance(heads, int) and heads > 0:
        length = header.values.get(f"{architecture}.attention.key_length", width // heads)
        turned = header.values.get(f"{architecture}.rope.dimension_count", length)
        if turned != length:
            return f"{turned} of the {length} elements of its heads are rotated"
    return None


def _types(architecture: str, header: Header) -> str | None:
    wrong = NON_MATRIX_TYPES & set(header.tensor_bytes)
    if architecture in TABLE_ROUTED_ARCHITECTURES:
        wrong -= {"I32"}
    return f"it has weights of type {min(wrong)}" if wrong else None


def _tokens(header: Header) -> str | None:
    """Spellings are compared as C does: up to a NUL; those without any have the name that the library gives them."""
    tokens = [token.partition(b"\0")[0] for token in header.tokens]
    spelled = {token or b"[EMPTY_%d]" % place for place, token in enumerate(tokens)}
    if len(spelled) < len(tokens):
        return f"{len(tokens) - len(spelled)} of its tokens are there twice"
    if header.values.get("tokenizer.ggml.model") == "llama" and header.tokens:
        missing = [byte for byte in range(256) if not {b"<0x%02X>" % byte, bytes([byte])} & spelled]
        if missing:
            return f"no token stands for the byte {missing[0]}"
    return None
