"""Tiny random models of any architecture that llama.cpp supports.

The names and shapes of the tensors come from llama.cpp's error messages about missing and wrong tensors.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from numpy.typing import NDArray

from afterword.engine.llama import library
from afterword.engine.llama.library import native
from oracle.tiny import FILE_TYPES, FileType, Vocabulary, add_vocabulary, byte_vocabulary

library.initialize(verbose=False)  # otherwise the library's error messages are not recorded

Value = bool | int | float | str | tuple[int, ...]
Shape = tuple[int, ...]

WIDTH, WINDOW = 64, 32
_WORDS = byte_vocabulary(infill=False, add_bos=False)
_COMMON_KEYS: Mapping[str, Value] = {
    "context_length": 512,
    "embedding_length": WIDTH,
    "block_count": 2,
    "feed_forward_length": 2 * WIDTH,
    "attention.head_count": 2,
    "attention.head_count_kv": 1,
    "rope.dimension_count": WIDTH // 2,
    "rope.freq_base": 50000.0,
    "attention.layer_norm_epsilon": 1e-5,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.max_alibi_bias": 8.0,
    "attention.clamp_kqv": 0.0,
    "use_parallel_residual": True,
    "logit_scale": 1.0,
}
_STATE = {"ssm.conv_kernel": 4, "ssm.inner_size": 2 * WIDTH, "ssm.state_size": 16, "ssm.time_step_rank": 4}
_DELTA = {
    **{**_STATE, "ssm.state_size": 32, "ssm.group_count": 2},
    **{"full_attention_interval": 2, "rope.dimension_sections": (4, 4, 8, 0)},
}
_WKV = {
    **{"wkv.head_size": 32, "attention.decay_lora_rank": 32, "attention.iclr_lora_rank": 32},
    **{"attention.value_residual_mix_lora_rank": 32, "attention.gate_lora_rank": 32},
}
_WINDOWED_MIXTURE = {"block_count": 4, "attention.sliding_window": WINDOW}  # every fourth layer has no window
_LATENT = {
    **{"attention.q_lora_rank": 32, "attention.kv_lora_rank": 32, "rope.dimension_count": 16},
    **{"attention.key_length": 48, "attention.value_length": 32},
}
_NEMOTRON = {
    **{**_STATE, "ssm.group_count": 1, "block_count": 3},
    **{"attention.head_count_kv": (0, 1, 0), "feed_forward_length": (0, 0, 2 * WIDTH)},
}
_SHORT_CONVOLUTIONS = {"shortconv.l_cache": 3, "attention.head_count_kv": (0, 1)}
_ABSORBED = {"attention.key_length_mla": 48, "attention.value_length_mla": 32}
_DENSE_LAYERS = {"leading_dense_block_count": 2, "expert_feed_forward_length": 32, "expert_shared_count": 0}
_ARCHITECTURE_KEYS: Mapping[str, Mapping[str, Value]] = {
    "cohere2": {"attention.sliding_window": WINDOW},
    "gemma2": {"attention.sliding_window": WINDOW},
    "gemma3": {"attention.sliding_window": WINDOW},
    "gemma3n": {"attention.sliding_window": WINDOW},
    "qwen2vl": {"rope.dimension_sections": (4, 4, 8, 0)},
    "qwen3vl": {"rope.dimension_sections": (4, 4, 8, 0)},
    "deepseek2": {**_LATENT, **_ABSORBED, **_DENSE_LAYERS},
    "mistral4": {**_LATENT, **_ABSORBED, **_DENSE_LAYERS},
    "minicpm3": {**_LATENT, "attention.head_count_kv": 2},
    "phi3": {"attention.sliding_window": WINDOW, "rope.scaling.original_context_length": 64},
    "exaone4": {"attention.sliding_window": WINDOW},
    "plamo2": {
        **{**_STATE, "ssm.state_size": 64, "ssm.group_count": 0, "attention.head_count_kv": (0, 1)},
        **{"attention.key_length": 32, "attention.value_length": 32},
    },
    "mamba": {**_STATE, "ssm.time_step_rank": 32},
    "mamba2": {**_STATE, "ssm.group_count": 1},
    "jamba": {
        **{**_STATE, "ssm.time_step_rank": 32},
        **{"attention.head_count_kv": (0, 1), "expert_count": 0, "expert_used_count": 0},
    },
    "falcon-h1": {**_STATE, "ssm.group_count": 1},
    "granitehybrid": {**_STATE, "ssm.group_count": 1, "attention.head_count_kv": (0, 1)},
    "nemotron_h": _NEMOTRON,
    "nemotron_h_moe": _NEMOTRON,
    "qwen35": _DELTA,
    "qwen35moe": _DELTA,
    "kimi-linear": {
        **{**_LATENT, **_ABSORBED, "ssm.conv_kernel": 4, "kda.head_dim": 32, "attention.head_count_kv": (0, 1)},
        **{"expert_shared_count": 1, "expert_gating_func": 2},
    },
    "qwen3next": {
        **{**_DELTA, "expert_count": 4, "expert_used_count": 2},
        **{"expert_feed_forward_length": 32, "expert_shared_feed_forward_length": 32},
    },
    "rwkv7": _WKV,
    "olmoe": {"attention.head_count_kv": 2},
    "dots1": {"attention.head_count_kv": 2},
    "llama4": {"block_count": 4},  # every fourth layer has no window
    "qwen3vlmoe": {"rope.dimension_sections": (4, 4, 8, 0)},
    "grovemoe": {"expert_chunk_feed_forward_length": 32, "expert_group_scale": 0.05, "experts_per_group": 2},
    "afmoe": _WINDOWED_MIXTURE,
    "cohere2moe": _WINDOWED_MIXTURE,
    "exaone-moe": _WINDOWED_MIXTURE,
    "mellum": _WINDOWED_MIXTURE,
    "smallthinker": _WINDOWED_MIXTURE,
    "gpt-oss": {"attention.sliding_window": WINDOW},
    "lfm2": _SHORT_CONVOLUTIONS,
    "lfm2moe": _SHORT_CONVOLUTIONS,
}
_DELTA_TENSORS: Mapping[str, Shape] = {
    "blk.0.attn_qkv.weight": (4 * WIDTH, WIDTH),
    "blk.0.attn_gate.weight": (2 * WIDTH, WIDTH),
}
_CONVOLUTION_BIAS: Mapping[str, Shape] = {"blk.0.ssm_conv1d.bias": (2 * WIDTH + 2 * 16,)}
EXPERTS: Mapping[str, Value] = {
    "expert_count": 8,
    "expert_used_count": 3,
    "expert_feed_forward_length": WIDTH,
    "expert_shared_count": 1,
    "expert_shared_feed_forward_length": WIDTH // 2,
    "expert_gating_func": 2,
    "expert_weights_norm": True,
    "expert_weights_scale": 1.5,
    "leading_dense_block_count": 1,
    "interleave_moe_layer_step": 1,
}
"""Keys that make a mixture of experts of an architecture: 3 of 8 experts in the last layer, or in both."""
_WINDOW = {"attention.sliding_window": WINDOW, "rope.freq_base_swa": 10000.0}
_TWO_OF_THREE = {**_WINDOW, "block_count": 3, "attention.sliding_window_pattern": (True, True, False)}
_EXPERTS = {
    **{"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": WIDTH},
    **{"expert_gating_func": 2, "expert_shared_count": 1, "leading_dense_block_count": 1},
}
_GEMMA4 = {
    **{**_TWO_OF_THREE, "embedding_length_per_layer_input": 0, "feed_forward_length": (128,) * 3},
    **{"attention.key_length": 32, "attention.value_length": 32, "rope.dimension_count_swa": 32},
    **{"attention.key_length_swa": 32, "attention.value_length_swa": 32, "final_logit_softcapping": 30.0},
}
WINDOWED: Mapping[str, Mapping[str, Value]] = {
    "cohere2": {"block_count": 5},
    "exaone4": {"block_count": 64},  # the library gives a window only to the model with 64 layers
    "gemma2": {"block_count": 4},
    "gemma3": {"block_count": 7},
    "gemma4": _GEMMA4,
    "gemma4/effective": {  # the small ones: embeddings for each layer, and layers that use the keys of earlier ones
        **{**_GEMMA4, "block_count": 6, "attention.sliding_window_pattern": (True, True, False) * 2},
        **{"feed_forward_length": (128,) * 6, "embedding_length_per_layer_input": 32, "attention.shared_kv_layers": 3},
        **{"attention.key_length": 64, "attention.value_length": 64, "rope.dimension_count": 64},
    },
    "granite_swa": _TWO_OF_THREE,
    "muse-glimmer": {**_WINDOW, "block_count": 5, "final_logit_softcapping": 30.0},
    "olmo2": {**_WINDOW, "block_count": 5},
    "plamo3": {**_WINDOW, "block_count": 9},
    "spark2_5": _TWO_OF_THREE,
}
"""Additional keys with which dense models have layers with a sliding window and layers without.

By architecture and form, which `write_windowed` separates.
"""

OTHER_WINDOWED: Mapping[str, Mapping[str, Value]] = {
    "afmoe": {**_WINDOW, **_EXPERTS, "block_count": 5},
    "cohere2moe": {**_WINDOW, **_EXPERTS, "block_count": 5},
    "exaone-moe": {**_WINDOW, **_EXPERTS, "block_count": 5},
    "gemma3n": {},
    "gpt-oss": {**_WINDOW, **_EXPERTS, "block_count": 3},
    "llama4": {**_EXPERTS, "block_count": 5, "interleave_moe_layer_step": 1},  # chunks of 8,192 tokens
    "maple": {**_TWO_OF_THREE, **_EXPERTS, "swiglu_clamp_exp": (7.0, 7.0, 7.0)},
    "mellum": {**_WINDOW, **_EXPERTS, "block_count": 5},
    "mimo2": {**_TWO_OF_THREE, **_EXPERTS},
    "smallthinker": {**_WINDOW, **_EXPERTS, "block_count": 5},
    "step35": {**_TWO_OF_THREE, **_EXPERTS},
}
"""The same for mixtures of experts and Gemma 3n."""

UNEQUAL_HEADS: Mapping[str, Mapping[str, Value]] = {
    "deepseek2/not absorbed": {  # as files that were written before 2025-04
        **{"attention.key_length_mla": 0, "attention.value_length_mla": 0, "attention.head_count_kv": 2},
    },
    "deepseek2/stretched": {  # as most of the real models
        **{"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0, "rope.scaling.original_context_length": 64},
        "rope.scaling.yarn_log_multiplier": 0.0707,
    },
}
"""Additional keys with which keys and values have different sizes, by architecture and form."""

_OPTIONAL_TENSORS: Mapping[str, Mapping[str, Shape]] = {
    # tensors that a file may omit; the library then uses defaults, or the process ends
    "falcon-h1": {**_CONVOLUTION_BIAS, "blk.1.ssm_conv1d.bias": (2 * WIDTH + 2 * 16,)},
    "granitehybrid": _CONVOLUTION_BIAS,
    "nemotron_h": _CONVOLUTION_BIAS,
    "nemotron_h_moe": _CONVOLUTION_BIAS,
    "qwen35": _DELTA_TENSORS,
    "qwen35moe": _DELTA_TENSORS,
    "qwen3next": _DELTA_TENSORS,
    "phi3": {
        **{f"blk.{layer}.attn_qkv.weight": (2 * WIDTH, WIDTH) for layer in range(2)},
        **{f"rope_factors_{which}.weight": (WIDTH // 4,) for which in ("long", "short")},
    },
}


def write_random(
    path: str | Path,
    architecture: str,
    file_type: FileType = "Q8_0",
    *,
    poison: Mapping[int, float] | None = None,
    also: Mapping[str, Value] | None = None,
) -> Path:
    """Write a random model and return its path.

    `poison`: token ids and the number that replaces all elements of their embedding. `also`: additional keys.
    """
    keys = _keys(architecture, also or {})
    weights = _weights(_tensors(architecture, tuple(sorted(keys.items()))))
    for token, value in (poison or {}).items():
        weights["token_embd.weight"][token] = value
    return _write(path, architecture, keys, weights, file_type)


def write_windowed(path: str | Path, name: str, file_type: FileType = "Q8_0") -> Path:
    """Write a random model with a sliding window. `name`: a key of `WINDOWED` or `OTHER_WINDOWED`."""
    return write_random(path, name.partition("/")[0], file_type, also={**WINDOWED, **OTHER_WINDOWED}[name])


def write_unequal(path: str | Path, name: str, file_type: FileType = "Q8_0") -> Path:
    """Write a random model with keys and values of different sizes. `name`: a key of `UNEQUAL_HEADS`."""
    return write_random(path, name.partition("/")[0], file_type, also=UNEQUAL_HEADS[name])


def write_tied(
    path: str | Path, architecture: str, also: Mapping[str, Value], words: Vocabulary, seed: int = 0
) -> Path:
    """Write a random model of any size with F16 weights, whose embeddings are also its output matrix."""
    keys = _keys(architecture, also)
    shapes = dict(_tensors(architecture, tuple(sorted(keys.items()))))
    shapes.pop("output.weight", None)
    for name in shapes.keys() & {"token_embd.weight", "per_layer_token_embd.weight"}:
        shapes[name] = (len(words.tokens), *shapes[name][1:])
    return _write(path, architecture, keys, _weights(tuple(shapes.items()), seed), "F16", words=words)


def _keys(architecture: str, also: Mapping[str, Value]) -> Mapping[str, Value]:
    return {**_COMMON_KEYS, **_ARCHITECTURE_KEYS.get(architecture, {}), **also}


def _weights(shapes: tuple[tuple[str, Shape], ...], seed: int = 0) -> dict[str, NDArray[np.float32]]:
    first = seed * len(shapes)
    return {name: _random(name, shape, np.random.default_rng(i)) for i, (name, shape) in enumerate(shapes, first)}


@cache
def _tensors(architecture: str, keys: tuple[tuple[str, Value], ...]) -> tuple[tuple[str, Shape], ...]:
    """The names and shapes of the tensors that a file needs, with an untied output matrix if the library accepts it."""
    shapes: dict[str, Shape] = dict(_OPTIONAL_TENSORS.get(architecture, {}))
    while True:
        with tempfile.TemporaryDirectory() as folder:
            error = _load_error(_write_zeros(Path(folder, "zeros.gguf"), architecture, dict(keys), shapes))
        if missing := re.search(r"(?:missing tensor '([^']+)'|tensor '([^']+)' not found)", error):
            name = missing[1] or missing[2]
            alike = [shape for known, shape in shapes.items() if _kind(known) == _kind(name)]
            shapes[name] = alike[-1] if alike else (1,)
        elif wrong := re.search(r"tensor '([^']+)' has wrong shape; expected\s+([\d, ]+?), got", error):
            shape = [int(size) for size in wrong[2].split(",")]
            while len(shape) > 1 and shape[-1] == 1:
                shape.pop()
            shapes[wrong[1]] = tuple(reversed(shape))
        elif "wrong number of tensors" in error and "output.weight" in shapes:
            del shapes["output.weight"]
            return tuple(shapes.items())
        elif not error and "output.weight" not in shapes:
            shapes["output.weight"] = shapes["token_embd.weight"]
        else:
            assert not error, f"{architecture}: {error}"
            return tuple(shapes.items())


def _load_error(path: Path) -> str:
    """The library's error messages about a file; empty if the file can be loaded."""
    library._last_errors.clear()
    model = native.llama_model_load_from_file(os.fsencode(path), native.llama_model_default_params())
    if model:
        native.llama_model_free(model)
        return ""
    return " ".join(library._last_errors)


def _kind(name: str) -> str:
    return re.sub(r"\d+", "N", name)


def _random(name: str, shape: Shape, random: np.random.Generator) -> NDArray[np.float32]:
    """Random weights that result in peaked and varied distributions, as in tiny.py."""
    numbers = random.standard_normal(shape, dtype=np.float32)
    if name.endswith("ssm_a"):
        return -np.abs(numbers)  # states decay
    if name == "output_norm.weight":
        return numbers * 3 / shape[0] ** 0.5
    if len(shape) == 1:
        return 1 + 0.1 * numbers if name.endswith("weight") else 0.25 * numbers
    return numbers if name.startswith(("token_embd", "output.")) else numbers / shape[-1] ** 0.5


def _write(
    path: str | Path,
    architecture: str,
    keys: Mapping[str, Value],
    weights: Mapping[str, NDArray[np.float32]],
    file_type: FileType,
    *,
    words: Vocabulary = _WORDS,
) -> Path:
    writer = _begin(path, architecture, keys, file_type, words)
    for name, weight in weights.items():
        # The library expects biases and small matrices of recurrent layers unquantized, and does not quantize the
        # matrices that choose experts. Non-finite values cannot be quantized.
        plain = (
            weight.ndim == 1
            or weight.shape[-1] % 32
            or re.search(r"norm|ssm|shortconv|gate_inp|bias|lerp|first|decay_w|mix_[avwg]\d", name)
        )
        kind = GGMLQuantizationType["F32" if plain or not np.isfinite(weight).all() else file_type]
        writer.add_tensor(name, quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def _write_zeros(path: Path, architecture: str, keys: Mapping[str, Value], shapes: Mapping[str, Shape]) -> Path:
    """Write a file whose weights are zeros that take no space on the disk."""
    writer = _begin(path, architecture, keys, "F32", _WORDS)
    size = 0
    for name, shape in shapes.items():
        count = 4 * int(np.prod(shape))
        writer.add_tensor_info(name, shape, np.dtype(np.float32), count)
        size += -(-count // writer.data_alignment) * writer.data_alignment
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, path.stat().st_size + writer.data_alignment + size)
    return path


def _begin(
    path: str | Path, architecture: str, keys: Mapping[str, Value], file_type: FileType, words: Vocabulary
) -> GGUFWriter:
    writer = GGUFWriter(path, architecture)
    writer.add_name("tiny")  # if the name contained an architecture, the library would choose another vocabulary
    for key, value in {**keys, "vocab_size": len(words.tokens)}.items():
        _add(writer, f"{architecture}.{key}", value)
    writer.add_file_type(FILE_TYPES[file_type])
    add_vocabulary(writer, words)
    return writer


def _add(writer: GGUFWriter, name: str, value: Value) -> None:
    match value:
        case bool():
            writer.add_bool(name, value)
        case int():
            writer.add_uint32(name, value)
        case float():
            writer.add_float32(name, value)
        case str():
            writer.add_string(name, value)
        case _:
            writer.add_array(name, value)
