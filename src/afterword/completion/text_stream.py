"""Bytes of tokens to text that may be shown: whole characters only, and nothing of a stop string.

Offsets are counted in code points. A token whose bytes end inside a character, or whose text could still become
part of a stop string, is held back until that is decided; text is released in whole tokens.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TokenAtOffset(Generic[T]):
    """A token at its place: the offset of its first character, or of the character that it continues."""

    token: T
    offset: int


@dataclass(frozen=True, slots=True)
class ReleasedText(Generic[T]):
    """Text, and the tokens that it came from."""

    text: str
    tokens: tuple[TokenAtOffset[T], ...]


class TextStream(Generic[T]):
    """Tokens in, text out. Owner of one sample's undecided text. `start` is the offset of its first character.

    `begun` are the first bytes of that character, where the text before ends inside it.
    """

    def __init__(self, stops: StopStrings, start: int, begun: bytes = b"") -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder.setstate((begun, 0))
        self._stops = StopMatcher(stops)
        self._start = start  # offset of the first character that is not released
        self._text = ""
        self._held: deque[tuple[TokenAtOffset[T], int, bool]] = deque()  # token, end offset, ends a whole character
        self.stopped = False

    @property
    def end(self) -> int:
        """The offset after the last character so far."""
        return self._start + len(self._text)

    def push(self, token: T, piece: bytes, may_stop: bool = True) -> None:
        """Take a token and its bytes. Ignored once a stop string was found; one begins only where it may."""
        if not self.stopped and self._breaks_off(piece):
            self._break_off(may_stop)
        if self.stopped:
            return
        offset = self.end
        self._append(self._decoder.decode(piece), may_stop)
        whole = not self._decoder.getstate()[0]
        if offset < self.end or not self.stopped:
            self._held.append((TokenAtOffset(token, offset), self.end, whole))

    def release(self) -> ReleasedText[T]:
        """What may be shown by now."""
        safe = self.end if self.stopped else self.end - self._stops.held
        count, end = 0, self._start
        for index, (_, token_end, whole) in enumerate(self._held, 1):
            if token_end > safe:
                break
            if whole:
                count, end = index, token_end
        return self._release(count, end)

    def finish(self) -> ReleasedText[T]:
        """All that is left: nothing more will come."""
        if not self.stopped:
            self._break_off(may_stop=True)
        return self._release(len(self._held), self.end)

    def _breaks_off(self, piece: bytes) -> bool:
        """Whether the bytes before were no character after all, so that this piece begins with one of its own."""
        begun = self._decoder.getstate()[0]
        try:
            codecs.utf_8_decode(begun + piece[:1], "strict", False)
        except UnicodeDecodeError:
            return bool(begun)
        return False

    def _break_off(self, may_stop: bool) -> None:
        """Replace the bytes of an unfinished character. If all are from the text before, no stop string is in it."""
        self._append(self._decoder.decode(b"", final=True), may_stop and bool(self._held))

    def _append(self, text: str, may_stop: bool = True) -> None:
        found = self._stops.feed(text) if may_stop else None
        if found is None:
            self._text += text
            return
        self.stopped = True
        after, length = found
        self._text = (self._text + text[:after])[:-length]
        while self._held and self._held[-1][0].offset >= self.end:
            self._held.pop()

    def _release(self, count: int, end: int) -> ReleasedText[T]:
        size = end - self._start
        text, self._text = self._text[:size], self._text[size:]
        self._start = end
        return ReleasedText(text, tuple(self._held.popleft()[0] for _ in range(count)))


@dataclass(frozen=True, slots=True)
class StopStrings:
    """Stop strings, prepared once for all samples of a request. `borders` belong to `texts`."""

    texts: tuple[str, ...] = ()
    borders: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def prepare(cls, texts: Iterable[str]) -> StopStrings:
        """Prepare some texts."""
        distinct = tuple(dict.fromkeys(texts))
        return cls(distinct, tuple(map(_borders, distinct)))


class StopMatcher:
    """Finds the stop string that is complete first; of several that end together, the longest.

    A character at a time, so that the result does not depend on how text is cut into tokens. Of its own it keeps a
    number for each stop string.
    """

    def __init__(self, stops: StopStrings) -> None:
        self._stops = stops
        self._matched = [0] * len(stops.texts)

    @property
    def held(self) -> int:
        """How many of the last characters could be the beginning of a stop string."""
        return max(self._matched, default=0)

    def feed(self, text: str) -> tuple[int, int] | None:
        """Where in `text` a stop string ends, and its length; None if none does."""
        if not self._matched:
            return None
        for position, character in enumerate(text, 1):
            longest = max(self._advance(index, character) for index in range(len(self._matched)))
            if longest:
                return position, longest
        return None

    def _advance(self, index: int, character: str) -> int:
        """One character for one stop string (Knuth, Morris, Pratt); returns its length if it is complete."""
        stop, borders = self._stops.texts[index], self._stops.borders[index]
        matched = self._matched[index]
        while matched and stop[matched] != character:
            matched = borders[matched - 1]
        if stop[matched] == character:
            matched += 1
        complete = matched == len(stop)
        self._matched[index] = borders[matched - 1] if complete else matched
        return len(stop) if complete else 0


def _borders(stop: str) -> tuple[int, ...]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(stop)
    length = 0
    for index in range(1, len(stop)):
        while length and stop[length] != stop[index]:
            length = borders[length - 1]
        if stop[length] == stop[index]:
            length += 1
        borders[index] = length
    return tuple(borders)
