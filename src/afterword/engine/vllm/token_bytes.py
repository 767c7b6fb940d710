"""The bytes of every token, from the content of a `tokenizer.json`. Pure.

Decoding ids one by one with the tokenizer's own function is wrong for most of them: it drops spaces before words, and
returns U+FFFD for a token with a part of a character. So the rules of the decoder are applied to the vocabulary here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from afterword.errors import SettingError

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "▁"  # SentencePiece's symbol for a space
_MODELS = ("BPE", "Unigram")


def _byte_characters() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    Printable characters of Latin-1 stand for themselves; the other bytes, in order, have the characters from 256 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_characters()


def token_bytes(tokenizer: dict[str, Any], size: int) -> tuple[bytes, ...]:
    """The bytes of the token ids 0 to `size` - 1: for special tokens the name, for ids without text b"".

    `size`: number of tokens of the model, which often has more than the vocabulary. Raises `SettingError`.
    """
    model = tokenizer.get("model") or {}
    if model.get("type") not in _MODELS:
        raise SettingError(
            f"The tokenizer has the model {model.get('type')}, but only {' and '.join(_MODELS)} are supported."
        )
    text_of = _text_rule(tokenizer)
    pieces = [b""] * size
    vocabulary = dict(_entries(model["vocab"]))
    for text, token in vocabulary.items():
        _set(pieces, token, text_of(text))
    for added in tokenizer.get("added_tokens") or []:
        text, token = added["content"], added["id"]
        if added.get("special") or vocabulary.get(text) != token:
            _set(pieces, token, text.encode())
    return tuple(pieces)


def keeps_text(tokenizer: dict[str, Any]) -> bool:
    """Whether the tokens spell a text byte for byte: no normalizer folds or drops characters."""
    allowed = {"Prepend", "Replace", "Sequence"}
    return all(
        kind in allowed and (kind != "Replace" or node.get("content") == _SPACE)
        for kind, node in _parts(tokenizer.get("normalizer"), "normalizers")
    )


def _text_rule(tokenizer: dict[str, Any]) -> Callable[[str], bytes]:
    """How an entry of the vocabulary is turned into bytes, by the tokenizer's decoder."""
    decoders = {kind for kind, _ in _parts(tokenizer.get("decoder"), "decoders")}
    if "ByteLevel" in decoders:
        return _byte_level
    if decoders & {"Metaspace", "ByteFallback", "Replace"}:
        return _sentence_piece
    raise SettingError(
        "The tokenizer has neither a byte-level decoder nor SentencePiece's, so the bytes of its tokens are not known."
    )


def _byte_level(text: str) -> bytes:
    if all(character in _BYTES for character in text):
        return bytes(_BYTES[character] for character in text)
    return text.encode()  # as the decoder does with entries that are no byte-level text


def _sentence_piece(text: str) -> bytes:
    if found := _BYTE.fullmatch(text):
        return bytes([int(found[1], 16)])
    return text.replace(_SPACE, " ").encode()


def _entries(vocabulary: Any) -> Iterator[tuple[str, int]]:
    """The entries of a vocabulary: an object of ids by text (BPE), or a list of texts with scores (Unigram)."""
    if isinstance(vocabulary, dict):
        yield from vocabulary.items()
    else:
        yield from ((entry[0], token) for token, entry in enumerate(vocabulary))


def _parts(node: dict[str, Any] | None, inner: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """A node of `tokenizer.json` and all nodes in it, each with its type."""
    if node:
        yield str(node.get("type")), node
        for each in node.get(inner) or []:
            yield from _parts(each, inner)


def _set(pieces: list[bytes], token: int, piece: bytes) -> None:
    if token >= len(pieces):
        raise SettingError(
            f"The tokenizer has the token id {token}, but the model has only {len(pieces)} tokens. They do not belong "
            "together."
        )
    pieces[token] = piece
