"""Decodes the bytes of tokens to text that may be sent, and matches stop strings (`StopMatcher`).

Text is sent in whole characters and without stop strings. Offsets count code points. A token is held back while its
bytes end inside a character, or while its text could still become part of a stop string. Text is released in whole
tokens. Each `TextStream` owns the held text of one sample.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec

T = TypeVar("T")


class TokenAtOffset(msgspec.Struct, Generic[T], frozen=True):
    """A token with the offset of its first character, or of the character that it continues."""

    token: T
    offset: int


class ReleasedText(msgspec.Struct, Generic[T], frozen=True):
    """Text, and the tokens that it was decoded from."""

    text: str
    tokens: tuple[TokenAtOffset[T], ...]


class TextStream(Generic[T]):
    """Decodes one sample's tokens and holds back text that may not be sent yet.

    `start`: the offset of the first character. `pending`: the first bytes of that character, if the text before ends
    inside it.
    """

    def __init__(self, stops: StopStrings, start: int, pending: bytes = b"") -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder.setstate((pending, 0))
        self._whole = not pending  # the decoder holds no start of a character
        self._stops = StopMatcher(stops)
        self._includes_stop = stops.included
        self._start = start  # offset of the first unreleased character
        self._text = ""
        self._held: deque[tuple[TokenAtOffset[T], int, bool]] = deque()  # token, end offset, ends a whole character
        self._may_stop = True
        self.stopped = False

    @property
    def start(self) -> int:
        """The offset of the first unreleased character."""
        return self._start

    @property
    def end(self) -> int:
        """The offset after the last decoded character."""
        return self._start + len(self._text)

    def push(self, token: T, piece: bytes, may_stop: bool = True) -> None:
        """Add a token and its bytes. Ignored after a stop string.

        `may_stop`: whether a stop string that is complete with this token ends the text. It may begin in earlier tokens
        that could not end the text themselves.
        """
        self._may_stop = may_stop
        if not self.stopped and self._interrupts_character(piece):
            self._flush_decoder()
        if self.stopped:
            return
        offset = self.end
        self._append(self._decoder.decode(piece))
        self._whole = not self._decoder.getstate()[0]
        end = self.end
        if offset < end or not self.stopped:  # a token whose text is cut off by the stop string is not reported
            self._held.append((TokenAtOffset(token, offset), end, self._whole))

    def release(self) -> ReleasedText[T]:
        """Release the tokens with decided text."""
        safe = self.end if self.stopped else self.end - self._stops.held
        count, end = 0, self._start
        for index, (_, token_end, whole) in enumerate(self._held, 1):
            if token_end > safe:
                break
            if whole:
                count, end = index, token_end
        return self._release(count, end)

    def finish(self) -> ReleasedText[T]:
        """Release all remaining tokens, at the end of the sample."""
        if not self.stopped:
            self._flush_decoder()
        return self._release(len(self._held), self.end)

    def _interrupts_character(self, piece: bytes) -> bool:
        """Whether the decoder holds the start of a character that the first byte of `piece` cannot continue."""
        if self._whole:
            return False
        pending = self._decoder.getstate()[0]
        try:
            codecs.utf_8_decode(pending + piece[:1], "strict", False)
        except UnicodeDecodeError:
            return True
        return False

    def _flush_decoder(self) -> None:
        """Decode an incomplete character as U+FFFD.

        A token that ends inside a character is always held. If no token is held, the bytes of the character come from
        the text before `start`, which is not searched for stop strings.
        """
        self._append(self._decoder.decode(b"", final=True), searched=bool(self._held))
        self._whole = True

    def _append(self, text: str, searched: bool = True) -> None:
        found = self._stops.feed(text, self._may_stop) if searched else None
        if found is None:
            self._text += text
            return
        self.stopped = True
        after, length = found
        self._text += text[:after]
        if not self._includes_stop:
            self._text = self._text[:-length]
        while self._held and self._held[-1][0].offset >= self.end:
            self._held.pop()

    def _release(self, count: int, end: int) -> ReleasedText[T]:
        size = end - self._start
        text, self._text = self._text[:size], self._text[size:]
        self._start = end
        return ReleasedText(text, tuple([self._held.popleft()[0] for _ in range(count)]))


def incomplete_character(data: bytes) -> bytes:
    """The last bytes, up to 3, if they are the start of an incomplete UTF-8 character; else b""."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(data[-3:])
    return decoder.getstate()[0]


@dataclass(frozen=True, slots=True)
class StopStrings:
    """Stop strings, prepared once for all samples of a request. `failures[i]` is `_failure_function(texts[i])`.

    `included`: the text includes the stop string that ends it.
    """

    texts: tuple[str, ...] = ()
    failures: tuple[tuple[int, ...], ...] = ()
    included: bool = False

    @classmethod
    def prepare(cls, texts: Iterable[str], included: bool = False) -> StopStrings:
        distinct = tuple(dict.fromkeys(texts))
        return cls(distinct, tuple(map(_failure_function, distinct)), included)


class StopMatcher:
    """Finds the stop string that is complete first; of several that end at the same character, the longest.

    It reads one character at a time, so that the result does not depend on how text is cut into tokens. Its state is
    one number for each stop string: how many of its first characters are matched.
    """

    def __init__(self, stops: StopStrings) -> None:
        self._stops = stops
        self._matched = [0] * len(stops.texts)

    @property
    def held(self) -> int:
        """How many of the last characters could be the start of a stop string."""
        return max(self._matched) if self._matched else 0

    def feed(self, text: str, may_stop: bool = True) -> tuple[int, int] | None:
        """The position in `text` after the first complete stop string, and its length; None if none is complete.

        Without `may_stop`, stop strings that are complete in `text` are passed over.
        """
        if not self._matched:
            return None
        for position, character in enumerate(text, 1):
            longest = max(self._advance(index, character) for index in range(len(self._matched)))
            if longest and may_stop:
                return position, longest
        return None

    def _advance(self, index: int, character: str) -> int:
        """Match one character with one stop string (Knuth, Morris, Pratt). Returns its length if complete, else 0."""
        stop, failures = self._stops.texts[index], self._stops.failures[index]
        matched = self._matched[index]
        while matched and stop[matched] != character:
            matched = failures[matched - 1]
        if stop[matched] == character:
            matched += 1
        complete = matched == len(stop)
        self._matched[index] = failures[matched - 1] if complete else matched
        return len(stop) if complete else 0


def _failure_function(stop: str) -> tuple[int, ...]:
    """For each prefix, the length of its longest proper prefix that is also its suffix (Knuth, Morris, Pratt)."""
    failures = [0] * len(stop)
    length = 0
    for index in range(1, len(stop)):
        while length and stop[length] != stop[index]:
            length = failures[length - 1]
        if stop[length] == stop[index]:
            length += 1
        failures[index] = length
    return tuple(failures)
