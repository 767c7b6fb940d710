"""Tests of reading facts from valid files, and of the error messages for invalid ones."""

from __future__ import annotations

import random
import struct
import time
from pathlib import Path

import gguf_writer
import pytest
from gguf_writer import F32, TENSORS, gguf, write

from afterword.errors import SettingError
from afterword.models.gguf_facts import part_names, read_facts

TOKENS = b"tokenizer.ggml.tokens"


def error_message(path: Path) -> str:
    """The error message for a file that must be refused."""
    with pytest.raises(SettingError) as caught:
        read_facts(path)
    return caught.value.message


def message_for(tmp_path: Path, data: bytes) -> str:
    return error_message(write(tmp_path / "model.gguf", data))


def test_facts(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", gguf())
    facts = read_facts(path)
    assert (facts.architecture, facts.name, facts.file_type) == ("llama", "Tiny", "Q8_0")
    assert (facts.context_length, facts.layers, facts.embedding_length, facts.vocabulary) == (256, 2, 32, 5)
    assert (facts.heads, facts.heads_kv, facts.key_length, facts.value_length) == (4, 2, 8, 8)
    assert (facts.size_bytes, facts.tensor_count, facts.split_count) == (path.stat().st_size, 3, 1)
    assert facts.kv_bytes_per_token() == 2 * 2 * (8 + 8) * 2
    assert facts.kv_bytes_per_token(1) == 2 * 2 * (8 + 8)


def test_optional_values_may_be_missing(tmp_path: Path) -> None:
    changes = dict.fromkeys(
        ["general.name", "general.file_type", "llama.context_length", "llama.attention.head_count_kv"]
    )
    facts = read_facts(write(tmp_path / "small-Q8_0.gguf", gguf(changes, version=2)))
    assert (facts.name, facts.file_type, facts.context_length, facts.heads_kv) == ("small-Q8_0", "Q8_0", 0, 4)


def test_of_numbers_by_layer_the_largest_counts(tmp_path: Path) -> None:
    changes = {"llama.attention.head_count_kv": [0, 3, 1], "llama.attention.key_length": 16}
    facts = read_facts(write(tmp_path / "model.gguf", gguf(changes)))
    assert (facts.heads_kv, facts.key_length, facts.value_length) == (3, 16, 8)


def test_latent_values_take_no_memory(tmp_path: Path) -> None:
    changes = {f"llama.attention.{name}_length_mla": 4 for name in ("key", "value")}
    facts = read_facts(write(tmp_path / "model.gguf", gguf(changes)))
    assert (facts.key_length, facts.value_length) == (8, 0)
    indexed = read_facts(write(tmp_path / "indexed.gguf", gguf({**changes, "llama.attention.indexer.key_length": 2})))
    assert indexed.value_length == 2


@pytest.mark.parametrize(
    ("architecture", "changes", "kv_heads", "state"),
    [
        ("llama", {}, 4, 0),
        ("gemma4", {"attention.shared_kv_layers": 1}, 2, 0),
        ("gemma4", {"attention.shared_kv_layers": 3}, 0, 0),
        ("jamba", {"attention.head_count_kv": [0, 3], "ssm.conv_kernel": 4, "ssm.inner_size": 64, "ssm.state_size": 8},
         3, 3 * 64 + 8 * 64),
        ("mamba", {"attention.head_count": 0, "attention.head_count_kv": None, "ssm.conv_kernel": 4,
                   "ssm.inner_size": 64, "ssm.state_size": 8}, 0, 2 * (3 * 64 + 8 * 64)),
        ("mamba2", {"attention.head_count": 0, "attention.head_count_kv": None, "ssm.conv_kernel": 4,
                    "ssm.inner_size": 64, "ssm.state_size": 8, "ssm.group_count": 2}, 0, 2 * (3 * 96 + 8 * 64)),
        ("falcon-h1", {"ssm.conv_kernel": 2, "ssm.inner_size": 64, "ssm.state_size": 8}, 4, 2 * (64 + 8 * 64)),
        ("rwkv7", {"attention.head_count": 0, "attention.head_count_kv": None, "wkv.head_size": 8}, 0, 2 * 32 * 10),
        ("lfm2", {"attention.head_count_kv": [2, 0], "shortconv.l_cache": 3}, 2, 32 * 2),
        ("qwen3next", {"full_attention_interval": 2, "ssm.inner_size": 64, "ssm.state_size": 8}, 2, 8 * 64),
        ("qwen35", {"block_count": 4, "ssm.inner_size": 64, "ssm.state_size": 8}, 2, 3 * 8 * 64),
        ("qwen35", {"attention.recurrent_layers": [False, True], "ssm.inner_size": 64, "ssm.state_size": 8}, 2, 8 * 64),
        ("minimax-01", {"full_attention_interval": 2}, 2, 4 * 8 * 8),
        ("kimi-linear", {"attention.head_count_kv": [0, 2], "kda.head_dim": 8, "ssm.conv_kernel": 4},
         2, 3 * 3 * 4 * 8 + 4 * 64),
    ],
)  # fmt: skip
def test_kv_heads_and_recurrent_states_are_counted(
    tmp_path: Path, architecture: str, changes: dict[str, object], kv_heads: int, state: int
) -> None:
    values = {
        "general.architecture": architecture,
        **{
            f"{architecture}{key[5:]}": content
            for key, content in gguf_writer.VALUES.items()
            if key.startswith("llama.")
        },
        **{f"{architecture}.{key}": content for key, content in changes.items()},
    }
    facts = read_facts(write(tmp_path / "model.gguf", gguf(values)))
    assert (facts.kv_heads, facts.state_bytes) == (kv_heads, 4 * state)


def test_long_strings_and_arrays_are_skipped(tmp_path: Path) -> None:
    changes = {
        "tokenizer.chat_template": "x" * 100_000,
        "tokenizer.ggml.token_type": [1] * 100_000,
        "tokenizer.ggml.merges": ["a b"] * 1000,
        "llama.last": 1,
    }
    assert read_facts(write(tmp_path / "model.gguf", gguf(changes))).tensor_count == 3


def test_a_large_vocabulary_is_read_quickly(tmp_path: Path) -> None:
    tokens = [f"token{number}" for number in range(150_000)]
    path = write(tmp_path / "model.gguf", gguf({"tokenizer.ggml.tokens": tokens}))
    before = time.process_time()
    assert read_facts(path).vocabulary == 150_000
    assert time.process_time() - before < 2  # usual: 0.2 s; reading entry by entry with method calls takes longer


@pytest.mark.parametrize(
    ("data", "lookalike"),
    [
        (b"", "is empty"),
        (struct.pack("<Q", 300) + b'{"__metadata__":', "safetensors"),
        (b"PK\x03\x04archive", "PyTorch"),
        (b"\x80\x02pickle", "pickle"),
        (b"\n <!doctype html>", "web page"),
        (b"version https://git-lfs", "Git LFS pointer"),
        (b"tjgg" + bytes(20), "before GGUF"),
        (b"something else", "is not a GGUF file."),
    ],
)
def test_other_file_formats_are_recognized(tmp_path: Path, data: bytes, lookalike: str) -> None:
    message = message_for(tmp_path, data)
    assert "model.gguf is not a GGUF file" in message
    assert lookalike in message


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    assert error_message(tmp_path) == f"{tmp_path} is a folder, not a model file."
    assert error_message(tmp_path / "absent.gguf") == f"{tmp_path}/absent.gguf does not exist."


@pytest.mark.parametrize("target", ["gone.gguf", "model.gguf", "folder/gone.gguf"])
def test_the_message_for_a_broken_link_names_its_target(tmp_path: Path, target: str) -> None:
    link = tmp_path / "model.gguf"
    link.symlink_to(target)
    assert error_message(link) == f"{link} is a link to {target}, which cannot be found."
    link.unlink()
    write(link, gguf({"split.count": 2, "split.no": 0}, tensors={}))
    later = tmp_path / "model-00002-of-00002.gguf"
    later.symlink_to(target.replace("model", "gone"))
    assert f"{later} is a link to" in error_message(link)


@pytest.mark.parametrize("kind", ["none", "no_vocab"])
@pytest.mark.parametrize("tokens", [None, ["a", "b"]])
def test_a_model_without_a_vocabulary_is_refused(tmp_path: Path, kind: str, tokens: list[str] | None) -> None:
    changes = {"tokenizer.ggml.model": kind, "tokenizer.ggml.tokens": tokens, "llama.vocab_size": 5}
    assert "model.gguf has no vocabulary" in message_for(tmp_path, gguf(changes))


@pytest.mark.parametrize("architecture", ["wavtokenizer-dec", "qwen3tts", "pockettts"])
def test_audio_models_are_refused(tmp_path: Path, architecture: str) -> None:
    changes = {"general.architecture": architecture, "tokenizer.ggml.model": "none"}
    assert f"generates audio ({architecture})" in message_for(tmp_path, gguf(changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": None}, "does not name its architecture"),
        ({"general.type": "adapter"}, "of the type 'adapter'"),
        ({"general.alignment": 24}, "alignment 24"),
        ({"llama.block_count": None}, "no valid value for the metadata key 'llama.block_count'"),
        ({"llama.embedding_length": "wide"}, "no valid value for the metadata key 'llama.embedding_length'"),
        ({"llama.context_length": -1}, "no valid value for the metadata key 'llama.context_length'"),
        ({"split.no": 2, "split.count": 3}, "Name its first part, model-00001-of-00003.gguf"),
        ({"split.count": 2}, "model-00002-of-00002.gguf does not exist"),
    ],
)
def test_invalid_values_are_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    assert message in message_for(tmp_path, gguf(changes))


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        *((name, {}, "diffusion model") for name in ("dream", "llada", "llada-moe", "rnd1")),
        *((name, {}, "is an embedding model") for name in ("bert", "nomic-bert", "modern-bert")),
        *((name, {}, "is an embedding model") for name in ("gemma-embedding", "gemma-embedding2")),
        ("qwen3", {"qwen3.attention.causal": False}, "is an embedding model"),
        ("llama", {"llama.attention.causal": False}, "is an embedding model"),
        ("cogvlm", {}, "architecture is cogvlm, and the installed llama.cpp computes different numbers"),
        ("qwen4exp", {}, "architecture is qwen4exp, and the installed llama.cpp crashes"),
        ("chameleon", {}, "architecture is chameleon, and the installed llama.cpp excludes"),
        ("plm", {}, "architecture is plm, and the installed llama.cpp ends its process"),
        ("t5", {}, "has an encoder and a decoder"),
        *((name, {}, "is a draft model") for name in ("eagle3", "dflash", "gemma4-assistant")),
    ],
)
def test_unsupported_architectures_are_refused(tmp_path, architecture, changes, message) -> None:
    assert message in message_for(tmp_path, gguf({"general.architecture": architecture, **changes}))


def test_matrix_types_are_read_from_the_tensors(tmp_path: Path) -> None:
    tensors = {**TENSORS, "blk.0.attn_k.weight": ((32, 16), F32)}
    path = write(tmp_path / "model.gguf", gguf({"general.file_type": 15}, tensors))
    facts = read_facts(path)
    assert (facts.file_type, facts.matrix_types) == ("Q4_K_M", {"Q8_0", "F32"})
    assert read_facts(write(tmp_path / "plain.gguf", gguf())).matrix_types == {"Q8_0"}, "vectors are not multiplied"


def test_versions(tmp_path: Path) -> None:
    assert "has GGUF version 1," in message_for(tmp_path, gguf(version=1))
    assert "is big-endian" in message_for(tmp_path, gguf(version=3 << 24))


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    assert "holds a vocabulary but no weights" in message_for(tmp_path, gguf(tensors={}))


def test_the_message_for_a_truncated_file_states_the_sizes(tmp_path: Path) -> None:
    data = gguf()
    assert f"at least {len(data)} bytes expected, {len(data) - 100} found" in message_for(tmp_path, data[:-100])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (struct.pack("<QQ", 3, 12), struct.pack("<QQ", 1 << 60, 12), "claims 1152921504606846976 tensors"),
        (struct.pack("<QQ", 3, 12), struct.pack("<QQ", 3, 1 << 20), "cut short"),
        (gguf_writer.string("Tiny"), struct.pack("<Q", 1 << 62) + b"Tiny", "cut short"),
        (gguf_writer.string("ab"), struct.pack("<Q", (1 << 64) - 1) + b"ab", "cut short"),
        (TOKENS + struct.pack("<IIQ", 9, 8, 5), TOKENS + struct.pack("<IIQ", 9, 8, 1 << 23), "cut short"),
        (TOKENS + struct.pack("<II", 9, 8), TOKENS + struct.pack("<II", 9, 9), "unknown type 9"),
        (b"llama.block_count", b"llama.blocK_count", "no valid value for the metadata key 'llama.block_count'"),
        (b"tokenizer.ggml.scores", b"tokenizer.ggml.tokens", "given twice"),
        (struct.pack("<QQI", 32, 5, 8), struct.pack("<QQI", 32, 5, 31), "type 31"),
        (struct.pack("<QQI", 32, 5, 8), struct.pack("<QQI", 33, 5, 8), "whole blocks of Q8_0"),
        (struct.pack("<QQI", 32, 5, 8), struct.pack("<QQI", 32, 1 << 63, 8), "not at the expected offset"),
        (struct.pack("<QQI", 32, 32, 8), struct.pack("<QQI", 32, 1 << 63, 8), "cut short"),
        (b"output_norm.weight" + struct.pack("<I", 1), b"output_norm.weight" + struct.pack("<I", 5), "5 dim"),
    ],
)
def test_inconsistent_headers_are_refused(tmp_path: Path, old: bytes, new: bytes, message: str) -> None:
    data = gguf()
    assert data.count(old) == 1
    assert message in message_for(tmp_path, data.replace(old, new))


def test_the_parts_of_a_split_model_are_combined(tmp_path: Path) -> None:
    split = {"split.count": 2, "split.no": 0}
    first, second = (tmp_path / name for name in part_names("m-00001-of-00002.gguf"))
    write(first, gguf(split, tensors={}))
    assert error_message(first) == f"{second} does not exist."
    write(second, gguf({**split, "split.no": 1}, values={}, tensors=TENSORS))
    facts = read_facts(first)
    assert (facts.split_count, facts.tensor_count) == (2, 3)
    assert facts.size_bytes == first.stat().st_size + second.stat().st_size
    assert f"Name its first part, {first.name}." in error_message(second)
    write(second, second.read_bytes()[:-1])
    assert f"{second} is damaged or cut short" in error_message(first)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", gguf())
    with path.open("r+b") as file:
        for length in reversed(range(path.stat().st_size)):
            file.truncate(length)
            error_message(path)


def test_mutated_files_raise_only_setting_errors(tmp_path: Path) -> None:
    chance = random.Random(20)
    data = gguf()
    path = write(tmp_path / "model.gguf", data)
    header = data.index(b"blk.0.attn_q.weight") + 60  # only zeros follow
    refusals = 0
    with path.open("r+b", buffering=0) as file:
        for _ in range(5000):
            changed = bytearray(data)
            for _ in range(chance.choice((1, 1, 2, 8))):
                changed[chance.randrange(header)] = chance.choice((0, 1, 127, 128, 255, chance.randrange(256)))
            file.seek(0)
            file.write(changed)
            try:
                facts = read_facts(path)
            except SettingError:
                refusals += 1
            else:
                assert facts.kv_bytes_per_token() >= 0
    assert 1000 < refusals < 5000
