"""Writes tiny random models of any form of an architecture (`forms.FORMS`), and files that have only its keys.

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
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

from afterword.engine.llama import library
from afterword.engine.llama.library import native
from oracle.forms import COMMON, FORMS, OPTIONAL_TENSORS, VOCABULARIES, Shape, Value, architecture_of
from oracle.tiny import FILE_TYPES, FileType, Vocabulary, add_vocabulary, byte_vocabulary, with_tokens

library.initialize(verbose=False)  # otherwise the library's error messages are not recorded

_WORDS = byte_vocabulary(infill=False, add_bos=False)


def write_random(
    path: str | Path,
    form: str,
    file_type: FileType = "Q8_0",
    *,
    poison: Mapping[int, float] | None = None,
    also: Mapping[str, Value] | None = None,
    as_floats: bool = False,
) -> Path:
    """Write a random model and return its path.

    `form`: a key of `forms.FORMS`. `poison`: token ids and the number that replaces all elements of their embedding.
    `also`: additional keys. `as_floats`: write the same weights, rounded to the file type, in F32.
    """
    keys = _keys(form, also or {})
    weights = _weights(_tensors(form, tuple(sorted(keys.items()))))
    for token, value in (poison or {}).items():
        weights["token_embd.weight"][token] = value
    return _write(path, architecture_of(form), keys, weights, file_type, words=_words(form), as_floats=as_floats)


def write_keys(path: str | Path, architecture: str) -> Path:
    """Write a file with the keys of every form and one tensor. Returns its path."""
    return _write_zeros(Path(path), architecture, COMMON, {"token_embd.weight": (1, 32)})


def write_tied(
    path: str | Path,
    architecture: str,
    also: Mapping[str, Value],
    words: Vocabulary,
    *,
    optional: Mapping[str, Shape],
    seed: int = 0,
) -> Path:
    """Write a random model of any size with F16 weights, whose embeddings are also its output matrix.

    `optional`: tensors beside those that the library demands.
    """
    keys = _keys(architecture, also)
    shapes = dict(_tensors(architecture, tuple(sorted(keys.items())), tuple(optional.items())))
    shapes.pop("output.weight", None)
    for name in shapes.keys() & {"token_embd.weight", "per_layer_token_embd.weight"}:
        shapes[name] = (len(words.tokens), *shapes[name][1:])
    return _write(path, architecture, keys, _weights(tuple(shapes.items()), seed), "F16", words=words)


def _keys(form: str, also: Mapping[str, Value]) -> Mapping[str, Value]:
    return {**COMMON, **FORMS.get(form, {}), **also}


def _words(form: str) -> Vocabulary:
    missing = VOCABULARIES.get(form, 0) - len(_WORDS.tokens)
    return with_tokens(_WORDS, *((f"filler{number}", TokenType.NORMAL) for number in range(missing)))


def _weights(shapes: tuple[tuple[str, Shape], ...], seed: int = 0) -> dict[str, NDArray[np.float32]]:
    first = seed * len(shapes)
    return {name: _random(name, shape, np.random.default_rng(i)) for i, (name, shape) in enumerate(shapes, first)}


@cache
def _tensors(
    form: str, keys: tuple[tuple[str, Value], ...], optional: tuple[tuple[str, Shape], ...] = ()
) -> tuple[tuple[str, Shape], ...]:
    """The names and shapes of the tensors that a file needs, with an untied output matrix if the library accepts it."""
    architecture = architecture_of(form)
    known = {**OPTIONAL_TENSORS.get(architecture, {}), **OPTIONAL_TENSORS.get(form, {})}
    shapes: dict[str, Shape] = {**known, **dict(optional)}
    while True:
        with tempfile.TemporaryDirectory() as folder:
            zeros = _write_zeros(Path(folder, "zeros.gguf"), architecture, dict(keys), shapes, _words(form))
            error = _load_error(zeros)
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
    as_floats: bool = False,
) -> Path:
    writer = _begin(path, architecture, keys, file_type, words)
    for name, weight in weights.items():
        # The library expects biases and small matrices of recurrent layers unquantized, and does not quantize the
        # matrices that choose experts. Non-finite values cannot be quantized.
        plain = (
            weight.ndim == 1
            or weight.shape[-1] % 32
            or re.search(r"norm|ssm|shortconv|gate_inp|bias|lerp|first|decay_w|mix_[avwg]\d|_ape", name)
        )
        kind = GGMLQuantizationType["F32" if plain or not np.isfinite(weight).all() else file_type]
        data = quantize(weight, kind)
        if as_floats:
            data, kind = dequantize(data, kind).reshape(weight.shape), GGMLQuantizationType.F32
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def _write_zeros(
    path: Path, architecture: str, keys: Mapping[str, Value], shapes: Mapping[str, Shape], words: Vocabulary = _WORDS
) -> Path:
    """Write a file whose weights are zeros that take no space on the disk."""
    writer = _begin(path, architecture, keys, "F32", words)
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
        _add(writer, key if key.startswith("xielu.") else f"{architecture}.{key}", value)
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
