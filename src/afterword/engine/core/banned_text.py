"""Finds banned phrases in the text of a sample, and holds back the tokens that may still be taken back.

A phrase can begin and end inside tokens. Where one is complete, the tokens from the one in which it begins are taken
back, that token is banned at its place, and the place is sampled again with the same random number. Tokens are held as
long as they could be the beginning of a phrase, so nothing that was sent is ever taken back. Pure.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from afterword.engine.protocol import BannedText, Job, Token

MOST_TAKEN_BACK = 256
"""The most tokens of a sample that are taken back, besides two for each of `Job.max_tokens`. Then the sample ends."""

_END = ""  # the key of a node at which a phrase ends; no character is empty
_CACHED = 32  # trees: their characters are bounded by the request's limits
_LONGEST_CHARACTER = 4  # bytes of UTF-8

_Node = dict[str, "_Node"]
_Begun = tuple[tuple[int, _Node], ...]  # phrases that the text may end in: the place where each begins, and its node


@dataclass(frozen=True, slots=True)
class _Place:
    """What is known of a text before its next token.

    `pending`: the first bytes of a character, which begins in the token at the place `pending_place`.
    `exact`, `folded`: the phrases that have begun.
    """

    pending: bytes = b""
    pending_place: int = 0
    exact: _Begun = ()
    folded: _Begun = ()

    @property
    def first(self) -> int | None:
        """The place of the first token that may have to be taken back."""
        places = [start for start, _ in (*self.exact[:1], *self.folded[:1])]  # those that began earlier come first
        return min([*places, self.pending_place] if self.pending else places, default=None)


@dataclass(frozen=True, slots=True)
class BannedPhrases:
    """The phrases of a job, in trees of their characters. `pieces`: the bytes of each token of the vocabulary."""

    pieces: Sequence[bytes]
    silent: frozenset[int]
    exact: _Node
    folded: _Node
    healed: bytes  # of the first token, see `Job.healed`

    @classmethod
    def of(cls, job: Job, banned: BannedText, pieces: Sequence[bytes]) -> BannedPhrases:
        trees = _tree(banned.exact), _tree(banned.folded, folds=True)
        return cls(pieces, frozenset(banned.silent), *trees, job.healed)

    def beginning(self, prompt: tuple[int, ...]) -> _Place:
        """What is known before the first token: a prompt of token ids can end inside a character."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(b"".join(map(self._piece, prompt[-_LONGEST_CHARACTER:])) + self.healed)
        return _Place(decoder.getstate()[0])

    def follow(self, before: _Place, place: int, token: int) -> tuple[_Place, int | None]:
        """What is known after a token at a place; and the place where a phrase begins that is complete now, if any.

        Of several phrases that end at the same character, that which begins last counts.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.setstate((before.pending, 0))
        text = decoder.decode(self._piece(token)[0 if place else len(self.healed) :])
        pending = decoder.getstate()[0]
        exact, folded = before.exact, before.folded
        start = before.pending_place if before.pending else place  # of the first character
        for character in text:
            exact, found = _advance(exact, self.exact, character, start)
            for part in character.casefold() if self.folded else "":
                folded, other = _advance(folded, self.folded, part, start)
                found = max(found, other)
            if found >= 0:
                return before, found
            start = place
        return _Place(pending, start if pending else 0, exact, folded), None

    def _piece(self, token: int) -> bytes:
        return b"" if token in self.silent or token >= len(self.pieces) else self.pieces[token]


@dataclass(slots=True)
class HeldTokens:
    """The last tokens of one sample, which may have to be taken back; and the tokens banned at their places.

    `is_exhausted`: too many tokens were taken back, or every token is banned at a place.
    """

    phrases: BannedPhrases
    most: int
    known: _Place
    is_exhausted: bool = False
    taken_back: int = 0
    _start: int = 0  # place of the first held token
    _held: list[tuple[Token, _Place]] = field(default_factory=list)  # with what was known before each
    _banned: dict[int, tuple[int, ...]] = field(default_factory=dict)  # by place, never after the next one

    @classmethod
    def of(cls, phrases: BannedPhrases, job: Job) -> HeldTokens:
        return cls(phrases, MOST_TAKEN_BACK + 2 * job.max_tokens, phrases.beginning(job.prompt))

    def banned(self, place: int) -> tuple[int, ...]:
        """The tokens that must not be sampled at a place."""
        return self._banned.get(place, ())

    def append(self, token: Token) -> int:
        """Hold the next token. Returns how many of the last tokens are taken back, this one included."""
        place = self._start + len(self._held)
        if token.id in self.banned(place):  # nothing else could be sampled
            self.is_exhausted = True
            self.taken_back += 1
            return 1
        before = self.known
        self.known, begun = self.phrases.follow(before, place, token.id)
        self._held.append((token, before))
        return 0 if begun is None else self._take_back(begun)

    def release(self, everything: bool = False) -> list[Token]:
        """Remove and return the tokens that are never taken back."""
        first = None if everything else self.known.first
        count = len(self._held) if first is None else max(first - self._start, 0)
        released = [token for token, _ in self._held[:count]]
        del self._held[:count]
        self._start += count
        return released

    def _take_back(self, begun: int) -> int:
        index = begun - self._start
        count = len(self._held) - index
        first, self.known = self._held[index]
        del self._held[index:]
        self._banned = {place: ids for place, ids in self._banned.items() if self._start <= place <= begun}
        self._banned[begun] = (*self.banned(begun), first.id)
        self.taken_back += count
        self.is_exhausted = self.taken_back > self.most
        return count


def _advance(begun: _Begun, root: _Node, character: str, start: int) -> tuple[_Begun, int]:
    """The phrases that have begun after a character, and the place where a complete one begins; -1 if none is."""
    if not begun and character not in root:
        return (), -1
    left = tuple((place, node[character]) for place, node in (*begun, (start, root)) if character in node)
    return left, max((place for place, node in left if _END in node), default=-1)


@lru_cache(_CACHED)
def _tree(phrases: tuple[str, ...], folds: bool = False) -> _Node:
    root: _Node = {}
    for phrase in phrases:
        node = root
        for character in phrase.casefold() if folds else phrase:
            node = node.setdefault(character, {})
        node[_END] = {}
    return root
