"""Entries of `top_logprobs` and `prompt_logprobs` with more alternatives than are listed, made in parts.

The whole entry of a large vocabulary as a dictionary would take 60 MB of memory and a tenth of a second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from afterword.engine.protocol import Token

PART_ENTRIES = 2048
"""The number of alternatives in a part."""

_Entry = tuple[str, Any]


@dataclass(frozen=True, slots=True)
class FullRow:
    """An entry about one token with a row: the token itself, then the alternatives, most likely first.

    `make`: the name and the value of an alternative, from id, log probability and rank. `pieces`: the bytes of tokens;
    of tokens with the same bytes the first stays. None: names differ for all of them.
    """

    token: Token
    count: int
    make: Callable[[int, float, int | None], _Entry]
    pieces: Sequence[bytes] | None

    def parts(self) -> Iterator[dict[str, Any]]:
        """The members of the entry in parts, each made on demand. There is at least one."""
        entries = self._entries()
        while part := dict(islice(entries, PART_ENTRIES)):
            yield part

    def whole(self) -> dict[str, Any]:
        """All members."""
        return dict(chain.from_iterable(part.items() for part in self.parts()))

    def _entries(self) -> Iterator[_Entry]:
        assert self.token.row is not None
        assert self.token.logprob is not None
        own, pieces = self.token.id, self.pieces
        yield self.make(own, self.token.logprob, None)
        pairs = enumerate(self.token.row.pairs(self.count), 1)
        if pieces is None:
            yield from (self.make(other, value, rank) for rank, (other, value) in pairs if other != own)
            return
        seen = {pieces[own]}
        for rank, (other, value) in pairs:
            if pieces[other] not in seen:
                seen.add(pieces[other])
                yield self.make(other, value, rank)
