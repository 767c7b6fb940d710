"""Finds banned phrases in the text of a sample, and holds back the tokens that may still be taken back.

A phrase can begin and end inside tokens. Where one is complete, the tokens from the one in which it begins are taken
back, that token is banned at its place, and the place is sampled again with the same random number. Tokens are held as
long as they could be the beginning of a phrase, so nothing that was sent is ever taken back: if a phrase begins in a
token that was sent, the tokens after that one are taken back. Pure.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from afterword.engine.core.phrase_search import Automaton, AutomatonCache, Mark, PhraseSearch
from afterword.engine.most_sampled import most_taken_back
from afterword.engine.protocol import Job, Token
from afterword.engine.token_row import MAX_HELD_BYTES

MOST_BANNED = 1024
"""The most tokens that are banned at one place, because each pass there reads them all. Then the sample ends."""

_FEW_ROWS = 4  # that a sample may hold, whatever they take


@dataclass(frozen=True, slots=True)
class BannedPhrases:
    """The phrases of a job. `pieces`: the bytes of each token of the vocabulary.

    `healed`, `begun`: see `Job` and `BannedText`.
    """

    pieces: Sequence[bytes]
    silent: frozenset[int]
    exact: Automaton
    folded: Automaton
    healed: bytes
    begun: bytes

    @classmethod
    def of(cls, job: Job, pieces: Sequence[bytes], cache: AutomatonCache) -> BannedPhrases | None:
        """None if the job has no banned texts."""
        banned = job.banned_text
        if banned is None:
            return None
        exact, folded = cache.get(banned.exact), cache.get(tuple(phrase.casefold() for phrase in banned.folded))
        return cls(pieces, frozenset(banned.silent), exact, folded, job.healed, banned.begun)

    def piece(self, place: int, token: int) -> bytes:
        """The bytes of a token in the text."""
        silent = token in self.silent or token >= len(self.pieces)
        return b"" if silent else self.pieces[token][0 if place else len(self.healed) :]


@dataclass(frozen=True, slots=True)
class _Held:
    """A token, and what is known of the text before it.

    `pending`: the first bytes of a character, which begins in the token at the place `pending_place`.
    """

    token: Token
    pending: bytes
    pending_place: int
    exact: Mark
    folded: Mark


class HeldTokens:
    """The last tokens of one sample, which may have to be taken back; and the tokens banned at their places.

    `first`: the place of the first of them. `is_exhausted`: too many tokens were taken back or banned at one place, or
    every token is banned at a place. `is_full`: the rows of its tokens take too much memory.
    """

    def __init__(self, phrases: BannedPhrases, job: Job) -> None:
        self.first = self.taken_back = 0
        self.is_exhausted = False
        self._phrases = phrases
        self._most = most_taken_back(job.max_tokens)
        self._size, self._most_bytes = 0, MAX_HELD_BYTES // job.samples
        self._pending, self._pending_place = phrases.begun, 0
        self._exact, self._folded = PhraseSearch(phrases.exact), PhraseSearch(phrases.folded)
        self._held: deque[_Held] = deque()
        self._banned: dict[int, tuple[int, ...]] = {}  # by place, never after the next one

    def banned(self, place: int) -> tuple[int, ...]:
        """The tokens that must not be sampled at a place."""
        return self._banned.get(place, ())

    @property
    def is_full(self) -> bool:
        """Always false for a few rows, which the bytes of one character can be."""
        return len(self._held) > _FEW_ROWS and self._size > self._most_bytes

    def append(self, token: Token) -> int:
        """Hold the next token. Returns how many of the last tokens are taken back, this one included."""
        place = self.first + len(self._held)
        if token.id in self.banned(place):  # nothing else could be sampled
            self.is_exhausted = True
            self.taken_back += 1
            return 1
        self._size += _row_bytes(token)
        self._held.append(_Held(token, self._pending, self._pending_place, self._exact.mark, self._folded.mark))
        begun = self._read(place, self._phrases.piece(place, token.id))
        return 0 if begun is None else self._take_back(max(begun, self.first))

    def release(self, everything: bool = False) -> list[Token]:
        """Remove and return the tokens that are never taken back."""
        begun = [place for place in (self._exact.begun, self._folded.begun) if place is not None]
        first = min([*begun, self._pending_place] if self._pending else begun, default=None)
        count = len(self._held) if first is None or everything else max(first - self.first, 0)
        released = [self._held.popleft().token for _ in range(count)]
        self._size -= sum(map(_row_bytes, released))
        self.first += count
        self._exact.forget(self.first)
        self._folded.forget(self.first)
        return released

    def _read(self, place: int, piece: bytes) -> int | None:
        """Search the bytes of the token at a place. Returns where a phrase begins that is complete now, if any.

        Of several phrases that end at the same character, that which begins last counts.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.setstate((self._pending, 0))
        start = self._pending_place if self._pending else place  # of the first character
        for character in decoder.decode(piece):
            found = [self._exact.add(character, start)]
            found += [self._folded.add(part, start) for part in character.casefold()]
            complete = [each for each in found if each is not None]
            if complete:
                return max(complete)
            start = place
        self._pending, self._pending_place = decoder.getstate()[0], start
        return None

    def _take_back(self, begun: int) -> int:
        count = self.first + len(self._held) - begun
        for _ in range(count):
            held = self._held.pop()
            self._size -= _row_bytes(held.token)
        self._pending, self._pending_place = held.pending, held.pending_place
        self._exact.go_back(held.exact)
        self._folded.go_back(held.folded)
        self._banned = {place: ids for place, ids in self._banned.items() if self.first <= place <= begun}
        self._banned[begun] = (*self.banned(begun), held.token.id)
        self.taken_back += count
        self.is_exhausted = self.taken_back > self._most or len(self._banned[begun]) >= MOST_BANNED
        return count


def _row_bytes(token: Token) -> int:
    return token.row.size if token.row else 0
