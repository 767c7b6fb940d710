"""Writes tiny GGUF files for the tests, according to the specification of the format and without Afterword's code."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path

F32, Q8_0 = 0, 8
BLOCKS = {F32: (1, 4), Q8_0: (32, 34), 9: (32, 40), 26: (1, 4), 28: (1, 8)}  # elements and bytes of a block

VALUES: Mapping[str, object] = {
    "general.architecture": "llama",
    "general.name": "Tiny",
    "general.file_type": 7,
    "llama.context_length": 256,
    "llama.embedding_length": 32,
    "llama.block_count": 2,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.tokens": ["<s>", "</s>", "a", "b", "ab"],
    "tokenizer.ggml.scores": [0.0, 0.0, -1.0, -2.0, -3.0],
    "tokenizer.ggml.add_bos_token": True,
}
TENSORS: dict[str, tuple[tuple[int, ...], int]] = {
    "token_embd.weight": ((32, 5), Q8_0),
    "output_norm.weight": ((32,), F32),
    "blk.0.attn_q.weight": ((32, 32), Q8_0),
}


def string(text: str) -> bytes:
    """A GGUF string: the length and the bytes."""
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def value(content: object) -> tuple[int, bytes]:
    """The GGUF type code of a Python value, and the value's bytes."""
    match content:
        case bool():
            return 7, struct.pack("<?", content)
        case int():
            return (4, struct.pack("<I", content)) if 0 <= content < 1 << 32 else (11, struct.pack("<q", content))
        case float():
            return 6, struct.pack("<f", content)
        case str():
            return 8, string(content)
        case list():
            kinds, entries = zip(*map(value, content), strict=True)
            return 9, struct.pack("<IQ", kinds[0], len(content)) + b"".join(entries)
    raise TypeError(content)


def gguf(
    changes: Mapping[str, object] | None = None,
    tensors: Mapping[str, tuple[tuple[int, ...], int]] = TENSORS,
    *,
    values: Mapping[str, object] = VALUES,
    version: int = 3,
) -> bytes:
    """A complete file: `values` with `changes` (None removes a value), and tensors of zeros."""
    pairs = {key: content for key, content in {**values, **(changes or {})}.items() if content is not None}
    header = struct.pack("<4sIQQ", b"GGUF", version, len(tensors), len(pairs))
    for key, content in pairs.items():
        kind, data = value(content)
        header += string(key) + struct.pack("<I", kind) + data
    data = b""
    for name, (shape, kind) in tensors.items():
        elements, size = BLOCKS[kind]
        data += bytes(-len(data) % 32)
        header += string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, len(data))
        data += bytes(math.prod(shape) // elements * size)
    return header + bytes(-len(header) % 32 if tensors else 0) + data


def write(path: Path, data: bytes) -> Path:
    """Write a file, and create its parent folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def cache(home: Path, repository: str, revision: str, names: list[str], *, current: bool = True) -> Path:
    """Create files in a Hub cache below `home`, as a download does. Returns the folder of the revision."""
    folder = home / "hub" / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / revision
    for number, name in enumerate(names):
        blob = write(folder / "blobs" / f"{revision}{number}", gguf())
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blob)
    if current:
        write(folder / "refs" / "main", revision.encode())
    return snapshot
