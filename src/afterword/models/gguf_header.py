"""The GGUF container: magic, typed values and the table of tensors, nothing believed before it fits the file.

Knows the format, not what a model is. Whatever the bytes, the answer is a Header or a SettingError. It reads
through a buffer, not a memory map: a file that is cut while we read it must be an error, not a SIGBUS.
"""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from afterword.errors import SettingError

# Number of a value type -> how it is stored; the two that are not numbers come after.
NUMBERS = {code: struct.Struct("<" + letter) for code, letter in enumerate("BbHhIif?  Qqd") if letter != " "}
STRING, ARRAY = 8, 9
U32, U64 = NUMBERS[4], NUMBERS[10]

# Number of a tensor type -> its name, elements in a block, bytes of a block.
TENSOR_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
    28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}  # fmt: skip

LOOKALIKES = (
    (b"PK\x03\x04", "a zip archive, such as a PyTorch checkpoint"),
    (b"\x80", "a Python pickle, such as an old PyTorch checkpoint"),
    (b"version https://git-lfs", "a Git LFS pointer that stands in for the real file"),
    (b"<", "a web page, such as the error page of a failed download"),
    (b"tjgg", "a model in the format that came before GGUF"),
    (b"lmgg", "a model in the format that came before GGUF"),
)

MAX_ENTRIES = 1 << 24  # the largest vocabularies have about a million
MAX_NAME = 1 << 16  # longer strings (chat templates) are stepped over, as are longer arrays of numbers
TOKENS = "tokenizer.ggml.tokens"  # the one array of strings that is kept

HeaderValue = int | float | str | tuple[int | float, ...]


@dataclass(frozen=True, slots=True)
class Header:
    """What one GGUF file says of itself.

    `lengths` are those of its arrays, in entries; `size` and `tensor_bytes` (per type name) are in bytes. `tokens` are
    the vocabulary's, as they are spelled in the file. `matrix_types` are those of tensors with two dimensions or more.
    """

    size: int
    values: Mapping[str, HeaderValue]
    lengths: Mapping[str, int]
    tensors: int
    tensor_bytes: Mapping[str, int]
    tokens: tuple[bytes, ...] = ()
    matrix_types: frozenset[str] = frozenset()


class MalformedError(Exception):
    """What is wrong with the file, as the end of a sentence that begins with the file's name."""


def read_header(path: Path) -> Header:
    """Read and check one file's header; SettingError if it is missing, no GGUF, or damaged."""
    try:
        if path.is_dir():
            raise MalformedError("is a folder, not a model file")
        if not path.is_file():
            raise MalformedError(
                "is no regular file" if path.exists() else describe_broken_link(path) or "does not exist"
            )
        with path.open("rb", buffering=1 << 20) as file:
            return _Reader(file, path.stat().st_size).header()
    except MalformedError as error:
        raise SettingError(f"{path} {error}.") from None
    except OSError as error:
        raise SettingError(f"{path} cannot be read: {error.strerror}.") from None


def describe_broken_link(path: Path) -> str | None:
    """Of a link that leads to no file: what it is, as the end of a sentence that begins with its name."""
    if os.path.islink(path) and not os.path.exists(path):
        return f"is a link to {os.readlink(path)}, which cannot be found"
    return None


class _Reader:
    """Steps through one open file and is the owner of its position; never past `size`."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.position = file, size, 0
        self.tokens: tuple[bytes, ...] = ()
        self.matrix_types: set[str] = set()

    def header(self) -> Header:
        self.check_format()
        tensors, pairs = self.number(U64), self.number(U64)
        self.check_count(pairs, 13, "values")
        self.check_count(tensors, 24, "tensors")
        values: dict[str, HeaderValue] = {}
        lengths: dict[str, int] = {}
        for _ in range(pairs):
            key = self.name()
            if key in values or key in lengths:
                raise MalformedError(f"is damaged: {key!r} is given twice")
            kind = self.number(U32)
            if kind == ARRAY:
                lengths[key] = self.array(key, values)
            else:
                values[key] = self.value(kind, key)
        sizes = self.tensor_table(tensors, values.get("general.alignment", 32))
        return Header(self.size, values, lengths, tensors, sizes, self.tokens, frozenset(self.matrix_types))

    def check_format(self) -> None:
        start = self.file.read(64)
        if start[:4] != b"GGUF":
            raise MalformedError(f"is not a GGUF file{_lookalike(start)}")
        self.file.seek(4)
        self.position = 4
        version = self.number(U32)
        if version not in (2, 3):
            swapped = version.to_bytes(4, "little")[:3] == bytes(3)
            note = "is big-endian" if swapped else f"has GGUF version {version}"
            raise MalformedError(f"{note}, and only little-endian files of versions 2 and 3 can be read")

    def check_count(self, count: int, least: int, what: str) -> None:
        """Refuse a count whose entries, of at least `least` bytes each, cannot be in the rest of the file."""
        if count > MAX_ENTRIES:
            raise MalformedError(f"is damaged: it claims {count} {what}")
        self.check_room(count * least)

    def check_room(self, length: int) -> None:
        if length > self.size - self.position:
            raise MalformedError(_cut_short(self.position + length, self.size))

    def take(self, length: int) -> bytes:
        self.check_room(length)
        data = self.file.read(length)
        if len(data) < length:
            raise MalformedError("changed while it was read")
        self.position += length
        return data

    def skip(self, length: int) -> None:
        self.check_room(length)
        self.position = self.file.seek(self.position + length)

    def number(self, shape: struct.Struct) -> int:
        value: int = shape.unpack(self.take(shape.size))[0]
        return value

    def name(self) -> str:
        length = self.number(U64)
        if not 0 < length <= MAX_NAME:
            raise MalformedError(f"is damaged: a name of {length} bytes at byte {self.position}")
        return self.take(length).decode("utf-8", "replace")

    def value(self, kind: int, key: str) -> HeaderValue:
        if kind == STRING:
            length = self.number(U64)
            if length <= MAX_NAME:
                return self.take(length).decode("utf-8", "replace")
            self.skip(length)
            return ""
        shape = _number_shape(kind, key)
        content: int | float = shape.unpack(self.take(shape.size))[0]
        return content

    def array(self, key: str, values: dict[str, HeaderValue]) -> int:
        """Step over an array, a short one of numbers is kept in `values`; returns its length."""
        kind, count = self.number(U32), self.number(U64)
        if kind == STRING:
            self.check_count(count, 8, f"entries of {key!r}")
            if key == TOKENS:
                self.tokens = tuple(self.take(self.number(U64)) for _ in range(count))
            else:
                self.skip_strings(count)
        else:
            shape = _number_shape(kind, key)
            self.check_count(count, shape.size, f"entries of {key!r}")
            if count * shape.size <= MAX_NAME:
                values[key] = tuple(entry for (entry,) in shape.iter_unpack(self.take(count * shape.size)))
            else:
                self.skip(count * shape.size)
        return count

    def skip_strings(self, count: int) -> None:
        # The one hot loop (a vocabulary's merges): local names, no calls of our own.
        read, seek, unpack = self.file.read, self.file.seek, U64.unpack
        size, position = self.size, self.position
        for _ in range(count):
            prefix = read(8)
            if len(prefix) < 8:
                raise MalformedError(_cut_short(position + 8, size))
            (length,) = unpack(prefix)
            position += 8 + length
            if position > size:
                raise MalformedError(_cut_short(position, size))
            seek(length, 1)
        self.position = position

    def tensor_table(self, count: int, alignment: HeaderValue) -> Counter[str]:
        """Check that the tensors follow one another without gap or overlap and end inside the file."""
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise MalformedError(f"is damaged: its alignment {alignment!r} is no power of two")
        sizes: Counter[str] = Counter()
        names: set[str] = set()
        end = due = 0  # offsets in the tensor data: end of the last tensor, and where the next has to begin
        for _ in range(count):
            name = self.name()
            type_name, size = self.tensor_size(name)
            offset = self.number(U64)
            if name in names or offset != due:
                raise MalformedError(f"is damaged: tensor {name!r} is given twice or is not where it should be")
            names.add(name)
            sizes[type_name] += size
            end = offset + size
            due = _padded(end, alignment)
        expected = _padded(self.position, alignment) + end
        if count and expected > self.size:
            raise MalformedError(_cut_short(expected, self.size))
        return sizes

    def tensor_size(self, name: str) -> tuple[str, int]:
        """Read one tensor's shape and type: the type's name, and the tensor's size in bytes."""
        dimensions = self.number(U32)
        if dimensions > 4:
            raise MalformedError(f"is damaged: tensor {name!r} has {dimensions} dimensions")
        shape = [self.number(U64) for _ in range(dimensions)] or [1]
        code = self.number(U32)
        if code not in TENSOR_TYPES:
            raise MalformedError(f"stores tensor {name!r} as type {code}, which is not known here")
        type_name, block, block_bytes = TENSOR_TYPES[code]
        if shape[0] % block:
            raise MalformedError(f"is damaged: rows of tensor {name!r} are not whole blocks of {type_name}")
        if dimensions > 1:
            self.matrix_types.add(type_name)
        elements = 1
        for length in shape:
            elements *= length
        return type_name, elements // block * block_bytes


def _number_shape(kind: int, key: str) -> struct.Struct:
    if kind not in NUMBERS:
        raise MalformedError(f"is damaged: {key!r} has a value of unknown type {kind}")
    return NUMBERS[kind]


def _padded(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _cut_short(expected: int, found: int) -> str:
    return f"is damaged or cut short: at least {expected} bytes expected, {found} found"


def _lookalike(start: bytes) -> str:
    if not start:
        return ": it is empty"
    if start[8:9] == b"{":
        return "; it seems to be a safetensors file"
    for magic, what in LOOKALIKES:
        if start.lstrip().startswith(magic):
            return f"; it seems to be {what}"
    return ""
