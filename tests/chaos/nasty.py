"""Texts that parsers, tokenizers, terminals, logs and shells often handle wrongly. Written for this server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

_LINES = Path(__file__).with_name("nasty.txt").read_text(encoding="utf-8").splitlines()
SHORT: tuple[str, ...] = tuple(json.loads(line) for line in _LINES if not line.startswith("#"))
"""Texts that were chosen individually."""

SURROGATES = (rb'"\ud800"', rb'"\udfff"', rb'"\udc00\ud800"', rb'"a\ud83d"', rb'"\ud83d\ud83d\ude00"')
"""JSON strings that are not valid Unicode text."""

_CONTROL = (*range(32), *range(127, 160))
_SPACES = (0xA0, 0x1680, 0x180E, *range(0x2000, 0x2010), 0x202F, 0x205F, 0x2060, 0x3000, 0xFEFF)
_UNITS = ("a", "A", " ", "\n", "\t", "0", "!", "é", "漢", "😀", "\u0301", "ab ", "\x00", "<", "a\u0301")
_MARKS = "".join(map(chr, range(0x300, 0x370)))


def _texts() -> Iterator[str]:
    yield ""
    yield from SHORT
    yield from map(chr, (*_CONTROL, *_SPACES))
    for count in (17, 300, 4000):
        yield from (unit * count for unit in _UNITS)
    for depth in (3, 40, len(_MARKS)):
        yield from ("".join(letter + _MARKS[:depth] for letter in word) for word in ("Z", "falls", "e\u0301"))
    for text in SHORT:
        yield from (f"Once {text} upon", f"{text}Once", f"Once{text}")


TEXTS = tuple(dict.fromkeys(_texts()))
