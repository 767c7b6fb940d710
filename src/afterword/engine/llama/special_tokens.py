"""Special tokens in a text, found in linear time and exactly as llama.cpp finds them.

llama.cpp goes through the special tokens, the longest first, and splits what is still plain text at each occurrence,
from the left. Its own search walks a linked list from the start for every occurrence, so its time is quadratic in the
number of special tokens in the text. Here one regular expression finds all special tokens of one length.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_SPACES = b" \t\n\v\f\r"  # as `isspace` has them
_DEPTH = 12  # levels of groups in a pattern; what lies deeper is a flat list of alternatives
_LONG = 512  # bytes of tokens that are not compared with each other


@dataclass(frozen=True, slots=True)
class SpecialToken:
    """A token that llama.cpp looks for before everything else. It may take the spaces on a side of it away."""

    id: int
    text: bytes
    left: bool = False
    right: bool = False


Piece = int | tuple[int, int]
"""A special token's id, or where a stretch of plain text begins and ends."""


class SpecialTokens:
    """Splits texts at special tokens. They all have different texts, as in llama.cpp.

    `ambiguous`: two of the same length can overlap in a text. Then it matters which of them llama.cpp looks for first,
    and that depends on how its C++ library sorts.
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

    def split(self, data: bytes) -> list[Piece]:
        """The pieces of a text in order; not to be relied on if `ambiguous`."""
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
    """A regular expression for sorted texts of one length, in which what several begin with is written once."""
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
    """Whether one of some texts of the same length can begin inside another one, as far as that is soon found out."""
    if len(texts) == 1:
        return False
    if len(texts[0]) > _LONG:
        return True
    pairs: Counter[bytes] = Counter()  # by what they share: pairs of an end and a beginning
    starts = Counter(text[:size] for text in texts for size in range(1, len(text)))
    for text in texts:
        for size in range(1, len(text)):
            pairs[text[-size:]] += starts[text[-size:]] - (text[:size] == text[-size:])
    return any(pairs.values())
