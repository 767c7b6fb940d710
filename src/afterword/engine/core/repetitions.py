"""The repetitions at the end of a sample's text, for the sampler DRY.

They are updated token by token, so that a long text costs one pass over an array for each token. Pure.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from afterword.engine.core.sampler_kernel import Ids
from afterword.engine.protocol import MAX_TAIL, Dry

_LONGEST = 1 + MAX_TAIL
_Breaker = tuple[frozenset[int], tuple[int, ...]]  # the ids of the first token, and the tokens after it


class Repetitions:
    """For each of the last tokens of a text: how many tokens up to it are equal to the last tokens of the text.

    Both texts lie within the last `Dry.last_n` tokens. Prompt and generated tokens are one text.
    """

    def __init__(self, dry: Dry, text: Sequence[int]) -> None:
        self._dry = dry
        self._window = len(text) if dry.last_n < 0 else dry.last_n
        self._breakers: defaultdict[int, list[_Breaker]] = defaultdict(list)  # by the id of the last token
        for heads, tail in dry.sequences:
            self._breakers[tail[-1]].append((frozenset(heads), tail))
        last = list(text[max(0, len(text) - self._window) :])
        self._tokens = np.array(last, np.int64)
        self._lengths = np.array(_suffix_lengths(last), np.int64)
        self._find_breaker(last)

    def copy(self) -> Repetitions:
        """An independent copy."""
        other = object.__new__(Repetitions)
        other._dry, other._window, other._breakers = self._dry, self._window, self._breakers
        other._tokens, other._lengths = self._tokens, self._lengths  # never changed
        other._unbroken, other._breaker = self._unbroken, self._breaker
        return other

    def add(self, token: int) -> None:
        """Append a token to the text."""
        tokens = np.append(self._tokens, token)
        lengths = np.where(tokens == token, np.append(0, self._lengths) + 1, 0)
        if self._dry.last_n >= 0 and len(tokens) > self._window:
            tokens, lengths = tokens[1:], np.minimum(lengths[1:], np.arange(1, len(tokens)))
        self._tokens, self._lengths = tokens, lengths
        if breaker := self._breaker_at_end(tokens[-_LONGEST:].tolist()):
            self._unbroken, self._breaker = 0, breaker
        else:
            self._unbroken += 1
            if self._breaker and self._unbroken + self._breaker > len(tokens):  # it begins before the window
                self._find_breaker(tokens.tolist())

    def continuations(self) -> tuple[Ids, Ids]:
        """The ids that would continue a repetition, and the length of the longest repetition that each continues.

        Only repetitions of at least `Dry.allowed_length` tokens count. Breakers of a single token continue none.
        """
        least = self._dry.allowed_length
        if len(self._tokens) <= least or self._unbroken < least:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        lengths = np.minimum(self._lengths[:-1], self._unbroken)
        ends = np.flatnonzero(lengths >= least)
        ids, places = np.unique(self._tokens[ends + 1], return_inverse=True)
        longest = np.zeros(len(ids), np.int64)
        np.maximum.at(longest, places, lengths[ends])
        kept = np.array([not has_bit(self._dry.breakers, token) for token in ids.tolist()], bool)
        return ids[kept], longest[kept]

    def _find_breaker(self, text: list[int]) -> None:
        """Note how many tokens are after the last breaker of a text, and how many it has. Without one: all, and 0."""
        for count in range(len(text)):
            if breaker := self._breaker_at_end(_end(text, len(text) - count)):
                self._unbroken, self._breaker = count, breaker
                return
        self._unbroken, self._breaker = len(text), 0

    def _breaker_at_end(self, text: list[int]) -> int:
        """The number of tokens of the shortest breaker with which a text ends, 0 if it ends with none."""
        if has_bit(self._dry.breakers, text[-1]):
            return 1
        found = (
            len(tail) + 1
            for heads, tail in self._breakers.get(text[-1], ())
            if len(text) > len(tail) and tuple(text[-len(tail) :]) == tail and text[-len(tail) - 1] in heads
        )
        return min(found, default=0)


class EarlierRepetitions:
    """The repetitions before some of the last tokens of a text, from which those before any of them are computed.

    The nearer to the end, the more of them are kept. So going back by some tokens adds fewer than twice as many anew,
    and the memory grows with the logarithm of the number of tokens to which one can go back.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[int, Repetitions]] = []  # by place

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, place: int, first: int, repetitions: Repetitions) -> None:
        """Note the repetitions before the token at a place. `first`: the first place that `take` may be called with."""
        self._kept.append((place, repetitions.copy()))
        least = max(each for each, _ in self._kept if each <= first)
        self._kept = [
            (each, known)
            for each, known in self._kept
            if each == least or (each > least and place - each < 2 * (each & -each))  # the lowest bit that is set
        ]

    def take(self, place: int) -> tuple[int, Repetitions]:
        """The last place up to `place` whose repetitions are known, and those. Forgets it and all later ones."""
        while self._kept[-1][0] > place:
            self._kept.pop()
        return self._kept.pop()


def _end(text: list[int], stop: int) -> list[int]:
    """The last tokens before `stop` that can be a breaker."""
    return text[max(0, stop - _LONGEST) : stop]


def has_bit(bits: bytes, index: int) -> bool:
    """Whether a bit is set, of which the lowest bit of the first byte is number 0."""
    return index >> 3 < len(bits) and bool(bits[index >> 3] >> (index & 7) & 1)


def _suffix_lengths(text: list[int]) -> list[int]:
    """For each token, how many tokens up to it are equal to the last tokens of the text: the Z-function backwards."""
    text = text[::-1]
    lengths = [0] * len(text)
    start = stop = 0  # of the match that reaches farthest
    for index in range(1, len(text)):
        length = min(lengths[index - start], stop - index) if index < stop else 0
        while index + length < len(text) and text[length] == text[index + length]:
            length += 1
        lengths[index] = length
        if index + length > stop:
            start, stop = index, index + length
    return [*lengths[:0:-1], len(text)] if text else []
