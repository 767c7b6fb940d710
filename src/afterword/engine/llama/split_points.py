"""Finds points where a text for a SentencePiece tokenizer can be split without a change of its tokens.

llama.cpp writes a character that is no token as its bytes, and copies all tokens so far for each of these characters.
So its time is quadratic in their number. A text is therefore split before some of them and tokenized piece by piece.

A merge joins neighbours only if the result is a token. If no token that merges can produce contains the two characters
around a point next to each other, no merge crosses the point. Then the tokens on its two sides do not depend on each
other. Names such as `<unused100>` are tokens that no merge produces, because `<unused10` and `00>` are no tokens.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Set
from itertools import pairwise

SPACE = "▁"
PIECE_LENGTH = 4096
"""The least number of characters in a piece, except the last."""

_WINDOW = 2**15  # characters that one call searches: a regular expression search does not release the GIL


class SplitPoints:
    """Finds split points before characters that are no tokens.

    `texts`: the texts of all tokens, with `SPACE` for a space.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        plain = {text.replace(SPACE, " ") for text in texts}
        letters = {text for text in plain if len(text) == 1}
        merges = _Merges(plain)
        before: defaultdict[str, set[str]] = defaultdict(set)
        for text in plain:
            found = [pair for pair in pairwise(text) if pair[1] not in letters]
            if found and merges.produce(text):
                for first, second in found:
                    before[second].add(first)
        self._before = dict(before)
        spaced = {second for second, firsts in before.items() if " " in firsts}
        self._patterns = {False: _other_than(letters), True: _other_than(letters | spaced)}

    def pieces(self, text: str, spaced: bool) -> Iterator[str]:
        """The pieces of a text.

        `spaced`: the tokenizer will put a space before each piece, and no merge may join that space with the piece.
        Spaces in `text` must not be replaced by `SPACE` yet, because the replacement could spell a special token.
        """
        start, position = 0, PIECE_LENGTH
        while position < len(text):
            end = min(position + _WINDOW, len(text))
            found = self._patterns[spaced].search(text, position, end)
            if found is None:
                position = end
            elif _plain(text[found.start() - 1]) in self._before.get(_plain(found[0]), ()):
                position = found.end()
            else:
                yield text[start : found.start()]
                start, position = found.start(), found.start() + PIECE_LENGTH
        yield text[start:]


class _Merges:
    """Knows which texts merges of two neighbours can produce, if every result must be one of `tokens`."""

    def __init__(self, tokens: Set[str]) -> None:
        self._tokens = tokens
        self._known: dict[str, bool] = {}

    def produce(self, text: str) -> bool:
        """Whether merges can produce the text from its characters."""
        if len(text) == 1:
            return True
        if text not in self._tokens:
            return False
        if text not in self._known:
            halves = ((text[:length], text[length:]) for length in range(1, len(text)))
            self._known[text] = any(self.produce(left) and self.produce(right) for left, right in halves)
        return self._known[text]


def _plain(letter: str) -> str:
    """The character with `SPACE` replaced by a space: the tokenizer does not distinguish them."""
    return " " if letter == SPACE else letter


def _other_than(letters: set[str]) -> re.Pattern[str]:
    """A pattern for any character except these."""
    both = letters | {SPACE} if " " in letters else letters
    return re.compile(f"[^{''.join(map(re.escape, sorted(both)))}]" if both else "(?s:.)")
