"""Tests of the bytes of tokens that are read from `tokenizer.json`."""

from __future__ import annotations

from typing import Any

import pytest

from afterword.engine.vllm.token_bytes import keeps_text, token_bytes
from afterword.errors import SettingError

BYTE_LEVEL = {"type": "ByteLevel"}
LLAMA = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ],
}


def tokenizer(vocabulary: Any, decoder: Any, added: tuple[dict[str, Any], ...] = (), kind: str = "BPE") -> Any:
    return {"model": {"type": kind, "vocab": vocabulary}, "decoder": decoder, "added_tokens": list(added)}


def test_byte_level_characters_are_bytes():
    words = {"Ġdog": 0, "Ċ": 1, "Ã": 2, "©": 3, "Ġ": 4, "abc": 5}
    assert token_bytes(tokenizer(words, BYTE_LEVEL), 6) == (b" dog", b"\n", b"\xc3", b"\xa9", b" ", b"abc")


def test_all_256_bytes_have_one_character_each():
    from afterword.engine.vllm.token_bytes import _BYTES

    assert sorted(_BYTES.values()) == list(range(256))


def test_sentence_piece_spaces_and_bytes():
    words = {"▁dog": 0, "<0x0A>": 1, "<0xE2>": 2, "é": 3, "▁▁": 4, "<0xZZ>": 5}
    expected = (b" dog", b"\n", b"\xe2", "é".encode(), b"  ", b"<0xZZ>")
    assert token_bytes(tokenizer(words, LLAMA), 6) == expected
    assert token_bytes(tokenizer(words, {"type": "Metaspace"}), 6)[0] == b" dog"


def test_a_unigram_vocabulary_is_a_list():
    assert token_bytes(tokenizer([["▁a", -1.0], ["b", -2.0]], LLAMA, kind="Unigram"), 2) == (b" a", b"b")


def test_special_tokens_have_their_name():
    added = {"id": 1, "content": "<|Ġend▁|>", "special": True}
    for decoder in (BYTE_LEVEL, LLAMA):
        assert token_bytes(tokenizer({"a": 0}, decoder, (added,)), 2) == (b"a", "<|Ġend▁|>".encode())


def test_an_added_token_that_is_an_ordinary_entry_too_is_spelled_as_one():
    added = {"id": 0, "content": "▁▁", "special": False}
    assert token_bytes(tokenizer({"▁▁": 0}, LLAMA, (added,)), 1) == (b"  ",)
    assert token_bytes(tokenizer({}, LLAMA, (added,)), 1) == ("▁▁".encode(),)


def test_ids_without_a_token_have_no_bytes():
    assert token_bytes(tokenizer({"a": 1}, BYTE_LEVEL), 4) == (b"", b"a", b"", b"")


def test_a_tokenizer_for_another_model_is_refused():
    with pytest.raises(SettingError, match="token id 4, but the model has only 4"):
        token_bytes(tokenizer({"a": 4}, BYTE_LEVEL), 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tokenizer({}, BYTE_LEVEL, kind="WordPiece"), "WordPiece"),
        (tokenizer({}, {"type": "Fuse"}), "neither a byte-level decoder"),
        (tokenizer({}, None), "neither a byte-level decoder"),
        ({}, "the model None"),
    ],
)
def test_other_tokenizers_are_refused(content, message):
    with pytest.raises(SettingError, match=message):
        token_bytes(content, 1)


@pytest.mark.parametrize(
    ("normalizer", "keeps"),
    [
        (None, True),
        ({"type": "Sequence", "normalizers": [{"type": "Prepend"}, {"type": "Replace", "content": "▁"}]}, True),
        ({"type": "NFC"}, False),
        ({"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}, False),
        ({"type": "Replace", "content": ""}, False),
    ],
)
def test_only_normalizers_that_change_spaces_keep_the_text(normalizer, keeps):
    assert keeps_text({"normalizer": normalizer}) is keeps
