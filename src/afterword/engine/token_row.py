"""What is reported about one position: chosen ids, or all of the vocabulary, packed in bytes.

A vocabulary can have 262,144 tokens. As pairs they would take 30 MB of memory for each position; packed they take 3 MB.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

MAX_LISTED = 1000
"""The most alternatives that a token has as pairs. More of them are packed."""

PACKED_BYTES = 12
"""Bytes of one packed alternative: a 32-bit id and a 64-bit log probability."""

MAX_HELD_BYTES = 256 * 2**20
"""The most bytes of rows that a request may hold back, because their text is not decided yet."""

_HIGHEST_COUNT = 2**31 - 1
_SLICE = 64


class TokenRow(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The `count` most likely tokens, most likely first; of equally likely ones the lower id first.

    `ids`: 32-bit integers. `values`: their log probabilities, 64-bit floats. Both are arrays in the machine's byte
    order. While a row waits in the worker, `ids` is empty and `values` are the 32-bit logits of the whole vocabulary.
    """

    count: int
    values: bytes
    ids: bytes = b""

    @property
    def size(self) -> int:
        """Bytes of memory."""
        return len(self.ids) + len(self.values)

    def pairs(self, count: int = _HIGHEST_COUNT) -> Iterator[tuple[int, float]]:
        """The first `count` ids with their log probabilities."""
        for _, ids, values in self.slices(count, _SLICE):
            yield from zip(ids, values, strict=True)

    def slices(self, count: int, size: int) -> Iterator[tuple[int, list[int], list[float]]]:
        """The first `count` alternatives in slices: the index of the first, the ids, the log probabilities."""
        ids = memoryview(self.ids).cast("i")
        values: Any = memoryview(self.values).cast("d")  # a view of floats, which its type does not say
        end = min(count, len(ids))
        for start in range(0, end, size):
            stop = min(start + size, end)
            yield start, ids[start:stop].tolist(), values[start:stop].tolist()


class ReportedAt(msgspec.Struct, frozen=True, array_like=True):
    """Token ids that are reported at each position. Positions beyond the lists have none.

    `prompt`: a list for each token of the prompt, of which the first is not used; empty if the prompt is not scored.
    `generated`: lists for generated tokens, from the first on.
    """

    prompt: tuple[tuple[int, ...], ...]
    generated: tuple[tuple[int, ...], ...]

    @property
    def count(self) -> int:
        """The number of ids in all lists."""
        return sum(map(len, self.prompt)) + sum(map(len, self.generated))


def is_packed(alternatives: int | None, reported: object = ()) -> bool:
    """Whether this many alternatives are packed. `reported`: the ids, where the request has chosen them."""
    return alternatives is not None and alternatives > MAX_LISTED and not reported
