"""Where a SentencePiece text can be cut without changing a token of it.

llama.cpp writes a character that is no token as its bytes, and for each of them copies all tokens so far: its time is
quadratic in the number of such characters. A text is therefore cut before some of them and tokenized piece by piece.

Merging joins neighbours only to what is a token. Where no token has the two characters beside a place in it one after
the other, nothing is ever joined across the place, and the tokens on its two sides do not depend on each other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import pairwise

SPACE = "▁"
LENGTH = 4096
"""Characters that a piece has before it is cut at the next place."""


class Cuts:
    """Places before characters that are no tokens. `texts` are those of all tokens, with `SPACE` for a space."""

    def __init__(self, texts: Iterable[str]) -> None:
        texts = set(texts)
        self._letters = {text for text in texts if len(text) == 1}
        self._before: defaultdict[str, set[str]] = defaultdict(set)
        for text in texts:
            for first, second in pairwise(text):
                if second not in self._letters:
                    self._before[second].add(first)

    def pieces(self, text: str, spaced: bool) -> Iterator[str]:
        """The pieces of a text. `spaced`: a space will be put before each, and must stay apart from it too.

        What is plain text in the whole is so in a piece; spaces are not yet written as `SPACE`, which could make
        a special token of them.
        """
        start, place = 0, LENGTH
        while place < len(text):
            if self._apart(text[place - 1], text[place]) and not (spaced and not self._apart(SPACE, text[place])):
                yield text[start:place]
                start, place = place, place + LENGTH
            else:
                place += 1
        yield text[start:]

    def _apart(self, first: str, second: str) -> bool:
        first, second = (SPACE if letter == " " else letter for letter in (first, second))
        return second not in self._letters and first not in self._before.get(second, ())
