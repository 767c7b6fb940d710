"""Finds the tokens in which breakers of the sampler DRY are written, as `engine.protocol.Dry` needs them.

A breaker can be inside one token, or begin at the end of one and continue in the next. The rest of it is tokenized like
a text of its own, as in llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from afterword.errors import RequestError

Ids = tuple[int, ...]

_MOST_HEADS = 2**20  # token ids in the jobs of a request
_SEPARATOR = b"\xff"  # no byte of UTF-8, so no breaker has it


@dataclass(frozen=True, slots=True)
class Breakers:
    """`inside`: one bit for each token that contains a breaker. `begun`: texts that complete a breaker, each with the
    tokens that end with the part before it.
    """

    inside: bytes = b""
    begun: tuple[tuple[str, Ids], ...] = ()

    def check(self, prompts: int) -> None:
        """Refuse breakers whose tokens take too much memory for this many prompts. Raises `RequestError`."""
        if prompts * sum(len(heads) for _, heads in self.begun) > _MOST_HEADS:
            raise RequestError(
                "The texts of 'dry_sequence_breakers' can begin in too many tokens of the vocabulary for so many "
                "prompts. (HINT: send shorter texts or fewer prompts.)",
                param="dry_sequence_breakers",
            )

    @property
    def rests(self) -> tuple[str, ...]:
        """The distinct texts that must be tokenized."""
        return tuple(dict.fromkeys(rest for rest, _ in self.begun))

    def sequences(self, tokens: Mapping[str, Ids], most: int) -> tuple[tuple[Ids, Ids], ...]:
        """`Dry.sequences`, from the tokens of `rests`, of which the first `most` are compared."""
        return tuple((heads, tokens[rest][:most]) for rest, heads in self.begun if tokens[rest])


@lru_cache(8)  # megabytes each with a large vocabulary
def find_breakers(pieces: tuple[bytes, ...], breakers: tuple[str, ...]) -> Breakers:
    """The tokens of a vocabulary in which breakers are written. `pieces`: the bytes of each token.

    Empty breakers are skipped.
    """
    vocabulary = _SEPARATOR + _SEPARATOR.join(pieces) + _SEPARATOR
    starts = [0]
    for piece in pieces:
        starts.append(starts[-1] + len(piece) + 1)
    inside: set[int] = set()
    begun = []
    for breaker in filter(None, breakers):
        whole = set(_tokens_at(_places(vocabulary, breaker.encode()), starts))
        inside |= whole
        for cut in range(1, len(breaker)):
            ends = _places(vocabulary, breaker[:cut].encode() + _SEPARATOR)
            if heads := tuple(token for token in _tokens_at(ends, starts) if token not in whole):
                begun.append((breaker[cut:], heads))
    return Breakers(bit_set(inside, len(pieces)), tuple(begun))


def bit_set(ids: Iterable[int], size: int) -> bytes:
    """One bit for each number below `size`, the lowest bit of the first byte for 0: whether it is among `ids`."""
    bits = bytearray((size + 7) // 8)
    for each in ids:
        bits[each >> 3] |= 1 << (each & 7)
    return bytes(bits)


def _places(text: bytes, part: bytes) -> Iterator[int]:
    place = text.find(part)
    while place >= 0:
        yield place
        place = text.find(part, place + 1)


def _tokens_at(places: Iterable[int], starts: list[int]) -> Iterator[int]:
    """The tokens at ascending places of the joined vocabulary, each once. `starts`: the separator before each token."""
    token = -1
    for place in places:
        if token >= 0 and place < starts[token + 1]:
            continue
        token = max(token, 0)
        while starts[token + 1] <= place:
            token += 1
        yield token
