"""Tiny GGUF models with random weights for tests. Writing one takes a fraction of a second.

Distributions are peaked, and greedy continuations vary. There are two vocabularies. `bytes` is byte-level BPE: ids
below 256 are bytes, followed by the merges and the special tokens. `spm` is SentencePiece: the tokenizer adds BOS and
a space before the text, and uses byte tokens for text that no piece covers. Generated text is seldom valid UTF-8.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_letters
from typing import Literal

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType
from gguf.quants import quantize
from numpy.typing import NDArray

Arch = Literal["llama", "qwen2"]
FileType = Literal["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"]
Weights = dict[str, NDArray[np.float32]]

# Words after a space come first, so that their merges win over those of the endings.
WORDS = (" the", " and", " of", " to", " a", " in", " was", " said", " Hello", "ing", "ed", "er", "ly")
BLANKS = ("\n\n", "  ")
INFILL = {"fim_pre": "<|fim_prefix|>", "fim_suf": "<|fim_suffix|>", "fim_mid": "<|fim_middle|>"}
FILE_TYPES = {
    "F32": LlamaFileType.ALL_F32,
    "F16": LlamaFileType.MOSTLY_F16,
    "BF16": LlamaFileType.MOSTLY_BF16,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
    "Q4_0": LlamaFileType.MOSTLY_Q4_0,
    "Q4_1": LlamaFileType.MOSTLY_Q4_1,
}
PEAK = 3.0
"""Standard deviation of the logits. The most likely token has a probability of about 1/3."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer as in the keys of a GGUF file.

    `special` maps a key such as "eos" to its token. `space_prefix`: SentencePiece puts a space before a text.
    """

    model: str
    tokens: tuple[str, ...]
    types: tuple[TokenType, ...]
    special: Mapping[str, str]
    add_bos: bool
    merges: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    pre: str = "qwen2"
    space_prefix: bool = True


@dataclass(frozen=True, slots=True)
class Shape:
    """The hyperparameters of a model. `rope_base` is unusual, so that an engine that ignores it fails the tests."""

    arch: Arch = "llama"
    width: int = 64
    layers: int = 2
    heads: int = 2
    kv_heads: int = 1
    hidden: int = 128
    context: int = 512
    rope_base: float = 50000.0
    epsilon: float = 1e-5


def write_tiny(
    path: str | Path,
    arch: Arch = "llama",
    file_type: FileType = "F32",
    seed: int = 0,
    vocabulary: Literal["bytes", "spm"] = "bytes",
    *,
    add_bos: bool | None = None,
    infill: bool = True,
    context: int = 512,
    tied: bool = False,
    heads: int = 2,
    split: int = 0,
) -> Path:
    """Write a random model and return its path. `add_bos` is by default True for `spm` and False for `bytes`."""
    make = byte_vocabulary if vocabulary == "bytes" else piece_vocabulary
    words = make(infill=infill, add_bos=vocabulary == "spm" if add_bos is None else add_bos)
    shape = Shape(arch=arch, context=context, heads=heads)
    return write_model(path, shape, words, random_weights(shape, words, seed, tied), file_type, split=split)


def with_tokens(vocabulary: Vocabulary, *tokens: tuple[str, TokenType]) -> Vocabulary:
    """A copy of the vocabulary with more tokens at its end."""
    texts, types = zip(*tokens, strict=True) if tokens else ((), ())
    scores = vocabulary.scores and vocabulary.scores + (-1000.0,) * len(tokens)
    return replace(vocabulary, tokens=vocabulary.tokens + texts, types=vocabulary.types + types, scores=scores)


def write_vocabulary(path: str | Path, vocabulary: Vocabulary, name: str = "tiny", arch: str = "llama") -> Path:
    """Write a file without weights, from which only the vocabulary can be loaded."""
    writer = GGUFWriter(path, arch)
    writer.add_name(name)
    add_vocabulary(writer, vocabulary)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def byte_vocabulary(infill: bool, add_bos: bool) -> Vocabulary:
    """256 byte tokens with the byte as id, then the merges, then the special tokens."""
    alphabet = byte_alphabet()
    words = ("".join(alphabet[byte] for byte in word.encode()) for word in WORDS + BLANKS)
    merges = merge_chain(words)
    plain = (*alphabet, *(left + right for left, right in merges))
    special = {"bos": "<|endoftext|>", "eos": "<|endoftext|>"} | (INFILL if infill else {})
    control = tuple(dict.fromkeys(special.values()))
    types = (TokenType.NORMAL,) * len(plain) + (TokenType.CONTROL,) * len(control)
    joined = tuple(f"{left} {right}" for left, right in merges)
    return Vocabulary("gpt2", plain + control, types, special, add_bos, merges=joined)


def piece_vocabulary(infill: bool, add_bos: bool) -> Vocabulary:
    """<unk>, <s>, </s>, the infill tokens, 256 byte tokens, then pieces with descending scores."""
    special = {"unk": "<unk>", "bos": "<s>", "eos": "</s>"} | (INFILL if infill else {})
    byte_tokens = tuple(f"<0x{byte:02X}>" for byte in range(256))
    merges = merge_chain(word.replace(" ", "▁") for word in WORDS)
    pieces = (*(left + right for left, right in merges), *"▁.,!?'-", *ascii_letters)
    types = (
        (TokenType.UNKNOWN,)
        + (TokenType.CONTROL,) * (len(special) - 1)
        + (TokenType.BYTE,) * len(byte_tokens)
        + (TokenType.NORMAL,) * len(pieces)
    )
    tokens = (*special.values(), *byte_tokens, *pieces)
    first = len(tokens) - len(pieces)
    scores = tuple(float(min(0, first - token)) for token in range(len(tokens)))
    return Vocabulary("llama", tokens, types, special, add_bos, scores=scores)


def byte_alphabet() -> tuple[str, ...]:
    """The character of each byte in byte-level BPE: the byte's own if visible, else one from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(0x100, 0x200))
    return tuple(chr(byte if byte in visible else next(stand_ins)) for byte in range(256))


def merge_chain(words: Iterable[str]) -> list[tuple[str, str]]:
    """The merges that build each word from its left end, one character at a time."""
    steps = ((word[:end], word[end]) for word in words for end in range(1, len(word)))
    return list(dict.fromkeys(steps))


def random_weights(shape: Shape, vocabulary: Vocabulary, seed: int = 0, tied: bool = False) -> Weights:
    """Random weights. Special tokens have logit 0 unless `tied`, so greedy sampling hardly ever ends a text."""
    random = np.random.default_rng(seed)

    def normal(*size: int, scale: float = 1.0) -> NDArray[np.float32]:
        return scale * random.standard_normal(size, dtype=np.float32)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> NDArray[np.float32]:
        return normal(rows, columns, scale=gain / columns**0.5)

    size, width, keys = len(vocabulary.tokens), shape.width, shape.width // shape.heads * shape.kv_heads
    weights = {"token_embd.weight": normal(size, width)}
    for layer in range(shape.layers):
        parts = {
            "attn_norm.weight": 1 + normal(width, scale=0.1),
            "attn_q.weight": matrix(width, width),
            "attn_k.weight": matrix(keys, width),
            "attn_v.weight": matrix(keys, width, gain=2),
            "attn_output.weight": matrix(width, width),
            "ffn_norm.weight": 1 + normal(width, scale=0.1),
            "ffn_gate.weight": matrix(shape.hidden, width),
            "ffn_up.weight": matrix(shape.hidden, width),
            "ffn_down.weight": matrix(width, shape.hidden),
        }
        if shape.arch == "qwen2":
            lengths = {"q": width, "k": keys, "v": keys}
            parts |= {f"attn_{part}.bias": normal(length, scale=0.25) for part, length in lengths.items()}
        weights |= {f"blk.{layer}.{name}": weight for name, weight in parts.items()}
    # Both signs: with tied embeddings, positive weights would make every token repeat itself.
    weights["output_norm.weight"] = normal(width, scale=PEAK / width**0.5)
    if not tied:
        output = weights["output.weight"] = normal(size, width)
        output[[vocabulary.tokens.index(token) for token in vocabulary.special.values()]] = 0
    return weights


def write_model(
    path: str | Path,
    shape: Shape,
    vocabulary: Vocabulary,
    weights: Weights,
    file_type: FileType = "F32",
    *,
    split: int = 0,
) -> Path:
    """Write a GGUF file with these weights and return its path. Vectors stay F32, as in the files of real models.

    `split`: the most tensors per file; 0: write one file. If there are several files, the path is that of the first.
    """
    writer = GGUFWriter(path, shape.arch, split_max_tensors=split)
    add_shape(writer, shape, len(vocabulary.tokens))
    writer.add_file_type(FILE_TYPES[file_type])
    add_vocabulary(writer, vocabulary)
    for name, weight in weights.items():
        kind = GGMLQuantizationType[file_type if weight.ndim > 1 else "F32"]
        writer.add_tensor(name, quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (
        min(Path(path).parent.glob(f"{Path(path).stem}-00001-of-*.gguf"), default=Path(path)) if split else Path(path)
    )


def add_shape(writer: GGUFWriter, shape: Shape, size: int) -> None:
    writer.add_name(f"tiny-{shape.arch}")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.hidden)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.epsilon)
    writer.add_vocab_size(size)


def add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.model == "gpt2":
        writer.add_tokenizer_pre(vocabulary.pre)
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.space_prefix)
    for key, token in vocabulary.special.items():
        name = "unknown" if key == "unk" else key
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", vocabulary.tokens.index(token))
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(False)
