"""Where a SentencePiece text can be cut without changing a token of it.

llama.cpp writes a character that is no token as its bytes, and for each of them copies all tokens so far: its time is
quadratic in the number of such characters. A text is therefore cut before some of them and tokenized piece by piece.

Merging joins neighbours only to what is a token. Where no token has the two characters beside a place in it one after
the other, nothing is ever joined across the place, and the tokens on its two sides do not depend on each other.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import pairwise

SPACE = "▁"
PIECE_LENGTH = 4096
"""Characters that a piece has before it is cut at the next place."""

_WINDOW = 2**15  # characters that are searched in one call: the search keeps the interpreter's lock


class SplitPoints:
    """Places before characters that are no tokens. `texts` are those of all tokens, with `SPACE` for a space."""

    def __init__(self, texts: Iterable[str]) -> None:
        texts = set(texts)
        letters = {text for text in texts if len(text) == 1}
        before: defaultdict[str, set[str]] = defaultdict(set)
        for text in texts:
            for first, second in pairwise(text):
                if second not in letters:
                    before[_plain(second)].add(_plain(first))
        self._before = dict(before)
        spaced = {second for second, firsts in before.items() if " " in firsts}
        known = set(map(_plain, letters))
        self._places = {False: _other_than(known), True: _other_than(known | spaced)}

    def pieces(self, text: str, spaced: bool) -> Iterator[str]:
        """The pieces of a text. `spaced`: a space will be put before each, and must stay apart from it too.

        What is plain text in the whole is so in a piece; spaces are not yet written as `SPACE`, which could make
        a special token of them.
        """
        start, place = 0, PIECE_LENGTH
        while place < len(text):
            end = min(place + _WINDOW, len(text))
            found = self._places[spaced].search(text, place, end)
            if found is None:
                place = end
            elif _plain(text[found.start() - 1]) in self._before.get(_plain(found[0]), ()):
                place = found.end()
            else:
                yield text[start : found.start()]
                start, place = found.start(), found.start() + PIECE_LENGTH
        yield text[start:]


def _plain(letter: str) -> str:
    """`SPACE` and a space are the same to the tokenizer."""
    return " " if letter == SPACE else letter


def _other_than(letters: set[str]) -> re.Pattern[str]:
    """Any character but these."""
    both = letters | {SPACE} if " " in letters else letters
    return re.compile(f"[^{''.join(map(re.escape, sorted(both)))}]" if both else "(?s:.)")
