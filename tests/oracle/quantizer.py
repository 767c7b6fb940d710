"""Converts the weights of model files to other types, with the function of ggml that every llama.cpp exports.

A file of `Q4_K_M` and its like has several types. `MIXTURES` states which matrices get a better one than most, as in
published files without an importance matrix; further exceptions for Falcon and for eight experts are left out. One
matrix is held at a time. Must not import pytest: the benchmark uses this module too.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFReader, GGUFWriter, LlamaFileType, ReaderTensor
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from numpy.typing import NDArray

from afterword.engine.llama.library import native

PART = 1 << 20  # weights that a thread converts at a time; they are F32 meanwhile
QUANTIZATION_VERSION = 2  # of the layouts of blocks, as files state it

Layers = Callable[[int, int], bool]
"""Whether the matrix with this number, of so many of its role, gets the better type."""


def _all(_number: int, _count: int) -> bool:
    return True


def _first(divisor: int) -> Layers:
    return lambda number, count: number < count // divisor


def _spread(number: int, count: int) -> bool:
    """The first and the last eighth, and every third one between them."""
    eighth = count // 8
    return number < eighth or number >= 7 * count // 8 or (number - eighth) % 3 == 2


@dataclass(frozen=True, slots=True)
class Better:
    """A type for some of the matrices with a role. `sharing`: only where at least so many heads share a value head."""

    role: str
    kind: Kind
    layers: Layers = _all
    sharing: int = 0


# The roles of the matrices that are sensitive to rounding, by a part of their names.
ROLES = {"attn_v.": "values", "attn_qkv.": "values", "attn_kv_b.": "values", "ffn_down": "down", "attn_output.": "out"}
# The type of most matrices, and the better ones; the first that applies counts. By the name of the file's type.
MIXTURES: Mapping[str, tuple[Kind, tuple[Better, ...]]] = {
    **{kind.name: (kind, ()) for kind in (Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q6_K)},
    **{kind.name: (kind, ()) for kind in (Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1)},
    "MXFP4_MOE": (Kind.Q8_0, (Better("experts", Kind.MXFP4),)),
    "Q2_K": (
        Kind.Q2_K,
        (
            Better("values", Kind.Q4_K, sharing=4),
            *(Better(role, Kind.Q3_K) for role in ("values", "down", "out")),
        ),
    ),
    "Q3_K_S": (Kind.Q3_K, ()),
    "Q3_K_M": (
        Kind.Q3_K,
        (
            Better("values", Kind.Q5_K, lambda number, _: number < 2),
            Better("down", Kind.Q5_K, _first(16)),
            *(Better(role, Kind.Q4_K) for role in ("values", "down", "out")),
        ),
    ),
    "Q3_K_L": (Kind.Q3_K, tuple(Better(role, Kind.Q5_K) for role in ("values", "down", "out"))),
    "Q4_K_S": (
        Kind.Q4_K,
        (Better("values", Kind.Q5_K, lambda number, _: number < 4), Better("down", Kind.Q5_K, _first(8))),
    ),
    "Q4_K_M": (Kind.Q4_K, (Better("values", Kind.Q6_K, _spread), Better("down", Kind.Q6_K, _spread))),
    "Q5_K_S": (Kind.Q5_K, ()),
    "Q5_K_M": (Kind.Q5_K, (Better("values", Kind.Q6_K, _spread), Better("down", Kind.Q6_K, _spread))),
    "IQ3_S": (Kind.IQ3_S, (Better("values", Kind.Q4_K, sharing=4),)),
    "IQ3_M": (
        Kind.IQ3_S,
        (Better("values", Kind.Q4_K), Better("out", Kind.Q4_K), Better("down", Kind.Q4_K, _first(8))),
    ),
    **{
        kind.name: (kind, (Better("values", Kind.Q5_K, sharing=4), Better("down", Kind.Q5_K, _first(8))))
        for kind in (Kind.IQ4_NL, Kind.IQ4_XS)
    },
}
# What a matrix gets whose rows are no whole number of blocks of 256.
NARROW = {
    **dict.fromkeys((Kind.Q2_K, Kind.Q3_K), Kind.Q4_0),
    **dict.fromkeys((Kind.IQ3_S, Kind.IQ4_XS), Kind.IQ4_NL),
    **{Kind.Q4_K: Kind.Q5_0, Kind.Q5_K: Kind.Q5_1, Kind.Q6_K: Kind.Q8_0},
}
FLOATS = (Kind.F32, Kind.F16, Kind.BF16)
# Small matrices, or such that choose experts: files of every type have them as they are.
KEPT = re.compile(r"_norm\.|ffn_gate_inp\.|conv1d\.|shortconv\.conv\.|time_mix_|altup|laurel|per_layer_model_proj")


def quantize(source: Path, target: Path, name: str, *, pure: bool = False) -> Path:
    """Write the model in `source` with other weights to `target`, and return `target`.

    `name`: a key of `MIXTURES`. `pure`: all matrices get the same type. Raises `ValueError` for another name.
    """
    if name not in MIXTURES:
        raise ValueError(f"Type {name} is not known, or needs an importance matrix. Known: {', '.join(MIXTURES)}.")
    reader = GGUFReader(source)
    kinds = _kinds(reader, name, pure)
    writer = GGUFWriter(target, _value(reader, "general.architecture"))
    _copy_keys(reader, writer, name)
    for tensor in reader.tensors:
        block, size = GGML_QUANT_SIZES[kinds[tensor.name]]
        shape = [int(extent) for extent in reversed(tensor.shape)]
        writer.add_tensor_info(
            tensor.name, shape, np.dtype(np.float32), prod(shape) // block * size, kinds[tensor.name]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        writer.write_tensor_data(_converted(tensor, kinds[tensor.name]))
    writer.close()
    return target


def _kinds(reader: GGUFReader, name: str, pure: bool) -> dict[str, Kind]:
    """The type of each tensor of the new file, by the tensor's name."""
    usual, better = MIXTURES[name]
    matrices = [tensor for tensor in reader.tensors if _is_converted(tensor)]
    chosen = {tensor.name: Kind.MXFP4 if pure and name == "MXFP4_MOE" else usual for tensor in matrices}
    if usual not in FLOATS and not pure:
        tied = all(tensor.name != "output.weight" for tensor in matrices)
        chosen |= _sensitive(matrices, better, _sharing(reader))
        head = "token_embd.weight" if tied else "output.weight"
        chosen |= {each.name: _head_kind(each, usual) for each in matrices if each.name == head}
    return {
        tensor.name: _fitting(tensor, chosen[tensor.name]) if tensor.name in chosen else Kind(tensor.tensor_type)
        for tensor in reader.tensors
    }


def _sensitive(matrices: list[ReaderTensor], better: tuple[Better, ...], sharing: float) -> dict[str, Kind]:
    """The matrices that get a better type than most, with this type."""
    chosen = {}
    for each in reversed(better):  # so that the first one counts
        names = [tensor.name for tensor in matrices if each.role in _roles(tensor)]
        fits = [name for number, name in enumerate(names) if each.layers(number, len(names))]
        chosen |= dict.fromkeys(fits if sharing >= each.sharing else (), each.kind)
    return chosen


def _roles(tensor: ReaderTensor) -> set[str]:
    roles = {role for part, role in ROLES.items() if part in tensor.name}
    return roles | {"experts"} if len(tensor.shape) > 2 else roles


def _is_converted(tensor: ReaderTensor) -> bool:
    return len(tensor.shape) > 1 and tensor.name.endswith(".weight") and not KEPT.search(tensor.name)


def _head_kind(tensor: ReaderTensor, usual: Kind) -> Kind:
    """The type of the matrix that computes the logits."""
    fits = int(tensor.shape[0]) % GGML_QUANT_SIZES[usual][0] == 0
    return Kind.Q6_K if fits and usual != Kind.Q8_0 else Kind.Q8_0


def _fitting(tensor: ReaderTensor, kind: Kind) -> Kind:
    """`kind`, or what replaces it for rows of this length."""
    for each in (kind, NARROW.get(kind, kind)):
        if int(tensor.shape[0]) % GGML_QUANT_SIZES[each][0] == 0:
            return each
    return Kind.F16


def _sharing(reader: GGUFReader) -> float:
    """How many heads share a value head; 1 if the numbers differ from layer to layer."""
    prefix = _value(reader, "general.architecture")
    heads, shared = (_value(reader, f"{prefix}.attention.head_count{end}") for end in ("", "_kv"))
    return heads / shared if isinstance(heads, int) and isinstance(shared, int) and shared else 1


def _value(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    return field.contents() if field else None


def _copy_keys(reader: GGUFReader, writer: GGUFWriter, name: str) -> None:
    renewed = ("general.architecture", "general.file_type", "general.quantization_version")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in renewed:
            kind, *inner = field.types
            writer.add_key_value(key, field.contents(), kind, inner[-1] if inner else None)
    writer.add_file_type(LlamaFileType["ALL_F32" if name == "F32" else f"MOSTLY_{name}"])
    writer.add_quantization_version(QUANTIZATION_VERSION)


def _converted(tensor: ReaderTensor, kind: Kind) -> NDArray[Any]:
    """The weights with another type, as bytes."""
    source = Kind(tensor.tensor_type)
    if source == kind:
        return np.ascontiguousarray(tensor.data)
    rows = tensor.data.reshape(-1, tensor.data.shape[-1])
    length = int(tensor.shape[0])
    block, size = GGML_QUANT_SIZES[kind]
    made = np.empty((len(rows), length // block * size), np.uint8)
    step = max(1, PART // length)

    def convert(start: int) -> None:
        floats = np.ascontiguousarray(dequantize(rows[start : start + step], source), np.float32)
        part = made[start : start + step]
        _quantize_chunk()(kind, floats.ctypes.data, part.ctypes.data, 0, len(floats), length, None)

    with ThreadPoolExecutor() as threads:
        list(threads.map(convert, range(0, len(rows), step)))
    return made


@cache
def _quantize_chunk() -> Callable[..., int]:
    """ggml's function: type, floats, result, the first of the weights, rows, weights in a row, importance matrix."""
    types = (ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
    prototype = ctypes.CFUNCTYPE(ctypes.c_size_t, *types, ctypes.c_void_p)
    return prototype(("ggml_quantize_chunk", native.handle))
