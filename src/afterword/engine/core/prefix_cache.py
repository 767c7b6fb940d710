"""The prefix cache: what the runner's slots hold, beyond the life of the sequences that put it there.

A slot holds the state of a text's tokens and, where they were asked for, the tokens' scores. A new prompt starts from
whichever slot agrees with its beginning: in place if nobody holds that slot and nothing worth keeping is lost, else
from a copy in the slot that was not used for the longest time. Nothing is shared between namespaces.

This is a table, not a tree: there are at most a few hundred slots, comparing a prompt with one takes microseconds, and
where every slot has its own memory a tree's inner nodes would own nothing.
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
"""Bytes that the scores of all slots may take. Beyond it those that were not used for the longest time are given up."""


@dataclass(slots=True, eq=False)
class Slot:
    """What one slot holds.

    `head` are its first `min_prefix` tokens, if there are as many: texts with other heads share too little. `sound`: so
    many of its tokens were computed as the beginning of any prompt would be. `scores[i]` is the score of token i + 1,
    each with `breadth` alternatives. `last_used` orders slots by their last use, 0 where nothing is lost.
    """

    index: int
    min_prefix: int
    head: bytes = b""
    namespace: str = ""
    length: int = 0
    sound: int = 0
    scores: list[Token] = field(default_factory=list)
    breadth: int = 0
    last_used: int = 0
    in_use: bool = False
    _buffer: TokenArray = field(default_factory=lambda: np.empty(64, np.int32))

    @property
    def tokens(self) -> TokenArray:
        """The tokens whose state is held."""
        return self._buffer[: self.length]

    @property
    def scores_size(self) -> int:
        """About how many bytes of memory the scores take."""
        return len(self.scores) * (TOKEN_BYTES + ALTERNATIVE_BYTES * self.breadth)

    def append(self, tokens: tuple[int, ...], grid: int) -> None:
        """Tokens have been computed in one pass."""
        start, self.length = self.length, self.length + len(tokens)
        if self.length > len(self._buffer):
            self._buffer = np.resize(self._buffer, 2 * self.length)
        self._buffer[start : self.length] = tokens
        if start < self.min_prefix:
            self._name()
        if self.sound == start and self.length % grid == 0:
            self.sound = self.length

    def truncate(self, keep: int) -> None:
        """Forget what comes after the first `keep` tokens."""
        self.length, self.sound = keep, min(self.sound, keep)
        del self.scores[score_count(keep) :]
        self._name()

    def copy(self, other: Slot, keep: int) -> None:
        """Hold the first `keep` tokens of another slot, and nothing else."""
        self.namespace, self.breadth, self.last_used = other.namespace, other.breadth, other.last_used
        self.length, self.sound = keep, min(other.sound, keep)
        self._buffer = np.resize(other.tokens, max(64, keep))
        self.scores = other.scores[: score_count(keep)]
        self._name()

    def _name(self) -> None:
        self.head = head(self.tokens, self.min_prefix)


@dataclass(frozen=True, slots=True)
class PrefixQuery:
    """A prompt to be computed, of which at most the first `max_tokens` tokens may come from a slot.

    `alternatives`: how many the scores of its tokens must have; None if no scores are wanted. `head`: see `Slot`.
    """

    head: bytes
    namespace: str
    prompt: TokenArray
    max_tokens: int
    alternatives: int | None


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """The first `keep` tokens of a prompt are in a slot; `scored`: with the scores of the tokens after the first."""

    slot: Slot
    keep: int
    scored: bool

    @property
    def scores(self) -> list[Token]:
        """Those scores, of `keep` tokens, as long as the slot is as it was found."""
        return self.slot.scores[: self.keep] if self.scored else []


class PrefixCache:
    """Owner of all slots and of the moves between them that the next pass begins with."""

    def __init__(self, count: int, grid: int, least: int, rewinds: bool) -> None:
        self._all = [Slot(index, least) for index in range(count)]
        self._grid = grid
        self._least = least
        self._rewinds = rewinds
        self._clock = 0
        self._operations: list[CopyPrefix | Truncate] = []

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, index: int) -> Slot:
        return self._all[index]

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._all)

    @property
    def has_free_slot(self) -> bool:
        """Whether a slot can be taken."""
        return not all(slot.in_use for slot in self._all)

    def prefix_query(self, job: Job) -> PrefixQuery:
        """What may be found of a job's prompt. Its last token may not where samples depend on that one's logits."""
        prompt = np.array(job.prompt, np.int32)
        scores_only = job.max_tokens == 0 and job.prompt_alternatives is not None
        most = len(prompt) if scores_only else len(prompt) - 1
        return PrefixQuery(head(prompt, self._least), job.namespace, prompt, most, job.prompt_alternatives)

    def resume_query(self, job: Job, tokens: tuple[int, ...], most: int) -> PrefixQuery:
        """What may be found of tokens that were computed for a job before; their scores are not wanted again."""
        array = np.array(tokens, np.int32)
        return PrefixQuery(head(array, self._least), job.namespace, array, most, None)

    def find(self, query: PrefixQuery) -> PrefixHit | None:
        """The longest useful beginning of a prompt that a slot holds."""
        alike = [slot for slot in self._all if slot.head == query.head and query.head]
        keep, slot = max(
            ((self._useful(slot, query), slot) for slot in alike), key=lambda pair: pair[0], default=(0, None)
        )
        if slot is None or not keep:
            return None
        return PrefixHit(slot, keep, query.alternatives is not None)

    def take(self, query: PrefixQuery, hit: PrefixHit | None) -> Slot:
        """A slot for a prompt, with what was found of it. There must be room."""
        self._clock += 1
        slot, keep, scores = self._target(hit), hit.keep if hit else 0, hit.scores if hit else []
        if hit and hit.slot is not slot:
            self._fork(hit.slot, slot, keep)
            hit.slot.last_used = self._clock
        else:
            self.truncate(slot, keep)
        slot.in_use, slot.last_used, slot.namespace = True, self._clock, query.namespace
        # Without a hit a scored prompt has no scores yet, and the last score may speak of another text's token.
        slot.scores = scores or slot.scores[: score_count(keep)]
        if not slot.scores:
            slot.breadth = query.alternatives or 0
        return slot

    def mark_used(self, slot: Slot) -> None:
        """What a slot holds was of use."""
        self._clock += 1
        slot.last_used = self._clock

    def truncate(self, slot: Slot, keep: int) -> None:
        """Forget everything in a slot after its first `keep` tokens."""
        if keep < slot.length:
            self._operations.append(Truncate(slot.index, keep))
            slot.truncate(keep)

    def release(self, slot: Slot, again: bool) -> None:
        """Its sequence is done with a slot; what it holds stays. `again`: another slot holds most of it too."""
        self._clock += 1
        slot.in_use, slot.last_used = False, 0 if again else self._clock

    def computed(self, slot: Slot, tokens: tuple[int, ...], scores: list[Token]) -> None:
        """A pass has computed these tokens, and found the scores of those that follow each of them."""
        if scores and len(slot.scores) == slot.length and self._make_score_room(slot, len(scores)):
            slot.scores.extend(scores)
        slot.append(tokens, self._grid)

    def _make_score_room(self, slot: Slot, scores: int) -> bool:
        """Make room for more scores of a slot, where free slots have some to give up. Whether there is room."""
        room = MAX_SCORE_BYTES - sum(each.scores_size for each in self._all)
        room -= scores * (TOKEN_BYTES + ALTERNATIVE_BYTES * slot.breadth)
        for free in sorted((each for each in self._all if not each.in_use and each.scores), key=_eviction_order):
            if room >= 0:
                break
            room += free.scores_size
            free.scores = []
        return room >= 0

    def compact(self) -> None:
        """Bring taken slots closer together: some libraries compute neighbours together and others one by one.

        One of them moves into a gap. What the gap held moves to the slot longest unused; if there is none, all stays.
        """
        taken = [slot.index for slot in self._all if slot.in_use]
        gaps = [index for index in range(taken[0], taken[-1]) if index not in taken] if taken else []
        if not gaps:
            return
        left = [index for index in taken if index < gaps[0]]
        outer, gap = (taken[-1], gaps[0]) if 2 * len(left) >= len(taken) else (taken[0], gaps[-1])
        moved, hole = self._all[outer], self._all[gap]
        others = [slot for slot in self._all if not slot.in_use and slot is not hole]
        if hole.last_used and hole.length:
            if not others:
                return
            self._fork(hole, min(others, key=_eviction_order), hole.length)
        self._operations += [CopyPrefix(outer, gap, moved.length), Truncate(outer, 0)]
        hole.truncate(0)
        hole.last_used = 0
        moved.index, hole.index = gap, outer
        self._all[gap], self._all[outer] = moved, hole

    @property
    def slots_being_changed(self) -> set[int]:
        """Slots that a move which has not been told yet will change."""
        return {move.target if isinstance(move, CopyPrefix) else move.slot for move in self._operations}

    def take_operations(self) -> tuple[CopyPrefix | Truncate, ...]:
        """What has to be moved before the next pass; it is told once."""
        moves, self._operations = tuple(self._operations), []
        return moves

    def check(self) -> None:
        """Raise `AssertionError` where the table contradicts itself."""
        for index, slot in enumerate(self._all):
            assert slot.index == index, "a slot is where its number says"
            assert 0 <= slot.sound <= slot.length == len(slot.tokens), "no more is sound than is held"
            assert len(slot.scores) <= slot.length, "scores belong to tokens"
            assert len({len(score.top) for score in slot.scores}) <= 1, "scores are equally broad"
            expected = [int(token) for token in slot.tokens[scored_positions(0, len(slot.scores))]]
            assert [score.id for score in slot.scores][: len(expected)] == expected, "scores speak of their tokens"

    def expected_prefix(self, query: PrefixQuery, other: PrefixQuery) -> int:
        """How many of a prompt's tokens there will be in a slot when another prompt has been computed."""
        if not query.head or other.head != query.head or other.namespace != query.namespace or not self._rewinds:
            return 0
        if query.alternatives is not None and (other.alternatives is None or other.alternatives < query.alternatives):
            return 0
        shared = common_prefix(query.prompt, other.prompt)
        return self._keep(shared if query.alternatives is None else score_count(shared), query)

    def _keep(self, usable: int, query: PrefixQuery) -> int:
        """How many of a prompt's first `usable` tokens it may take over: a multiple of the grid, 0 if too few."""
        keep = min(usable, query.max_tokens) // self._grid * self._grid
        return keep if keep >= self._least else 0

    def _useful(self, slot: Slot, query: PrefixQuery) -> int:
        if slot.namespace != query.namespace:
            return 0
        shared = common_prefix(slot.tokens[: slot.sound], query.prompt)
        if query.alternatives is not None:
            # The row of a taken-over token is not computed again, so the score of the next token must be known.
            shared = min(score_count(shared), len(slot.scores)) if slot.breadth >= query.alternatives else 0
        keep = self._keep(shared, query)
        return keep if self._rewinds or keep == slot.length else 0

    def _target(self, hit: PrefixHit | None) -> Slot:
        oldest = self._oldest()
        if hit and not hit.slot.in_use and (hit.slot is oldest or hit.slot.length - hit.keep < self._least):
            return hit.slot
        return oldest

    def _oldest(self) -> Slot:
        return min((slot for slot in self._all if not slot.in_use), key=_eviction_order)

    def _fork(self, source: Slot, target: Slot, keep: int) -> None:
        self._operations.append(CopyPrefix(source.index, target.index, keep))
        target.copy(source, keep)


def common_prefix(first: TokenArray, second: TokenArray) -> int:
    """How many tokens two texts have in common at their beginning."""
    length = min(len(first), len(second))
    if not length or first[0] != second[0]:
        return 0
    differs = first[:length] != second[:length]
    at = int(differs.argmax())
    return at if differs[at] else length


def head(tokens: TokenArray, least: int) -> bytes:
    """The first `min_prefix` tokens as bytes; none if there are fewer."""
    return tokens[:least].tobytes() if len(tokens) >= least else b""


def _eviction_order(slot: Slot) -> tuple[int, int, int]:
    """Smallest for the slot whose loss matters least."""
    return slot.last_used, slot.length, slot.index
