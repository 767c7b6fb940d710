"""Reads the header of a GGUF file: magic, typed values and the table of tensors.

The module knows the file format and must not know models. For any bytes it returns a `Header` or raises `SettingError`:
it checks every length against the size of the file. It reads through a buffer instead of a memory map, because a file
that is truncated meanwhile must cause an error and not a SIGBUS.
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

# Code of a numeric value type -> its layout. The two other types follow.
NUMBERS = {code: struct.Struct("<" + letter) for code, letter in enumerate("BbHhIif?  Qqd") if letter != " "}
STRING, ARRAY = 8, 9
U32, U64 = NUMBERS[4], NUMBERS[10]

# Code of a tensor type -> its name, elements of a block, bytes of a block.
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

OTHER_FORMATS = (
    (b"PK\x03\x04", "a zip archive, such as a PyTorch checkpoint"),
    (b"\x80", "a Python pickle, such as an old PyTorch checkpoint"),
    (b"version https://git-lfs", "a Git LFS pointer instead of the real file"),
    (b"<", "a web page, such as the error page of a failed download"),
    (b"tjgg", "a model in the format before GGUF"),
    (b"lmgg", "a model in the format before GGUF"),
)

MAX_ENTRIES = 1 << 24  # the largest vocabularies have about a million
MAX_NAME = 1 << 16  # bytes; longer strings (chat templates) and longer arrays of numbers are skipped
TOKENS = "tokenizer.ggml.tokens"  # the only array of strings that is kept

HeaderValue = int | float | str | tuple[int | float, ...]


@dataclass(frozen=True, slots=True)
class Header:
    """The header of one GGUF file.

    - `size`: bytes of the file.
    - `values`: metadata; a string above `MAX_NAME` bytes is empty, such an array and any array of strings is missing.
    - `lengths`: the number of entries of each array.
    - `tensors`: the number of tensors; `tensor_bytes`: bytes by the name of the tensor type.
    - `tokens`: the texts of the vocabulary as spelled in the file.
    - `matrix_types`: the types of tensors with two dimensions or more.
    """

    size: int
    values: Mapping[str, HeaderValue]
    lengths: Mapping[str, int]
    tensors: int
    tensor_bytes: Mapping[str, int]
    tokens: tuple[bytes, ...] = ()
    matrix_types: frozenset[str] = frozenset()


class MalformedError(Exception):
    """A problem of the file. The message is the predicate of a sentence that begins with the file's name."""


def read_header(path: Path) -> Header:
    """Read and check one file's header. Raises `SettingError` if the file is missing, not GGUF, or damaged."""
    try:
        if path.is_dir():
            raise MalformedError("is a folder, not a model file")
        if not path.is_file():
            raise MalformedError(
                "is not a regular file" if path.exists() else describe_broken_link(path) or "does not exist"
            )
        with path.open("rb", buffering=1 << 20) as file:
            return _Reader(file, path.stat().st_size).header()
    except MalformedError as error:
        raise SettingError(f"{path} {error}.") from None
    except OSError as error:
        raise SettingError(f"{path} cannot be read: {error.strerror}.") from None


def describe_broken_link(path: Path) -> str | None:
    """For a broken link, the predicate of a sentence that begins with its name; None for other paths."""
    if os.path.islink(path) and not os.path.exists(path):
        return f"is a link to {os.readlink(path)}, which cannot be found"
    return None


class _Reader:
    """Reads one open file sequentially and owns its position, which never exceeds `size`."""

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
            raise MalformedError(f"is not a GGUF file{_other_format(start)}")
        self.file.seek(4)
        self.position = 4
        version = self.number(U32)
        if version not in (2, 3):
            swapped = version.to_bytes(4, "little")[:3] == bytes(3)
            note = "is big-endian" if swapped else f"has GGUF version {version}"
            raise MalformedError(f"{note}, but only little-endian files of versions 2 and 3 can be read")

    def check_count(self, count: int, least: int, what: str) -> None:
        """Refuse a count of entries that cannot fit into the rest of the file. `least`: the minimum bytes of one."""
        if count > MAX_ENTRIES:
            raise MalformedError(f"is damaged: it claims {count} {what}")
        self.check_remaining(count * least)

    def check_remaining(self, length: int) -> None:
        if length > self.size - self.position:
            raise MalformedError(_too_short(self.position + length, self.size))

    def take(self, length: int) -> bytes:
        self.check_remaining(length)
        data = self.file.read(length)
        if len(data) < length:
            raise MalformedError("changed while it was read")
        self.position += length
        return data

    def skip(self, length: int) -> None:
        self.check_remaining(length)
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
        """Read an array and return its length. Short arrays of numbers are kept in `values`, other arrays skipped."""
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
        # The only hot loop (a vocabulary's merges), so it uses local variables and calls no methods of this class.
        read, seek, unpack = self.file.read, self.file.seek, U64.unpack
        size, position = self.size, self.position
        for _ in range(count):
            prefix = read(8)
            if len(prefix) < 8:
                raise MalformedError(_too_short(position + 8, size))
            (length,) = unpack(prefix)
            position += 8 + length
            if position > size:
                raise MalformedError(_too_short(position, size))
            seek(length, 1)
        self.position = position

    def tensor_table(self, count: int, alignment: HeaderValue) -> Counter[str]:
        """Check that the tensors are contiguous and end inside the file. Returns their bytes by type name."""
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise MalformedError(f"is damaged: its alignment {alignment!r} is not a power of two")
        sizes: Counter[str] = Counter()
        names: set[str] = set()
        end = due = 0  # offsets in the tensor data: the end of the last tensor, the required start of the next
        for _ in range(count):
            name = self.name()
            type_name, size = self.tensor_size(name)
            offset = self.number(U64)
            if name in names or offset != due:
                raise MalformedError(f"is damaged: tensor {name!r} is given twice or is not at the expected offset")
            names.add(name)
            sizes[type_name] += size
            end = offset + size
            due = _padded(end, alignment)
        expected = _padded(self.position, alignment) + end
        if count and expected > self.size:
            raise MalformedError(_too_short(expected, self.size))
        return sizes

    def tensor_size(self, name: str) -> tuple[str, int]:
        """Read one tensor's shape and type. Returns the type's name and the tensor's size in bytes."""
        dimensions = self.number(U32)
        if dimensions > 4:
            raise MalformedError(f"is damaged: tensor {name!r} has {dimensions} dimensions")
        shape = [self.number(U64) for _ in range(dimensions)] or [1]
        code = self.number(U32)
        if code not in TENSOR_TYPES:
            raise MalformedError(f"stores tensor {name!r} as type {code}, which Afterword does not know")
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


def _too_short(expected: int, found: int) -> str:
    return f"is damaged or cut short: at least {expected} bytes expected, {found} found"


def _other_format(start: bytes) -> str:
    if not start:
        return ": it is empty"
    if start[8:9] == b"{":
        return "; it seems to be a safetensors file"
    for magic, what in OTHER_FORMATS:
        if start.lstrip().startswith(magic):
            return f"; it seems to be {what}"
    return ""
