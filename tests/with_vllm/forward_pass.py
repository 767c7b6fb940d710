"""An independent forward pass of the random model: the numpy oracle of the tests over a `safetensors` file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from oracle.oracle import Array, Oracle


def reference(folder: Path) -> Oracle:
    """The oracle of the model in a folder."""
    oracle = Oracle.__new__(Oracle)
    names = {
        "embed_tokens": "token_embd",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        **{f"self_attn.{each}_proj": f"attn_{each}" for each in "qkv"},
        "self_attn.o_proj": "attn_output",
        **{f"mlp.{each}_proj": f"ffn_{each}" for each in ("gate", "up", "down")},
    }
    weights = {"output.weight" if name == "lm_head.weight" else name: each for name, each in read_weights(folder)}
    renamed = {}
    for name, each in weights.items():
        short = name.removeprefix("model.").removesuffix(".weight").replace("layers.", "blk.")
        block, _, part = short.rpartition(".") if short.startswith("blk.") else ("", "", short)
        if short.startswith("blk."):
            number, _, part = short.removeprefix("blk.").partition(".")
            block = f"blk.{number}."
        renamed[block + names.get(part, {"norm": "output_norm"}.get(part, part)) + ".weight"] = each
    oracle._weights = renamed
    config = json.loads((folder / "config.json").read_text())
    oracle.fields = {
        "general.architecture": "qwen2",  # pairs the halves of a head, as models in Hugging Face's format do
        "qwen2.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "qwen2.rope.freq_base": config["rope_theta"],
    }
    oracle._layers, oracle._heads = config["num_hidden_layers"], config["num_attention_heads"]
    oracle._kv_heads, oracle._head_size = config["num_key_value_heads"], config["head_dim"]
    oracle._halves, oracle._output = True, "output"
    return oracle


def read_weights(folder: Path) -> list[tuple[str, Array]]:
    data = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    found = []
    for name, tensor in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            start, stop = (8 + length + offset for offset in tensor["data_offsets"])
            array = np.frombuffer(data[start:stop], np.float32).reshape(tensor["shape"])
            found.append((name, array.astype(np.float64)))
    return found
