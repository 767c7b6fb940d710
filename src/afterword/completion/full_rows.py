"""Entries of `top_logprobs` and `prompt_logprobs` with more alternatives than are listed, made in parts.

The whole entry of a large vocabulary as a dictionary would take 60 MB of memory and some tenths of a second. The loops
are written for speed: a vocabulary can have 262,144 tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from afterword.engine.protocol import Token

LOWEST = -9999.0
"""Replaces log probabilities that are not finite, which JSON cannot express."""

PART_ENTRIES = 1024
"""The number of alternatives in a part: one or two milliseconds of work."""

Ranked = tuple[int, float, int]
"""Id, log probability and rank of an alternative."""


@dataclass(frozen=True, slots=True)
class FullRow:
    """An entry about one token with a row: the token itself, then the alternatives, most likely first.

    `make`: the members for some alternatives. `pieces`: the bytes of tokens, of which only the first with the same
    bytes stays; None: all stay.
    """

    token: Token
    count: int
    make: Callable[[Iterable[Ranked]], dict[str, Any]]
    pieces: Sequence[bytes] | None

    def parts(self) -> Iterator[dict[str, Any]]:
        """The members of the entry in parts, each made on demand."""
        assert self.token.row is not None
        assert self.token.logprob is not None
        own, pieces = self.token.id, self.pieces
        found = self.make([(own, self.token.logprob, self.token.rank)])
        seen = {own} if pieces is None else {pieces[own]}
        for start, ids, values in self.token.row.slices(self.count, PART_ENTRIES):
            ranked: Iterable[Ranked] = zip(ids, values, range(start + 1, start + 1 + len(ids)), strict=True)
            if pieces is None:
                ranked = [each for each in ranked if each[0] != own]
            else:
                ranked = list(_first_of_equals(ranked, pieces, seen))
            if part := found | self.make(ranked):
                yield part
            found = {}

    def whole(self) -> dict[str, Any]:
        """All members."""
        return dict(chain.from_iterable(part.items() for part in self.parts()))


def _first_of_equals(ranked: Iterable[Ranked], pieces: Sequence[bytes], seen: set[Any]) -> Iterator[Ranked]:
    for each in ranked:
        piece = pieces[each[0]]
        if piece not in seen:
            seen.add(piece)
            yield each


def finite_value(logprob: float) -> float:
    """The log probability, or `LOWEST` if it is not finite."""
    return logprob if math.isfinite(logprob) else LOWEST


def finite(entries: dict[str, float]) -> dict[str, float]:
    """`entries` with finite values. Others are rare, and one sum finds them faster than a check of each."""
    if math.isfinite(sum(entries.values())):
        return entries
    return {name: finite_value(value) for name, value in entries.items()}
