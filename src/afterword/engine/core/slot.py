"""The content of a slot, and the question that the prefix cache answers about it: which prefix of a prompt it holds."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field

import numpy as np

from afterword.engine.core.snapshots import TokenArray
from afterword.engine.protocol import ALTERNATIVE_BYTES, TOKEN_BYTES, Job, Token, score_count
from afterword.engine.token_row import is_packed


@dataclass(slots=True, eq=False)
class Slot:
    """The content of one slot.

    `head`: its first `min_prefix` tokens as bytes; empty if it has fewer. Texts with other heads share too little.
    `reusable`: the number of first tokens that were computed in passes on the grid, as for any other prompt.
    `scores[i]`: the score of token i + 1, with `alternatives` alternatives: the ids `reported`, or else the most likely
    ones. `last_used`: orders slots by their last use; 0 if the content is not worth keeping. `snapshots`: the numbers
    of its snapshots by length. `borders`: lengths at which a prefill pass ends and a snapshot is taken. `stored`: the
    number of first tokens that a `PrefixStore` has seen since a sequence took the slot, and `stored_snapshots` the
    lengths of snapshots. `state`: the state of a prefix that was read from a store and is in no slot of the runner yet,
    else None.
    """

    index: int
    min_prefix: int
    head: bytes = b""
    namespace: str = ""
    length: int = 0
    reusable: int = 0
    scores: list[Token] = field(default_factory=list)
    alternatives: int = 0
    reported: tuple[int, ...] = ()
    last_used: int = 0
    in_use: bool = False
    snapshots: dict[int, int] = field(default_factory=dict)
    borders: set[int] = field(default_factory=set)
    stored: int = 0
    stored_snapshots: set[int] = field(default_factory=set)
    state: object = None
    _buffer: TokenArray = field(default_factory=lambda: np.empty(64, np.int32))

    @property
    def tokens(self) -> TokenArray:
        """The tokens in the slot. Shape: (length,)."""
        return self._buffer[: self.length]

    @property
    def has_unstored(self) -> bool:
        """Whether it may have tokens or snapshots that a `PrefixStore` has not seen."""
        return self.reusable > self.stored or not self.stored_snapshots.issuperset(self.snapshots)

    def forget_stored(self) -> None:
        """Let a `PrefixStore` see everything again, so that it notes the use of what it holds."""
        self.stored, self.stored_snapshots = 0, set()

    @property
    def scores_size(self) -> int:
        """Approximate bytes of memory of the scores."""
        return len(self.scores) * (TOKEN_BYTES + ALTERNATIVE_BYTES * self.alternatives)

    def append(self, tokens: tuple[int, ...], grid: int) -> None:
        """Append tokens that were computed in one pass."""
        start, self.length = self.length, self.length + len(tokens)
        if self.length > len(self._buffer):
            self._buffer = np.resize(self._buffer, 2 * self.length)
        self._buffer[start : self.length] = tokens
        if start < self.min_prefix:
            self._update_head()
        if self.reusable == start and self.length % grid == 0:
            self.reusable = self.length

    def truncate(self, keep: int) -> None:
        """Delete everything after the first `keep` tokens."""
        self.length, self.reusable = keep, min(self.reusable, keep)
        self.stored = min(self.stored, keep)
        self.stored_snapshots = {length for length in self.stored_snapshots if length <= keep}
        del self.scores[score_count(keep) :]
        self.snapshots = {length: number for length, number in self.snapshots.items() if length <= keep}
        self._update_head()

    def copy(self, other: Slot, keep: int) -> None:
        """Replace the content with the first `keep` tokens of another slot."""
        self.namespace, self.last_used = other.namespace, other.last_used
        self.alternatives, self.reported = other.alternatives, other.reported
        self.length, self.reusable = keep, min(other.reusable, keep)
        self._buffer = np.resize(other.tokens, max(64, keep))
        self.scores = other.scores[: score_count(keep)]
        self.snapshots = {length: number for length, number in other.snapshots.items() if length <= keep}
        self.forget_stored()
        self._update_head()

    def longest_snapshot(self, most: int) -> int:
        """The largest length up to `most` with a snapshot; 0 if there is none."""
        return max((length for length in self.snapshots if length <= most), default=0)

    def _update_head(self) -> None:
        self.head = head(self.tokens, self.min_prefix)


@dataclass(frozen=True, slots=True)
class PrefixQuery:
    """A prompt to be computed, of which at most the first `max_tokens` tokens may come from a slot.

    `alternatives`: how many alternatives the scores must have; None if no scores are needed. `reported`: the ids that
    the alternatives must be, see `reported_key`; empty: the most likely ones. `head`: see `Slot`.
    """

    head: bytes
    namespace: str
    prompt: TokenArray
    max_tokens: int
    alternatives: int | None
    reported: tuple[int, ...] = ()

    @property
    def has_rows(self) -> bool:
        """Whether the scores have packed rows, which no slot keeps."""
        return is_packed(self.alternatives, self.reported)


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """The first `keep` tokens of a prompt are in `slot`. `scored`: with the scores of the tokens after the first."""

    slot: Slot
    keep: int
    scored: bool

    @property
    def scores(self) -> list[Token]:
        """The scores of the `keep` tokens after the first, while the slot is unchanged; empty unless `scored`."""
        return self.slot.scores[: self.keep] if self.scored else []


def reported_key(job: Job) -> tuple[int, ...]:
    """`PrefixQuery.reported`. For ids of each position by itself -1 and a hash: lists could take tens of megabytes."""
    if job.reported_at is None:
        return job.reported
    digest = hashlib.blake2b(digest_size=16)
    for ids in job.reported_at.prompt:
        digest.update(struct.pack(f"<{len(ids) + 1}i", -1, *ids))
    return -1, *struct.unpack("<2q", digest.digest())


def common_prefix(first: TokenArray, second: TokenArray) -> int:
    """The number of equal tokens at the beginning of two texts."""
    length = min(len(first), len(second))
    if not length or first[0] != second[0]:
        return 0
    differs = first[:length] != second[:length]
    at = int(differs.argmax())
    return at if differs[at] else length


def head(tokens: TokenArray, min_prefix: int) -> bytes:
    """The first `min_prefix` tokens as bytes; empty if there are fewer."""
    return tokens[:min_prefix].tobytes() if len(tokens) >= min_prefix else b""
