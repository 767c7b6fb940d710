"""Reads facts about a model from its GGUF header: architecture, sizes, memory per token.

The module knows the metadata keys and the naming of split models. It loads no weights, so an unusable file is refused
with a message within a fraction of a second, before a worker loads it. `gguf_checks` holds the checks for headers that
would abort the worker.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from afterword.errors import NotLanguageModel, SettingError
from afterword.models.gguf_checks import check_gguf
from afterword.models.gguf_header import TOKENS, Header, read_header
from afterword.models.supported_architectures import check_supported

FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S",
    12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K",
    19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL",
    26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0",
    37: "TQ2_0", 38: "MXFP4", 39: "NVFP4", 40: "Q1_0", 41: "Q2_0",
}  # fmt: skip

STATE_BYTES = 4
"""Bytes of one element of a recurrent layer's state."""

AUDIO = frozenset(("wavtokenizer-dec", "qwen3tts", "pockettts"))
"""Architectures of llama.cpp that generate audio or codes for audio."""

ATTENTION_INTERVALS = {"minimax-01": 8, **dict.fromkeys(("qwen3next", "qwen35", "qwen35moe", "qwen4exp"), 4)}
"""Every n-th layer has attention, in llama.cpp, if the file does not say which."""
LIGHTNING = "minimax-01"  # its recurrent layers keep one square matrix for each head
SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Facts:
    """Facts from a model's file. Lengths are in tokens or elements; a number that differs by layer is the largest.

    `kv_heads`: the heads of keys and values of all layers together. `state_bytes`: the constant memory of one sequence
    in recurrent layers (Mamba, RWKV, short convolutions), in addition to keys and values.
    """

    architecture: str
    name: str
    file_type: str  # the quantization that the file names, such as "Q8_0"
    context_length: int  # tokens it was trained on; 0 if the file does not say
    layers: int
    embedding_length: int
    experts: int  # 0 if every weight is used for every token
    heads: int
    heads_kv: int
    kv_heads: int
    hidden: int  # elements of the feed-forward layer (`feed_forward_length`); 0 if the file does not say
    state_bytes: int
    key_length: int
    value_length: int  # with MLA the values are a part of the keys: then that of an index of the keys, 0 without one
    vocabulary: int  # tokens; 0 if the file does not say
    size_bytes: int  # all parts together
    tensor_count: int
    split_count: int
    matrix_types: frozenset[str] = frozenset()  # the actual types of the matrices; `file_type` may differ

    def kv_bytes_per_token(self, bytes_per_element: int = 2) -> int:
        """Bytes of KV cache for one token; an upper bound if the head sizes differ between layers.

        Layers with a sliding window count like the others, because llama.cpp keeps whole contexts for them too.
        """
        return self.kv_heads * (self.key_length + self.value_length) * bytes_per_element


def read_facts(path: Path | str) -> Facts:
    """Read a model's facts from its (first) file. Raises `SettingError` if the model cannot be used."""
    path = Path(path)
    first = read_header(path)
    keys = _Keys(path, first)
    keys.check_kind()
    split_count = keys.check_split()
    keys.check_text()
    check_supported(path, keys.architecture, first)
    check_gguf(path, keys.architecture, first)
    later = (_part(path, number, split_count) for number in range(2, split_count + 1))
    headers = [first, *map(read_header, later)]
    tensor_count = sum(header.tensors for header in headers)
    if tensor_count == 0:
        raise NotLanguageModel(f"{path} holds a vocabulary but no weights.")
    heads = keys.number("attention.head_count", 0)
    embedding = keys.number("embedding_length")
    head_length = embedding // heads if heads else 0
    return Facts(
        architecture=keys.architecture,
        name=keys.text("general.name") or split_stem(path.name),
        file_type=_file_type(headers),
        context_length=keys.number("context_length", 0),
        layers=keys.number("block_count"),
        embedding_length=embedding,
        experts=keys.number("expert_count", 0),
        heads=heads,
        heads_kv=keys.number("attention.head_count_kv", heads),
        kv_heads=sum(keys.heads_kv(heads)[: keys.layers_with_own_keys()]),
        hidden=keys.number("feed_forward_length", 0),
        state_bytes=STATE_BYTES * keys.recurrent_layers(heads) * keys.state_length(heads),
        key_length=keys.number("attention.key_length", head_length),
        value_length=keys.value_length(head_length),
        vocabulary=_vocabulary(keys),
        size_bytes=sum(header.size for header in headers),
        tensor_count=tensor_count,
        split_count=split_count,
        matrix_types=frozenset().union(*(header.matrix_types for header in headers)),
    )


def parts(path: Path, facts: Facts) -> list[Path]:
    """All files of the model with the (first) file `path`, by the same rule as in llama.cpp."""
    return [path, *(_part(path, number, facts.split_count) for number in range(2, facts.split_count + 1))]


def split_stem(name: str) -> str:
    """A file's name without `.gguf` and without the number of its part."""
    match = SPLIT_NAME.fullmatch(name)
    return match["stem"] if match else Path(name).stem


def part_names(name: str) -> list[str]:
    """The names of all files of a model. `name`: the path or name of its first file."""
    match = SPLIT_NAME.fullmatch(name)
    if not match:
        return [name]
    stem, count = match["stem"], match["count"]
    return [f"{stem}-{part:05}-of-{count}{name[-5:]}" for part in range(1, int(count) + 1)]


def is_later_part(name: str) -> bool:
    """Whether `name` is a file of a split model other than the first."""
    match = SPLIT_NAME.fullmatch(name)
    return match is not None and int(match["part"]) != 1


class _Keys:
    """Typed access to the values of one header. Raises `SettingError` for a missing or invalid value."""

    def __init__(self, path: Path, header: Header) -> None:
        self.path, self.header = path, header
        self.architecture = self.text("general.architecture")

    def text(self, key: str) -> str:
        value = self.header.values.get(key)
        return value if isinstance(value, str) else ""

    def number(self, key: str, default: int | None = None) -> int:
        """The count under `<architecture>.<key>`; the largest if it is given per layer."""
        return self.count(f"{self.architecture}.{key}", default)

    def count(self, key: str, default: int | None = None) -> int:
        value = self.header.values.get(key, default)
        largest = max(value, default=0) if isinstance(value, tuple) else value
        if not isinstance(largest, int) or largest < 0 or (default is None and largest == 0):
            raise SettingError(f"{self.path} has no valid value for the metadata key {key!r}.")
        return int(largest)

    def heads_kv(self, heads: int) -> list[int]:
        """The heads of keys and values of each layer; 0 for a layer without attention."""
        layers = self.number("block_count")
        given = self.header.values.get(f"{self.architecture}.attention.head_count_kv", heads)
        if isinstance(given, tuple) and len(given) == layers:
            return [int(count) for count in given]
        most = self.number("attention.head_count_kv", heads)
        recurrent = self.header.values.get(f"{self.architecture}.attention.recurrent_layers")
        if isinstance(recurrent, tuple) and len(recurrent) == layers:
            return [0 if each else most for each in recurrent]
        every = self.number("full_attention_interval", ATTENTION_INTERVALS.get(self.architecture, 1)) or 1
        return [most if number % every == 0 else 0 for number in range(1, layers + 1)]

    def layers_with_own_keys(self) -> int:
        """The number of layers that store keys and values; the last of Gemma 3n and 4 use those of earlier ones."""
        return max(0, self.number("block_count") - self.number("attention.shared_kv_layers", 0))

    def value_length(self, head_length: int) -> int:
        """Elements that a head stores for a token beside its key. llama.cpp's `is_mla` decides in the same way."""
        if self.number("attention.key_length_mla", 0) and self.number("attention.value_length_mla", 0):
            return self.number("attention.indexer.key_length", 0)
        return self.number("attention.value_length", head_length)

    def recurrent_layers(self, heads: int) -> int:
        """The number of layers that may be recurrent: those without attention, or all layers if each has attention."""
        return self.heads_kv(heads).count(0) or self.number("block_count")

    def state_length(self, heads: int) -> int:
        """Elements that a recurrent layer stores for a sequence: the last inputs of its convolution, and its state."""
        width = self.number("embedding_length")
        inner, states, groups = (self.number(f"ssm.{name}", 0) for name in ("inner_size", "state_size", "group_count"))
        kept = max(0, self.number("ssm.conv_kernel", 0) - 1)
        delta, cells = self.number("kda.head_dim", 0), self.number("wkv.head_size", 0)
        if self.architecture == LIGHTNING:
            return heads * self.number("attention.key_length", width // max(1, heads)) ** 2
        return (
            kept * (inner + 2 * groups * states + 3 * heads * delta)
            + (states * inner + heads * delta * delta)
            + width * (cells + self.number("token_shift_count", 2) if cells else 0)
            + width * max(0, self.number("shortconv.l_cache", 0) - 1)
        )

    def check_kind(self) -> None:
        kind = "projector" if self.architecture == "clip" else self.text("general.type") or "model"
        if kind != "model":
            raise NotLanguageModel(f"{self.path} is no language model but of the type {kind!r}.")

    def check_text(self) -> None:
        """Raise `SettingError` if the model's output is not text."""
        if self.architecture in AUDIO:
            raise SettingError(
                f"{self.path} generates audio ({self.architecture}). Only models that generate text can be served."
            )
        if self.text("tokenizer.ggml.model") in ("none", "no_vocab"):
            raise SettingError(f"{self.path} has no vocabulary, so its tokens cannot be converted to text.")

    def check_split(self) -> int:
        """The number of the model's files. Raises `SettingError` if this file is not the first of them."""
        count = max(1, self.count("split.count", 1))
        if self.count("split.no", 0) > 0:
            first = _part(self.path, 1, count).name
            raise SettingError(f"{self.path} is a later part of a split model. Name its first part, {first}.")
        if not self.architecture:
            raise SettingError(f"{self.path} does not name its architecture.")
        return count


def _part(path: Path, part: int, count: int) -> Path:
    return path.with_name(f"{split_stem(path.name)}-{part:05}-of-{count:05}.gguf")


def _file_type(headers: list[Header]) -> str:
    code = headers[0].values.get("general.file_type")
    if isinstance(code, int) and code in FILE_TYPES:
        return FILE_TYPES[code]
    sizes: Counter[str] = Counter()
    for header in headers:
        sizes.update(header.tensor_bytes)
    return sizes.most_common(1)[0][0]


def _vocabulary(keys: _Keys) -> int:
    tokens = keys.header.lengths.get(TOKENS)
    return keys.number("vocab_size", 0) if tokens is None else tokens
