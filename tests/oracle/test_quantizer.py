"""The quantizer, compared with gguf's conversions, and the types that it chooses."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize, quantize

from afterword.models.gguf_facts import read_facts
from afterword.models.registry import builtin_path
from oracle import quantizer, tiny
from oracle.quantizer import Kind

VOCABULARY = tiny.byte_vocabulary(infill=False, add_bos=False)


def model(folder: Path, width: int = 256, layers: int = 1) -> Path:
    """A model with F16 weights. `width`: the weights in a row of most matrices; those of `ffn_down` have 256."""
    shape = tiny.Shape("llama", width, layers, 2, 1, 256, 128, 10_000, 1e-5)
    weights = tiny.random_weights(shape, VOCABULARY)
    return tiny.write_model(folder / "source.gguf", shape, VOCABULARY, weights, "F16")


def kinds(path: Path) -> dict[str, Kind]:
    """The types of the matrices of a file, by name."""
    return {each.name: Kind(each.tensor_type) for each in GGUFReader(path).tensors if len(each.shape) > 1}


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.Q5_1, Kind.BF16, Kind.F32])
def test_weights_are_those_of_another_implementation(tmp_path: Path, kind: Kind) -> None:
    source = model(tmp_path)
    made = GGUFReader(quantizer.quantize(source, tmp_path / "made.gguf", kind.name, pure=True))
    for before, after in zip(GGUFReader(source).tensors, made.tensors, strict=True):
        floats = dequantize(before.data, before.tensor_type)
        expected = quantize(floats, kind) if len(before.shape) > 1 else before.data
        assert (before.name, after.data.tobytes()) == (after.name, expected.tobytes())


@pytest.mark.parametrize("name", quantizer.MIXTURES)
def test_every_type_keeps_the_weights_up_to_rounding(tmp_path: Path, name: str) -> None:
    source = model(tmp_path)
    made = quantizer.quantize(source, tmp_path / "made.gguf", name)
    for before, after in zip(GGUFReader(source).tensors, GGUFReader(made).tensors, strict=True):
        expected, found = (dequantize(each.data, each.tensor_type).ravel() for each in (before, after))
        assert np.corrcoef(expected, found)[0, 1] > 0.9, before.name
    assert read_facts(made).file_type == name.removesuffix("_MOE")


def test_a_mixture_has_better_types_in_some_layers(tmp_path: Path) -> None:
    found = kinds(quantizer.quantize(model(tmp_path, layers=16), tmp_path / "made.gguf", "Q4_K_M"))
    better = [f"blk.{layer}.ffn_down.weight" for layer in (0, 1, 4, 7, 10, 13, 14, 15)]
    assert [name for name, kind in found.items() if "ffn_down" in name and kind == Kind.Q6_K] == better
    assert found["output.weight"] == Kind.Q6_K
    assert Counter(found.values()) == {Kind.Q4_K: 112 + 1 - len(better) * 2, Kind.Q6_K: len(better) * 2 + 1}
    pure = quantizer.quantize(tmp_path / "source.gguf", tmp_path / "pure.gguf", "Q4_K_M", pure=True)
    assert set(kinds(pure).values()) == {Kind.Q4_K}


@pytest.mark.parametrize(
    ("name", "width", "expected"),
    [
        *(("Q4_K_S", 64, Kind.Q5_0), ("Q5_K_S", 64, Kind.Q5_1), ("Q6_K", 64, Kind.Q8_0), ("Q2_K", 64, Kind.Q4_0)),
        *(("IQ4_XS", 64, Kind.IQ4_NL), ("Q4_0", 48, Kind.F16), ("Q4_K_S", 48, Kind.F16)),
    ],
)
def test_rows_that_do_not_fit_get_another_type(tmp_path: Path, name: str, width: int, expected: Kind) -> None:
    found = kinds(quantizer.quantize(model(tmp_path, width), tmp_path / "made.gguf", name))
    assert found["blk.0.ffn_up.weight"] == expected
    assert found["blk.0.ffn_down.weight"] != Kind.F16, "its rows have 256 weights"


def test_an_unknown_type_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Type IQ2_XXS is not known, or needs an importance matrix. Known: F32, "):
        quantizer.quantize(builtin_path(), tmp_path / "made.gguf", "IQ2_XXS")
