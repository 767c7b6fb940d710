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

from afterword.engine.core.batch import Cut, Fork
from afterword.engine.protocol import ALTERNATIVE_BYTES, TOKEN_BYTES, Job, Token

Tokens = NDArray[np.int32]

KEPT_SCORES = 256 * 2**20
"""Bytes that the scores of all slots may take. Beyond it those that were not used for the longest time are given up."""


@dataclass(slots=True, eq=False)
class Slot:
    """What one slot holds.

    `head` are its first `least` tokens, if there are as many: texts with other heads share too little. `sound`: so many
    of its tokens were computed as the beginning of any prompt would be. `scores[i]` is the score of token i + 1, each
    with `breadth` alternatives. `used` orders slots by their last use, 0 where nothing is lost.
    """

    index: int
    least: int
    head: bytes = b""
    namespace: str = ""
    length: int = 0
    sound: int = 0
    scores: list[Token] = field(default_factory=list)
    breadth: int = 0
    used: int = 0
    taken: bool = False
    _buffer: Tokens = field(default_factory=lambda: np.empty(64, np.int32))

    @property
    def tokens(self) -> Tokens:
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
        if start < self.least:
            self._name()
        if self.sound == start and self.length % grid == 0:
            self.sound = self.length

    def cut(self, keep: int) -> None:
        """Forget what comes after the first `keep` tokens."""
        self.length, self.sound = keep, min(self.sound, keep)
        del self.scores[max(keep - 1, 0) :]
        self._name()

    def copy(self, other: Slot, keep: int) -> None:
        """Hold the first `keep` tokens of another slot, and nothing else."""
        self.namespace, self.breadth, self.used = other.namespace, other.breadth, other.used
        self.length, self.sound = keep, min(other.sound, keep)
        self._buffer = np.resize(other.tokens, max(64, keep))
        self.scores = other.scores[: max(keep - 1, 0)]
        self._name()

    def _name(self) -> None:
        self.head = head(self.tokens, self.least)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A prompt to be computed, of which at most the first `most` tokens may come from a slot.

    `alternatives`: how many the scores of its tokens must have; None if no scores are wanted. `head`: see `Slot`.
    """

    head: bytes
    namespace: str
    prompt: Tokens
    most: int
    alternatives: int | None


@dataclass(frozen=True, slots=True)
class Hit:
    """The first `keep` tokens of a prompt are in a slot; `scored`: with the scores of the tokens after the first."""

    slot: Slot
    keep: int
    scored: bool

    @property
    def scores(self) -> list[Token]:
        """Those scores, of `keep` tokens, as long as the slot is as it was found."""
        return self.slot.scores[: self.keep] if self.scored else []


class Slots:
    """Owner of all slots and of the moves between them that the next pass begins with."""

    def __init__(self, count: int, grid: int, least: int, rewinds: bool) -> None:
        self._all = [Slot(index, least) for index in range(count)]
        self._grid = grid
        self._least = least
        self._rewinds = rewinds
        self._clock = 0
        self._moves: list[Fork | Cut] = []

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, index: int) -> Slot:
        return self._all[index]

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._all)

    @property
    def room(self) -> bool:
        """Whether a slot can be taken."""
        return not all(slot.taken for slot in self._all)

    def wanted(self, job: Job) -> Wanted:
        """What may be found of a job's prompt. Its last token may not where samples depend on that one's logits."""
        prompt = np.array(job.prompt, np.int32)
        scores_only = job.max_tokens == 0 and job.prompt_alternatives is not None
        most = len(prompt) if scores_only else len(prompt) - 1
        return Wanted(head(prompt, self._least), job.namespace, prompt, most, job.prompt_alternatives)

    def wanted_again(self, job: Job, tokens: tuple[int, ...], most: int) -> Wanted:
        """What may be found of tokens that were computed for a job before; their scores are not wanted again."""
        array = np.array(tokens, np.int32)
        return Wanted(head(array, self._least), job.namespace, array, most, None)

    def find(self, wanted: Wanted) -> Hit | None:
        """The longest useful beginning of a prompt that a slot holds."""
        alike = [slot for slot in self._all if slot.head == wanted.head and wanted.head]
        keep, slot = max(
            ((self._useful(slot, wanted), slot) for slot in alike), key=lambda pair: pair[0], default=(0, None)
        )
        if slot is None or not keep:
            return None
        return Hit(slot, keep, wanted.alternatives is not None)

    def take(self, wanted: Wanted, hit: Hit | None) -> Slot:
        """A slot for a prompt, with what was found of it. There must be room."""
        self._clock += 1
        slot, keep, scores = self._target(hit), hit.keep if hit else 0, hit.scores if hit else []
        if hit and hit.slot is not slot:
            self._fork(hit.slot, slot, keep)
            hit.slot.used = self._clock
        else:
            self.cut(slot, keep)
        slot.taken, slot.used, slot.namespace = True, self._clock, wanted.namespace
        # Without a hit a scored prompt has no scores yet, and the last score may speak of another text's token.
        slot.scores = scores or slot.scores[: max(keep - 1, 0)]
        if not slot.scores:
            slot.breadth = wanted.alternatives or 0
        return slot

    def touch(self, slot: Slot) -> None:
        """What a slot holds was of use."""
        self._clock += 1
        slot.used = self._clock

    def cut(self, slot: Slot, keep: int) -> None:
        """Forget everything in a slot after its first `keep` tokens."""
        if keep < slot.length:
            self._moves.append(Cut(slot.index, keep))
            slot.cut(keep)

    def leave(self, slot: Slot, again: bool) -> None:
        """Its sequence is done with a slot; what it holds stays. `again`: another slot holds most of it too."""
        self._clock += 1
        slot.taken, slot.used = False, 0 if again else self._clock

    def computed(self, slot: Slot, tokens: tuple[int, ...], scores: list[Token]) -> None:
        """A pass has computed these tokens, and found the scores of those that follow each of them."""
        if scores and len(slot.scores) == slot.length and self._keeps(slot, len(scores)):
            slot.scores.extend(scores)
        slot.append(tokens, self._grid)

    def _keeps(self, slot: Slot, scores: int) -> bool:
        """Make room for more scores of a slot, where free slots have some to give up. Whether there is room."""
        room = KEPT_SCORES - sum(each.scores_size for each in self._all)
        room -= scores * (TOKEN_BYTES + ALTERNATIVE_BYTES * slot.breadth)
        for free in sorted((each for each in self._all if not each.taken and each.scores), key=_age):
            if room >= 0:
                break
            room += free.scores_size
            free.scores = []
        return room >= 0

    def gather(self) -> None:
        """Bring taken slots closer together: some libraries compute neighbours together and others one by one.

        One of them moves into a gap. What the gap held moves to the slot longest unused; if there is none, all stays.
        """
        taken = [slot.index for slot in self._all if slot.taken]
        gaps = [index for index in range(taken[0], taken[-1]) if index not in taken] if taken else []
        if not gaps:
            return
        left = [index for index in taken if index < gaps[0]]
        outer, gap = (taken[-1], gaps[0]) if 2 * len(left) >= len(taken) else (taken[0], gaps[-1])
        moved, hole = self._all[outer], self._all[gap]
        others = [slot for slot in self._all if not slot.taken and slot is not hole]
        if hole.used and hole.length:
            if not others:
                return
            self._fork(hole, min(others, key=_age), hole.length)
        self._moves += [Fork(outer, gap, moved.length), Cut(outer, 0)]
        hole.cut(0)
        hole.used = 0
        moved.index, hole.index = gap, outer
        self._all[gap], self._all[outer] = moved, hole

    @property
    def moving(self) -> set[int]:
        """Slots that a move which has not been told yet will change."""
        return {move.target if isinstance(move, Fork) else move.slot for move in self._moves}

    def moves(self) -> tuple[Fork | Cut, ...]:
        """What has to be moved before the next pass; it is told once."""
        moves, self._moves = tuple(self._moves), []
        return moves

    def check(self) -> None:
        """Raise `AssertionError` where the table contradicts itself."""
        for index, slot in enumerate(self._all):
            assert slot.index == index, "a slot is where its number says"
            assert 0 <= slot.sound <= slot.length == len(slot.tokens), "no more is sound than is held"
            assert len(slot.scores) <= slot.length, "scores belong to tokens"
            assert len({len(score.top) for score in slot.scores}) <= 1, "scores are equally broad"
            expected = [int(token) for token in slot.tokens[1 : len(slot.scores) + 1]]
            assert [score.id for score in slot.scores][: len(expected)] == expected, "scores speak of their tokens"

    def promised(self, wanted: Wanted, other: Wanted) -> int:
        """How many of a prompt's tokens there will be in a slot when another prompt has been computed."""
        if not wanted.head or other.head != wanted.head or other.namespace != wanted.namespace or not self._rewinds:
            return 0
        if wanted.alternatives is not None and (other.alternatives is None or other.alternatives < wanted.alternatives):
            return 0
        return self._keep(common(wanted.prompt, other.prompt), wanted)

    def _keep(self, shared: int, wanted: Wanted) -> int:
        """How many of the first `shared` tokens of a prompt another one's computation can give it."""
        scored = wanted.alternatives is not None
        keep = min(shared - 1 if scored else shared, wanted.most) // self._grid * self._grid
        return keep if keep >= self._least else 0

    def _useful(self, slot: Slot, wanted: Wanted) -> int:
        if slot.namespace != wanted.namespace:
            return 0
        shared = common(slot.tokens[: slot.sound], wanted.prompt)
        if wanted.alternatives is not None:
            shared = min(shared, len(slot.scores) + 1 if slot.breadth >= wanted.alternatives else 0)
        keep = self._keep(shared, wanted)
        return keep if self._rewinds or keep == slot.length else 0

    def _target(self, hit: Hit | None) -> Slot:
        oldest = self._oldest()
        if hit and not hit.slot.taken and (hit.slot is oldest or hit.slot.length - hit.keep < self._least):
            return hit.slot
        return oldest

    def _oldest(self) -> Slot:
        return min((slot for slot in self._all if not slot.taken), key=_age)

    def _fork(self, source: Slot, target: Slot, keep: int) -> None:
        self._moves.append(Fork(source.index, target.index, keep))
        target.copy(source, keep)


def common(first: Tokens, second: Tokens) -> int:
    """How many tokens two texts have in common at their beginning."""
    length = min(len(first), len(second))
    if not length or first[0] != second[0]:
        return 0
    differs = first[:length] != second[:length]
    at = int(differs.argmax())
    return at if differs[at] else length


def head(tokens: Tokens, least: int) -> bytes:
    """The first `least` tokens as bytes; none if there are fewer."""
    return tokens[:least].tobytes() if len(tokens) >= least else b""


def _age(slot: Slot) -> tuple[int, int, int]:
    """Smallest for the slot whose loss matters least."""
    return slot.used, slot.length, slot.index
