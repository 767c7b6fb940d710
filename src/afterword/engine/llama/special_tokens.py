"""Splits texts at special tokens in linear time, with the same result as llama.cpp.

llama.cpp searches for the special tokens one after the other, the longest first, and splits the remaining plain text at
each occurrence from left to right. Its search walks a linked list from the start for every occurrence, so its time is
quadratic in the number of special tokens in the text. Here one regular expression finds all special tokens of one
length.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_SPACES = b" \t\n\v\f\r"  # the same as C's `isspace`
_DEPTH = 12  # the most nested groups of a pattern; deeper levels are a flat list of alternatives
_LONG = 512  # tokens with more bytes are assumed to overlap, without a comparison


@dataclass(frozen=True, slots=True)
class SpecialToken:
    """A token that llama.cpp searches before it tokenizes the rest of a text.

    `left`, `right`: whether the token removes the spaces on that side of it.
    """

    id: int
    text: bytes
    left: bool = False
    right: bool = False


Piece = int | tuple[int, int]
"""The id of a special token, or the start and end (bytes) of a piece of plain text."""


class SpecialTokens:
    """Splits texts at special tokens, all of which have different texts, as in llama.cpp.

    `ambiguous`: two tokens of the same length can overlap in a text, or tokens that strip spaces meet tokens that
    contain spaces. Then the result depends on which token llama.cpp searches first, so on the sort of its C++ library.
    """

    def __init__(self, tokens: Iterable[SpecialToken]) -> None:
        self._tokens = {token.text: token for token in tokens if token.text}
        lengths: defaultdict[int, list[bytes]] = defaultdict(list)
        for text in self._tokens:
            lengths[len(text)].append(text)
        self._patterns = [re.compile(_pattern(sorted(lengths[size])), re.DOTALL) for size in sorted(lengths)[::-1]]
        strips = any(token.left or token.right for token in self._tokens.values())
        spaced = any(byte in text for text in self._tokens for byte in _SPACES)
        self.ambiguous = (strips and spaced) or any(_overlap(texts) for texts in lengths.values())

    def ids(self) -> dict[str, int]:
        """The ids of the tokens by their texts."""
        return {text.decode("utf-8", "replace"): token.id for text, token in self._tokens.items()}

    def split(self, data: bytes) -> list[Piece]:
        """The pieces of a text in order. Can differ from llama.cpp's if `ambiguous`."""
        pieces: list[Piece] = [(0, len(data))] if data else []
        for pattern in self._patterns:
            if pattern.search(data):
                pieces = [part for piece in pieces for part in self._split(pattern, data, piece)]
        return pieces

    def _split(self, pattern: re.Pattern[bytes], data: bytes, piece: Piece) -> Iterator[Piece]:
        if isinstance(piece, int):
            yield piece
            return
        start, end = piece
        while match := pattern.search(data, start, end):
            token = self._tokens[match[0]]
            before, after = match.span()
            if token.left:
                while before > start and data[before - 1] in _SPACES:
                    before -= 1
            if token.right:
                while after < end and data[after] in _SPACES:
                    after += 1
            if before > start:
                yield start, before
            yield token.id
            start = after
        if start < end:
            yield start, end


def _pattern(texts: list[bytes], depth: int = 0) -> bytes:
    """A regular expression for sorted texts of equal length. A common prefix of several texts is written once."""
    if len(texts) == 1 or depth == _DEPTH:
        return b"|".join(map(re.escape, texts))
    shared = 0
    while shared < len(texts[0]) and texts[0][shared] == texts[-1][shared]:
        shared += 1
    groups: defaultdict[int, list[bytes]] = defaultdict(list)
    for text in texts:
        groups[text[shared]].append(text[shared:])
    inner = b"|".join(_pattern(group, depth + 1) for group in groups.values())
    return re.escape(texts[0][:shared]) + b"(?:" + inner + b")"


def _overlap(texts: list[bytes]) -> bool:
    """Whether a text can begin inside another one of the same length. True without a check for texts above `_LONG`."""
    if len(texts) == 1:
        return False
    if len(texts[0]) > _LONG:
        return True
    pairs: Counter[bytes] = Counter()  # by the shared bytes: the number of pairs of a suffix and a prefix
    starts = Counter(text[:size] for text in texts for size in range(1, len(text)))
    for text in texts:
        for size in range(1, len(text)):
            pairs[text[-size:]] += starts[text[-size:]] - (text[:size] == text[-size:])
    return any(pairs.values())
