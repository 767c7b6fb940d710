"""Writes the model as a GGUF file for llama.cpp: in F32, or quantized to Q8_0.

Depends on the GGUF format, the model and the tokenizer.
"""

import json
from pathlib import Path

import gguf
import numpy as np
from tokenizers import Tokenizer

from training.data import SPECIALS
from training.model import Llama
from training.rows import END, MIDDLE, PREFIX, SUFFIX
from training.tokenizer import PRE_TOKENIZER

NAME = "afterword-tiny"
DESCRIPTION = "A small model for English stories, Python and infill, trained from scratch for Afterword."
NAMES = {
    "embedding": "token_embd",
    "norm": "output_norm",
    "attention_norm": "attn_norm",
    "attention.q": "attn_q",
    "attention.k": "attn_k",
    "attention.v": "attn_v",
    "attention.out": "attn_output",
    "feed_forward_norm": "ffn_norm",
    "feed_forward.gate": "ffn_gate",
    "feed_forward.up": "ffn_up",
    "feed_forward.down": "ffn_down",
}


def export(model: Llama, tokenizer: Tokenizer, path: Path, quantized: bool) -> None:
    """Write one file: all tensors in F32, or the matrices in Q8_0."""
    writer = gguf.GGUFWriter(path, "llama")
    kind = gguf.LlamaFileType.MOSTLY_Q8_0 if quantized else gguf.LlamaFileType.ALL_F32
    _describe(writer, model, kind)
    _add_tokenizer(writer, tokenizer)
    for name, weight in model.state_dict().items():
        values = weight.numpy().astype(np.float32)
        if quantized and values.ndim == 2:
            packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(_renamed(name), packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(_renamed(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _renamed(name: str) -> str:
    """The name in GGUF: `blocks.0.attention.q.weight` becomes `blk.0.attn_q.weight`."""
    name = name.removesuffix(".weight")
    if not name.startswith("blocks."):
        return f"{NAMES[name]}.weight"
    _, layer, part = name.split(".", 2)
    return f"blk.{layer}.{NAMES[part]}.weight"


def _describe(writer: gguf.GGUFWriter, model: Llama, kind: gguf.LlamaFileType) -> None:
    shape = model.shape
    writer.add_name(NAME)
    writer.add_author("Afterword")
    writer.add_license("apache-2.0")
    writer.add_description(DESCRIPTION)
    writer.add_file_type(kind)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.heads)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.epsilon)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    kinds = [gguf.TokenType.CONTROL if token in SPECIALS else gguf.TokenType.NORMAL for token in tokens]
    merges = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZER)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_add_bos_token(False)
    for role in ("bos", "eos", "eot", "padding"):
        writer.add_uint32(f"tokenizer.ggml.{role}_token_id", END)
    for role, token in (("pre", PREFIX), ("suf", SUFFIX), ("mid", MIDDLE)):
        writer.add_uint32(f"tokenizer.ggml.fim_{role}_token_id", token)
