"""Writes model files with a real model's shape and random weights. Speed depends only on shape and type."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

# The tests' writers of small models also write larger shapes.
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from gguf import TokenType

from bench.mixture import MixtureShape, write_mixture
from oracle import architectures, forms, quantizer, tiny

TYPES = tuple(quantizer.MIXTURES)


@dataclass(frozen=True, slots=True)
class Form:
    """A real model's shape and the size of its vocabulary."""

    shape: tiny.Shape | MixtureShape
    vocabulary: int

    def write(self, path: Path, vocabulary: tiny.Vocabulary, seed: int) -> None:
        """Write the model with F16 weights."""
        if isinstance(self.shape, MixtureShape):
            write_mixture(path, self.shape, vocabulary, seed)
        else:
            weights = tiny.random_weights(self.shape, vocabulary, seed, tied=True)
            tiny.write_model(path, self.shape, vocabulary, weights, "F16")


@dataclass(frozen=True, slots=True)
class ArchitectureForm:
    """A shape of any architecture, by the keys of its GGUF file. `optional`: tensors that a file may omit."""

    architecture: str
    keys: Mapping[str, forms.Value]
    vocabulary: int
    optional: Mapping[str, forms.Shape] = field(default_factory=dict)

    def write(self, path: Path, vocabulary: tiny.Vocabulary, seed: int) -> None:
        """Write the model with F16 weights."""
        architectures.write_tied(path, self.architecture, self.keys, vocabulary, optional=self.optional, seed=seed)


FORMS: Mapping[str, Form | ArchitectureForm] = {
    # Gemma 3 between its two smallest sizes: five layers with a window of 512 tokens for each without a window.
    "gemma3-0.5b": ArchitectureForm(
        "gemma3",
        {
            **{"context_length": 32768, "embedding_length": 896, "block_count": 18, "feed_forward_length": 4864},
            **{"attention.head_count": 4, "attention.head_count_kv": 1, "attention.sliding_window": 512},
            **{"attention.key_length": 256, "attention.value_length": 256, "rope.dimension_count": 256},
            **{"rope.freq_base": 1e6, "rope.freq_base_swa": 1e4, "attention.layer_norm_rms_epsilon": 1e-6},
        },
        262_144,
    ),
    # Qwen 3.5's smallest size: three layers with a delta net for each with attention.
    "qwen3.5-0.8b": ArchitectureForm(
        "qwen35",
        {
            **{"context_length": 32768, "embedding_length": 1024, "block_count": 24, "feed_forward_length": 3584},
            **{"attention.head_count": 8, "attention.head_count_kv": 2, "rope.dimension_count": 64},
            **{"attention.key_length": 256, "attention.value_length": 256, "rope.dimension_sections": (11, 11, 10, 0)},
            **{"rope.freq_base": 1e7, "attention.layer_norm_rms_epsilon": 1e-6, "full_attention_interval": 4},
            **{"ssm.conv_kernel": 4, "ssm.state_size": 128, "ssm.group_count": 16, "ssm.time_step_rank": 16},
            "ssm.inner_size": 2048,
        },
        248_320,
        {
            f"blk.{layer}.{name}.weight": (rows, 1024)
            for layer in range(24)
            if (layer + 1) % 4
            for name, rows in (("attn_qkv", 6144), ("attn_gate", 2048))
        },
    ),
    "qwen2.5-0.5b": Form(tiny.Shape("qwen2", 896, 24, 14, 2, 4864, 32768, 1e6, 1e-6), 151_936),
    "qwen2.5-1.5b": Form(tiny.Shape("qwen2", 1536, 28, 12, 2, 8960, 32768, 1e6, 1e-6), 151_936),
    # Half a billion weights used for each token. At Q8_0 the files have about 2.8 and 3.8 GB.
    "mixture-32": Form(MixtureShape(1024, 24, 16, 4, experts=32, used=4, hidden=1024, context=32768), 151_936),
    "mixture-128": Form(MixtureShape(1024, 22, 16, 4, experts=128, used=8, hidden=384, context=32768), 151_936),
    "small-mixture": Form(MixtureShape(64, 2, 2, 1, experts=8, used=2, hidden=64, context=2048), 4_096),
    "small": Form(tiny.Shape("qwen2", 64, 2, 2, 1, 128, 2048, 1e6, 1e-6), 4_096),
}


def write_gguf(path: Path, form: Form | ArchitectureForm, kind: str, seed: int = 0) -> None:
    """Write a GGUF file. As in published files, several types are mixed within a file of a K-quant."""
    whole = path if kind == "F16" else path.with_suffix(".f16.tmp")
    form.write(whole, _vocabulary(form), seed)
    if whole != path:
        try:
            quantizer.quantize(whole, path, kind)
        finally:
            whole.unlink()


def write_folder(path: Path, form: Form | ArchitectureForm) -> None:
    """Write the same model in Hugging Face's format without weights: vLLM generates random weights itself."""
    if isinstance(form, ArchitectureForm):
        raise SystemExit(f"Type HF is not supported for {form.architecture}.")
    shape, vocabulary = form.shape, _vocabulary(form)
    if isinstance(shape, MixtureShape):
        raise SystemExit("Type HF is not supported for mixtures of experts.")
    end = vocabulary.tokens.index(vocabulary.special["eos"])
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "torch_dtype": "bfloat16",
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.hidden,
        "max_position_embeddings": shape.context,
        "rope_theta": shape.rope_base,
        "rms_norm_eps": shape.epsilon,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "vocab_size": form.vocabulary,
        "bos_token_id": end,
        "eos_token_id": end,
    }
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": vocabulary.tokens.index(token), "content": token, "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for token in dict.fromkeys(vocabulary.special.values())
        ],
        "pre_tokenizer": level,
        "decoder": level,
        "model": {
            "type": "BPE",
            "vocab": {token: number for number, token in enumerate(vocabulary.tokens)},
            "merges": list(vocabulary.merges),
        },
    }
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": vocabulary.special["eos"]}
    path.mkdir(parents=True, exist_ok=True)
    _write(path / "config.json", config)
    _write(path / "tokenizer.json", tokenizer)
    _write(path / "tokenizer_config.json", about)


def _vocabulary(form: Form | ArchitectureForm) -> tiny.Vocabulary:
    """The tests' byte-level vocabulary, extended with words to the form's size."""
    words = tiny.byte_vocabulary(infill=True, add_bos=False)
    more = tuple(f"word{number}" for number in range(form.vocabulary - len(words.tokens)))
    return replace(words, tokens=words.tokens + more, types=words.types + (TokenType.NORMAL,) * len(more))


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
