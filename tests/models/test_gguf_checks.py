"""Tests that headers which would abort llama.cpp are refused. Gate G14 searches for more of them with the library."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from gguf_writer import TENSORS, gguf, write

from afterword.errors import SettingError
from afterword.models.gguf_facts import read_facts

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.tokens": ["a", "b", "a"]}, "1 of its tokens are duplicates"),
        ({"tokenizer.ggml.tokens": ["a", "a\0b"]}, "1 of its tokens are duplicates"),
        ({"tokenizer.ggml.tokens": ["[EMPTY_1]", ""]}, "1 of its tokens are duplicates"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": BYTES[:-1]}, "no token stands for the byte 255"),
        ({"llama.block_count": 513}, "it has 513 layers"),
        ({"llama.nextn_predict_layers": 3}, "3 of its 2 layers predict further tokens"),
        ({"llama.attention.layer_norm_rms_epsilon": -1.0}, "its layer_norm_rms_epsilon is -1.0"),
        ({"llama.attention.layer_norm_epsilon": math.nan}, "its layer_norm_epsilon is nan"),
        ({"llama.attention.layer_norm_epsilon": math.inf}, "its layer_norm_epsilon is inf"),
        ({"llama.attention.head_count_kv": 2**31 + 1}, "its head_count_kv is 2147483649"),
        ({"llama.attention.head_count_kv": [2, 2**31 + 2]}, "its head_count_kv is 2147483650"),
        ({"llama.rope.dimension_count": 7}, "7 of the 8 elements of its heads are rotated"),
    ],
)
def test_headers_that_abort_llama_cpp_are_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = write(tmp_path / "m.gguf", gguf(changes))
    with pytest.raises(SettingError) as caught:
        read_facts(path)
    assert caught.value.message == f"{path} is damaged: {message}."


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer.ggml.tokens": ["a", "", "", "b"]},
        {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": [*BYTES[:65], "A", *BYTES[66:]]},
        {"llama.block_count": 512},
        {"llama.attention.layer_norm_rms_epsilon": 0.0},
        {"llama.rope.dimension_count": 8},
        {"llama.rope.dimension_count": 16, "llama.attention.key_length": 16},
    ],
)
def test_harmless_headers_are_accepted(tmp_path: Path, changes: dict[str, object]) -> None:
    assert read_facts(write(tmp_path / "m.gguf", gguf(changes))).architecture == "llama"


@pytest.mark.parametrize(("number", "name"), [(9, "Q8_1"), (26, "I32"), (28, "F64")])
def test_weight_types_without_a_matmul_are_refused(tmp_path: Path, number: int, name: str) -> None:
    tensors = TENSORS | {"output.weight": ((32, 5), number)}
    with pytest.raises(SettingError) as caught:
        read_facts(write(tmp_path / "m.gguf", gguf(tensors=tensors)))
    assert caught.value.message.endswith(f"is damaged: it has weights of type {name}.")


def test_integer_tensors_are_accepted_for_table_routed_architectures(tmp_path: Path) -> None:
    values = {"general.architecture": "deepseek4"}
    values |= {f"deepseek4.{name}": number for name, number in (("block_count", 2), ("embedding_length", 32))}
    tensors = TENSORS | {"blk.0.ffn_gate_tid2eid.weight": ((6, 5), 26)}
    assert read_facts(write(tmp_path / "m.gguf", gguf(values, tensors))).architecture == "deepseek4"


def test_partial_rotation_is_accepted_for_other_architectures(tmp_path: Path) -> None:
    values = {"general.architecture": "phi3", "phi3.rope.dimension_count": 4}
    values |= {f"phi3.{name}": number for name, number in (("block_count", 2), ("embedding_length", 32))}
    assert read_facts(write(tmp_path / "m.gguf", gguf(values))).architecture == "phi3"
