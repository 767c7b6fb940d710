"""The prefix cache: the runner's slots, with the tokens and scores that they hold after their sequences have ended.

A slot holds the state of a text's tokens and, if a job requested them, the tokens' scores. A new prompt starts from
the slot with the longest matching prefix. It continues in place if the slot is free and little else would be lost.
Otherwise the prefix is copied to the least recently used free slot. Namespaces share nothing.

The cache is a table, not a tree. There are at most a few hundred slots, and comparing a prompt with a slot takes
microseconds. Every slot has its own memory, so a tree's inner nodes would own nothing.

Pure: it decides and records; the runner executes the slot operations. The scheduler owns it, in the engine's thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from afterword.engine.core.forward_batch import CopyPrefix, Truncate
from afterword.engine.protocol import ALTERNATIVE_BYTES, TOKEN_BYTES, Job, Token, score_count, scored_positions

TokenArray = NDArray[np.int32]

MAX_SCORE_BYTES = 256 * 2**20
"""The most bytes of memory for the scores of all slots. Above it, the least recently used scores are deleted."""


@dataclass(slots=True, eq=False)
class Slot:
    """The content of one slot.

    `head`: its first `min_prefix` tokens as bytes; empty if it has fewer. Texts with other heads share too little.
    `reusable`: the number of first tokens that were computed in passes on the grid, as for any other prompt.
    `scores[i]`: the score of token i + 1, with `alternatives` alternatives. `last_used`: orders slots by their last
    use; 0 if the content is not worth keeping.
    """

    index: int
    min_prefix: int
    head: bytes = b""
    namespace: str = ""
    length: int = 0
    reusable: int = 0
    scores: list[Token] = field(default_factory=list)
    alternatives: int = 0
    last_used: int = 0
    in_use: bool = False
    _buffer: TokenArray = field(default_factory=lambda: np.empty(64, np.int32))

    @property
    def tokens(self) -> TokenArray:
        """The tokens in the slot. Shape: (length,)."""
        return self._buffer[: self.length]

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
        del self.scores[score_count(keep) :]
        self._update_head()

    def copy(self, other: Slot, keep: int) -> None:
        """Replace the content with the first `keep` tokens of another slot."""
        self.namespace, self.alternatives, self.last_used = other.namespace, other.alternatives, other.last_used
        self.length, self.reusable = keep, min(other.reusable, keep)
        self._buffer = np.resize(other.tokens, max(64, keep))
        self.scores = other.scores[: score_count(keep)]
        self._update_head()

    def _update_head(self) -> None:
        self.head = head(self.tokens, self.min_prefix)


@dataclass(frozen=True, slots=True)
class PrefixQuery:
    """A prompt to be computed, of which at most the first `max_tokens` tokens may come from a slot.

    `alternatives`: how many alternatives the scores must have; None if no scores are needed. `head`: see `Slot`.
    """

    head: bytes
    namespace: str
    prompt: TokenArray
    max_tokens: int
    alternatives: int | None


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


class PrefixCache:
    """Owner of all slots and of the slot operations that the next pass begins with. One thread calls everything.

    `count`: number of slots. `grid`, `min_shared_tokens`, `can_truncate`: see `Runner`.
    """

    def __init__(self, count: int, grid: int, min_shared_tokens: int, can_truncate: bool) -> None:
        self._slots = [Slot(index, min_shared_tokens) for index in range(count)]
        self._grid = grid
        self._min_shared_tokens = min_shared_tokens
        self._can_truncate = can_truncate
        self._clock = 0  # counts uses of slots
        self._operations: list[CopyPrefix | Truncate] = []

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, index: int) -> Slot:
        return self._slots[index]

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._slots)

    @property
    def has_free_slot(self) -> bool:
        return not all(slot.in_use for slot in self._slots)

    def prefix_query(self, job: Job) -> PrefixQuery:
        """The query for a job's prompt.

        The prompt's last token may come from a slot only if the job samples nothing: samples need that token's logits.
        """
        prompt = np.array(job.prompt, np.int32)
        scores_only = job.max_tokens == 0 and job.prompt_alternatives is not None
        max_kept = len(prompt) if scores_only else len(prompt) - 1
        return PrefixQuery(
            head(prompt, self._min_shared_tokens), job.namespace, prompt, max_kept, job.prompt_alternatives
        )

    def resume_query(self, job: Job, tokens: tuple[int, ...], max_kept: int) -> PrefixQuery:
        """The query for tokens that were already computed for a job. Their scores were already returned."""
        array = np.array(tokens, np.int32)
        return PrefixQuery(head(array, self._min_shared_tokens), job.namespace, array, max_kept, None)

    def find(self, query: PrefixQuery) -> PrefixHit | None:
        """The longest reusable prefix of a prompt that any slot holds."""
        same_head = [slot for slot in self._slots if slot.head == query.head and query.head]
        keep, slot = max(
            ((self._reusable_prefix(slot, query), slot) for slot in same_head),
            key=lambda pair: pair[0],
            default=(0, None),
        )
        if slot is None or not keep:
            return None
        return PrefixHit(slot, keep, query.alternatives is not None)

    def take(self, query: PrefixQuery, hit: PrefixHit | None) -> Slot:
        """Take a slot for a prompt and fill it with the prefix that was found. A slot must be free."""
        self._clock += 1
        slot, keep, scores = self._target_slot(hit), hit.keep if hit else 0, hit.scores if hit else []
        if hit and hit.slot is not slot:
            self._copy_prefix(hit.slot, slot, keep)
            hit.slot.last_used = self._clock
        else:
            self.truncate(slot, keep)
        slot.in_use, slot.last_used, slot.namespace = True, self._clock, query.namespace
        # Without a hit a scored prompt has no scores yet, and the last score can belong to another text's token.
        slot.scores = scores or slot.scores[: score_count(keep)]
        if not slot.scores:
            slot.alternatives = query.alternatives or 0
        return slot

    def mark_used(self, slot: Slot) -> None:
        """Record a use of a slot's content."""
        self._clock += 1
        slot.last_used = self._clock

    def truncate(self, slot: Slot, keep: int) -> None:
        """Delete everything in a slot after its first `keep` tokens."""
        if keep < slot.length:
            self._operations.append(Truncate(slot.index, keep))
            slot.truncate(keep)

    def release(self, slot: Slot, redundant: bool) -> None:
        """Mark a slot as free; its content stays. `redundant`: another slot holds most of the content too."""
        self._clock += 1
        slot.in_use, slot.last_used = False, 0 if redundant else self._clock

    def computed(self, slot: Slot, tokens: tuple[int, ...], scores: list[Token]) -> None:
        """Record tokens that a pass has computed, and the score of the token that follows each of them."""
        if scores and len(slot.scores) == slot.length and self._reserve_score_bytes(slot, len(scores)):
            slot.scores.extend(scores)
        slot.append(tokens, self._grid)

    def _reserve_score_bytes(self, slot: Slot, scores: int) -> bool:
        """Delete scores of free slots until `scores` more fit into `MAX_SCORE_BYTES`. Returns whether they fit."""
        available = MAX_SCORE_BYTES - sum(each.scores_size for each in self._slots)
        available -= scores * (TOKEN_BYTES + ALTERNATIVE_BYTES * slot.alternatives)
        for free in sorted((each for each in self._slots if not each.in_use and each.scores), key=_eviction_order):
            if available >= 0:
                break
            available += free.scores_size
            free.scores = []
        return available >= 0

    def compact(self) -> None:
        """Move used slots closer together: some libraries compute adjacent slots together and others one by one.

        One used slot moves into a gap, a free slot between used ones. The gap's content moves to the least recently
        used other free slot. If its content is worth keeping and there is no such slot, nothing moves.
        """
        used = [slot.index for slot in self._slots if slot.in_use]
        gaps = [index for index in range(used[0], used[-1]) if index not in used] if used else []
        if not gaps:
            return
        left = [index for index in used if index < gaps[0]]
        outer, gap = (used[-1], gaps[0]) if 2 * len(left) >= len(used) else (used[0], gaps[-1])
        moved, free = self._slots[outer], self._slots[gap]
        others = [slot for slot in self._slots if not slot.in_use and slot is not free]
        if free.last_used and free.length:
            if not others:
                return
            self._copy_prefix(free, min(others, key=_eviction_order), free.length)
        self._operations += [CopyPrefix(outer, gap, moved.length), Truncate(outer, 0)]
        free.truncate(0)
        free.last_used = 0
        moved.index, free.index = gap, outer
        self._slots[gap], self._slots[outer] = moved, free

    @property
    def slots_being_changed(self) -> set[int]:
        """The indexes of slots that pending operations will change."""
        return {each.target if isinstance(each, CopyPrefix) else each.slot for each in self._operations}

    def take_operations(self) -> tuple[CopyPrefix | Truncate, ...]:
        """Remove and return the pending operations, which the next pass begins with."""
        operations, self._operations = tuple(self._operations), []
        return operations

    def check(self) -> None:
        """Raise `AssertionError` if the table is inconsistent."""
        for index, slot in enumerate(self._slots):
            assert slot.index == index, "a slot's index is its position in the table"
            assert 0 <= slot.reusable <= slot.length == len(slot.tokens), "a slot reuses only tokens that it holds"
            assert len(slot.scores) <= slot.length, "a slot has at most one score for each token"
            assert len({len(score.top) for score in slot.scores}) <= 1, "scores have equally many alternatives"
            expected = [int(token) for token in slot.tokens[scored_positions(0, len(slot.scores))]]
            assert [score.id for score in slot.scores][: len(expected)] == expected, "scores belong to their tokens"

    def expected_prefix(self, query: PrefixQuery, other: PrefixQuery) -> int:
        """How many of a prompt's tokens will be reusable once another prompt is completely computed."""
        if not query.head or other.head != query.head or other.namespace != query.namespace or not self._can_truncate:
            return 0
        if query.alternatives is not None and (other.alternatives is None or other.alternatives < query.alternatives):
            return 0
        shared = common_prefix(query.prompt, other.prompt)
        return self._reusable_length(shared if query.alternatives is None else score_count(shared), query)

    def _reusable_length(self, usable: int, query: PrefixQuery) -> int:
        """How many of the first `usable` tokens are reusable: a multiple of the grid, 0 if too few to be worth it."""
        keep = min(usable, query.max_tokens) // self._grid * self._grid
        return keep if keep >= self._min_shared_tokens else 0

    def _reusable_prefix(self, slot: Slot, query: PrefixQuery) -> int:
        if slot.namespace != query.namespace:
            return 0
        shared = common_prefix(slot.tokens[: slot.reusable], query.prompt)
        if query.alternatives is not None:
            # The row of a reused token is not computed again, so the score of the next token must be known.
            shared = min(score_count(shared), len(slot.scores)) if slot.alternatives >= query.alternatives else 0
        keep = self._reusable_length(shared, query)
        return keep if self._can_truncate or keep == slot.length else 0

    def _target_slot(self, hit: PrefixHit | None) -> Slot:
        oldest = self._least_recently_used()
        if hit and not hit.slot.in_use and (hit.slot is oldest or hit.slot.length - hit.keep < self._min_shared_tokens):
            return hit.slot
        return oldest

    def _least_recently_used(self) -> Slot:
        return min((slot for slot in self._slots if not slot.in_use), key=_eviction_order)

    def _copy_prefix(self, source: Slot, target: Slot, keep: int) -> None:
        self._operations.append(CopyPrefix(source.index, target.index, keep))
        target.copy(source, keep)


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


def _eviction_order(slot: Slot) -> tuple[int, int, int]:
    """The sort key of eviction: the slot with the smallest key is evicted first."""
    return slot.last_used, slot.length, slot.index
