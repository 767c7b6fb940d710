"""The names of stored parts: keyed hashes of everything that a part's content depends on. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from afterword.engine.core.snapshots import TokenArray

Kind = Literal[b"W", b"E"]
"""Whole parts: keys and values of `PART_TOKENS` tokens. End parts: a recurrent state, and what a whole part lacks."""

_PURPOSE = b"Afterword prefix"  # at most 16 bytes
_NAME_BYTES = 20


@dataclass(frozen=True, slots=True)
class PartNames:
    """The names of one model's parts. `key`: the folder's secret. `fingerprint`: see `ModelInfo`."""

    key: bytes
    fingerprint: str

    def at(self, namespace: str, tokens: TokenArray, lengths: range, kind: Kind) -> Iterator[str]:
        """The names of the parts that end at these lengths, which must be ascending. Hashes every token once."""
        running = hashlib.blake2b(key=self.key, digest_size=_NAME_BYTES, person=_PURPOSE)
        running.update(f"{self.fingerprint}\n{namespace}\n".encode())
        data, done = memoryview(tokens.astype("<i4").tobytes()), 0
        for length in lengths:
            running.update(data[4 * done : 4 * length])
            done = length
            name = running.copy()
            name.update(kind)  # one byte after a whole number of four-byte tokens: no other text has this hash's input
            yield name.hexdigest()
