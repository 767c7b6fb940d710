"""The prefix cache: the runner's slots, with the tokens and scores that they hold after their sequences have ended.

A slot holds the state of a text's tokens and, if a job requested them, the tokens' scores. A new prompt starts from
the slot with the longest matching prefix. It continues in place if the slot is free and little else would be lost.
Otherwise the prefix is copied to the least recently used free slot. Namespaces share nothing.

A recurrent state cannot be truncated. The prefixes of recurrent and hybrid models are reusable only at borders where a
snapshot was taken (`core.snapshots`): the last border of each prompt, the last one before a prompt parts from a known
text, and about every `snapshots.REGULAR_DISTANCE` tokens. Prefill passes end at these borders.

The cache is a table, not a tree. There are at most a few hundred slots, and comparing a prompt with a slot takes
microseconds. Every slot has its own memory, so a tree's inner nodes would own nothing.

A prefix that was read from a store (`core.prefix_store`) is offered like the content of a slot. It is put into a slot
when a prompt starts from it.

Pure: it decides and records; the runner executes the slot operations. The scheduler owns it, in the engine's thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import msgspec
import numpy as np

from afterword.engine.core.forward_batch import (
    CopyPrefix,
    RestorePrefix,
    SaveState,
    SlotOperation,
    SlotRules,
    Truncate,
)
from afterword.engine.core.slot import PrefixHit, PrefixQuery, Slot, common_prefix, head, reported_key
from afterword.engine.core.snapshots import Snapshots, TokenArray
from afterword.engine.protocol import ALTERNATIVE_BYTES, TOKEN_BYTES, Job, Token, score_count, scored_positions

MAX_SCORE_BYTES = 256 * 2**20
"""The most bytes of memory for the scores of all slots. Above it, the least recently used scores are deleted."""


class PrefixCache:
    """Owner of all slots and of the slot operations that the next pass begins with. One thread calls everything."""

    def __init__(self, rules: SlotRules) -> None:
        self._slots = [Slot(index, rules.min_shared_tokens) for index in range(rules.slots)]
        self._grid = rules.grid
        self._min_shared_tokens = rules.min_shared_tokens
        self._can_truncate = rules.can_truncate
        self._snapshots = Snapshots(rules.max_snapshots, -(-rules.min_shared_tokens // rules.grid) * rules.grid)
        self._most_tokens = rules.capacity
        self.capacity = rules.capacity  # the most tokens in all slots at present; None if every slot can be full
        self._clock = 0  # counts uses of slots
        self._operations: list[SlotOperation] = []
        self._offers: dict[int, Slot] = {}  # prefixes that were read from a store, by ticket

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, index: int) -> Slot:
        return self._slots[index]

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._slots)

    @property
    def has_free_slot(self) -> bool:
        return not all(slot.in_use for slot in self._slots)

    @property
    def held(self) -> int:
        """The number of tokens in all slots."""
        return sum(slot.length for slot in self._slots)

    def prefix_query(self, job: Job) -> PrefixQuery:
        """The query for a job's prompt.

        The prompt's last token may come from a slot only if the job samples nothing: samples need that token's logits.
        """
        prompt = np.array(job.prompt, np.int32)
        scores_only = job.max_tokens == 0 and job.prompt_alternatives is not None
        max_kept = len(prompt) if scores_only else len(prompt) - 1
        reported = () if job.prompt_alternatives is None else reported_key(job)
        start = head(prompt, self._min_shared_tokens)
        return PrefixQuery(start, job.namespace, prompt, max_kept, job.prompt_alternatives, reported)

    def resume_query(self, job: Job, tokens: tuple[int, ...], max_kept: int) -> PrefixQuery:
        """The query for tokens that were already computed for a job. Their scores were already returned."""
        array = np.array(tokens, np.int32)
        return PrefixQuery(head(array, self._min_shared_tokens), job.namespace, array, max_kept, None)

    def find(self, query: PrefixQuery) -> PrefixHit | None:
        """The longest reusable prefix of a prompt that any slot holds."""
        same_head = [slot for slot in (*self._slots, *self._offers.values()) if slot.head == query.head and query.head]
        keep, slot = max(
            ((self._reusable_prefix(slot, query), slot) for slot in same_head),
            key=lambda pair: pair[0],
            default=(0, None),
        )
        if slot is None or not keep:
            return None
        return PrefixHit(slot, keep, query.alternatives is not None)

    def take(self, query: PrefixQuery, hit: PrefixHit | None, waiting: Iterable[PrefixQuery] = ()) -> Slot:
        """Take a slot for a prompt and fill it with the prefix that was found. A slot must be free.

        `waiting`: prompts that will be computed later, and may share a prefix with this one.
        """
        self._clock += 1
        slot, keep, scores = self._target_slot(hit), hit.keep if hit else 0, hit.scores if hit else []
        slot.borders = self._borders(query, keep, waiting)
        if hit and keep in hit.slot.snapshots:
            self._snapshots.mark_used(hit.slot.snapshots[keep], self._clock)
        if hit and hit.slot is not slot:
            self.truncate(slot, 0)
            self.make_room(keep, hit.slot)
            self._copy_prefix(hit.slot, slot, keep)
            hit.slot.last_used = self._clock
        else:
            self.truncate(slot, keep)
        slot.in_use, slot.last_used, slot.namespace = True, self._clock, query.namespace
        slot.forget_stored()
        # Without a hit a scored prompt has no scores yet, and the last score can belong to another text's token.
        slot.scores = scores or slot.scores[: score_count(keep)]
        if not slot.scores:
            slot.alternatives = 0 if query.has_rows else query.alternatives or 0
            slot.reported = query.reported
        return slot

    def offer(self, ticket: int, namespace: str, tokens: TokenArray, state: object) -> None:
        """Let prompts start from a prefix that was read from a store, until `withdraw`."""
        offer = Slot(-1, self._min_shared_tokens, namespace=namespace, state=state)
        offer.append(tuple(tokens.tolist()), self._grid)
        self._offers[ticket] = offer

    def withdraw(self, ticket: int) -> None:
        """Delete an offer, if it exists."""
        self._offers.pop(ticket, None)

    @property
    def shared_snapshots(self) -> frozenset[int]:
        """The numbers of the snapshots that several slots hold: texts part there."""
        held = Counter(number for slot in self._slots for number in slot.snapshots.values())
        return frozenset(number for number, slots in held.items() if slots > 1)

    def limit(self, free_tokens: int | None) -> None:
        """Allow at most `free_tokens` more tokens than the slots hold now, within the runner's capacity."""
        if free_tokens is not None:
            most = max(0, self.held + free_tokens)
            self.capacity = most if self._most_tokens is None else min(self._most_tokens, most)

    def make_room(self, tokens: int, source: Slot | None = None) -> None:
        """Empty free slots, least recently used first, until `tokens` more tokens fit. Keeps the slot `source`."""
        if self.capacity is None:
            return
        excess = self.held + tokens - self.capacity
        for slot in sorted((slot for slot in self._slots if not slot.in_use), key=_eviction_order):
            if excess <= 0:
                break
            if slot is not source:
                excess -= slot.length
                self.truncate(slot, 0)

    def mark_used(self, slot: Slot) -> None:
        """Record a use of a slot's content."""
        self._clock += 1
        slot.last_used = self._clock

    def truncate(self, slot: Slot, keep: int) -> None:
        """Delete everything in a slot after its first `keep` tokens."""
        if keep < slot.length:
            self._operations.append(Truncate(slot.index, keep, slot.snapshots.get(keep)))
            slot.truncate(keep)

    def cut(self, slot: Slot, text: int, prompt: int) -> None:
        """Leave the last token of a text to be computed, or more. `text`, `prompt`: lengths of it and of its prompt."""
        most = text - 1 if text > prompt else (text - 1) // self._grid * self._grid  # a prompt's passes are on the grid
        if most < slot.length:
            self.truncate(slot, self.restorable(slot, most))

    def release(self, slot: Slot, redundant: bool) -> None:
        """Mark a slot as free; its content stays. `redundant`: another slot holds most of the content too."""
        self._clock += 1
        slot.in_use, slot.last_used = False, 0 if redundant else self._clock

    def computed(self, slot: Slot, tokens: tuple[int, ...], scores: list[Token]) -> None:
        """Record tokens that a pass has computed, and the score of the token that follows each of them."""
        # after a preemption a job with rows may continue from a slot that has other alternatives
        fits = bool(scores) and (not scores[0].row or not (slot.alternatives or slot.reported))
        if fits and len(slot.scores) == slot.length and self._reserve_score_bytes(slot, len(scores)):
            slot.scores.extend(msgspec.structs.replace(each, row=None) if each.row else each for each in scores)
        slot.append(tokens, self._grid)
        is_regular = len(tokens) > 1 and self._snapshots.is_regular(slot.length, slot.longest_snapshot(slot.length))
        if slot.length == slot.reusable and (is_regular or slot.length in slot.borders):
            self.save(slot)

    def save(self, slot: Slot) -> None:
        """Take a snapshot of a slot's present state, if slots cannot be truncated without one."""
        if not self._snapshots.count or slot.length in slot.snapshots:
            return
        number = self._snapshots.choose((each.snapshots for each in self._slots), self._clock)
        for each in self._slots:
            each.snapshots = {length: other for length, other in each.snapshots.items() if other != number}
        slot.snapshots[slot.length] = number
        self._snapshots.mark_used(number, self._clock)
        self._operations.append(SaveState(slot.index, number))

    def restorable(self, slot: Slot, most: int) -> int:
        """The largest length up to `most` to which a slot can be truncated."""
        if self._can_truncate or slot.length <= most:
            return min(slot.length, most)
        return slot.longest_snapshot(most)

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
        if self.capacity is not None and self.held + moved.length > self.capacity:
            return
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
        changes = [each for each in self._operations if not isinstance(each, SaveState)]
        return {each.target if isinstance(each, CopyPrefix) else each.slot for each in changes}

    @property
    def settled_slots(self) -> list[Slot]:
        """The slots whose content the runner holds: neither they nor their snapshots have pending operations."""
        changed = self.slots_being_changed
        saved = {each.snapshot for each in self._operations if isinstance(each, SaveState)}
        return [slot for slot in self._slots if slot.index not in changed and saved.isdisjoint(slot.snapshots.values())]

    def take_operations(self) -> tuple[SlotOperation, ...]:
        """Remove and return the pending operations, which the next pass begins with."""
        operations, self._operations = tuple(self._operations), []
        return operations

    def check(self) -> None:
        """Raise `AssertionError` if the table is inconsistent."""
        for index, slot in enumerate(self._slots):
            assert slot.index == index, "a slot's index is its position in the table"
            assert 0 <= slot.reusable <= slot.length == len(slot.tokens), "a slot reuses only tokens that it holds"
            assert len(slot.scores) <= slot.length, "a slot has at most one score for each token"
            of_one_size = slot.reported[:1] == (-1,) or len({len(score.top) for score in slot.scores}) <= 1
            assert of_one_size, "scores have equally many alternatives"
            expected = [int(token) for token in slot.tokens[scored_positions(0, len(slot.scores))]]
            assert [score.id for score in slot.scores][: len(expected)] == expected, "scores belong to their tokens"
        self._snapshots.check((slot.snapshots, slot.tokens) for slot in self._slots)

    def awaits(self, query: PrefixQuery, found: int, other: PrefixQuery, slot: Slot) -> bool:
        """Whether a prompt, of which `found` tokens are cached, should wait for the prefill of another one in `slot`.

        If the state of the shared prefix is reusable only with a snapshot, that prefill takes one.
        """
        expected = self._expected_prefix(query, other)
        if expected <= slot.length or expected < found + self._min_shared_tokens:
            return False
        if not self._can_truncate:
            slot.borders.add(expected)
        return True

    def _expected_prefix(self, query: PrefixQuery, other: PrefixQuery) -> int:
        """How many of a prompt's tokens will be reusable once another prompt is completely computed."""
        if not query.head or other.head != query.head or other.namespace != query.namespace or query.has_rows:
            return 0
        kept = 0 if other.has_rows else other.alternatives  # by the slot with the scores
        if query.alternatives is not None and (
            kept is None or kept < query.alternatives or other.reported != query.reported
        ):
            return 0
        usable = _usable(common_prefix(query.prompt, other.prompt), query)
        return self._reusable_length(usable, query) if self._can_truncate else self._border(usable, query)

    def _reusable_length(self, usable: int, query: PrefixQuery) -> int:
        """How many of the first `usable` tokens are reusable: a multiple of the grid, 0 if too few to be worth it."""
        keep = min(usable, query.max_tokens) // self._grid * self._grid
        return keep if keep >= self._min_shared_tokens else 0

    def _reusable_prefix(self, slot: Slot, query: PrefixQuery) -> int:
        if slot.namespace != query.namespace:
            return 0
        usable = _usable(common_prefix(slot.tokens, query.prompt), query)
        if query.alternatives is not None:
            fits = slot.alternatives >= query.alternatives and slot.reported == query.reported
            usable = min(usable, len(slot.scores)) if fits else 0
        keep = self._reusable_length(min(usable, slot.reusable), query)
        return keep if self._can_truncate or keep == slot.length else slot.longest_snapshot(keep)

    def _border(self, usable: int, query: PrefixQuery) -> int:
        """The last border within the first `usable` tokens of a prompt; 0 if no snapshots can be taken."""
        return self._snapshots.border(min(usable, query.max_tokens)) if self._snapshots.count else 0

    def _borders(self, query: PrefixQuery, keep: int, waiting: Iterable[PrefixQuery]) -> set[int]:
        """The borders after the first `keep` tokens at which the prefill of a prompt takes snapshots.

        They are the last border of the prompt, and those where it parts from a waiting prompt or from a slot's text.
        """
        if not self._snapshots.count or not query.head:
            return set()
        texts = [each.tokens for each in self._slots if (each.head, each.namespace) == (query.head, query.namespace)]
        texts += [each.prompt for each in waiting if (each.head, each.namespace) == (query.head, query.namespace)]
        shared = {len(query.prompt), *(common_prefix(query.prompt, text) for text in texts)}
        return {border for each in shared if (border := self._border(_usable(each, query), query)) > keep}

    def _target_slot(self, hit: PrefixHit | None) -> Slot:
        oldest = self._least_recently_used()
        if not hit or hit.slot.in_use or hit.slot.state is not None:
            return oldest
        in_place = hit.slot is oldest or hit.slot.length - hit.keep < self._min_shared_tokens
        return hit.slot if in_place or not self._copy_fits(hit) else oldest

    def _copy_fits(self, hit: PrefixHit) -> bool:
        """Whether a copy of the prefix fits beside its source and the slots that are in use."""
        used = sum(slot.length for slot in self._slots if slot.in_use)
        return self.capacity is None or used + hit.slot.length + hit.keep <= self.capacity

    def _least_recently_used(self) -> Slot:
        return min((slot for slot in self._slots if not slot.in_use), key=_eviction_order)

    def _copy_prefix(self, source: Slot, target: Slot, keep: int) -> None:
        if source.state is None:
            self._operations.append(CopyPrefix(source.index, target.index, keep, source.snapshots.get(keep)))
            target.copy(source, keep)
        else:
            self._operations.append(RestorePrefix(target.index, keep, source.state))
            target.copy(source, keep)
            self.save(target)


def _usable(shared: int, query: PrefixQuery) -> int:
    """How many of the first `shared` tokens of a prompt are usable.

    The row of a reused token is not computed again, so for scores the next token must be shared too.
    """
    return shared if query.alternatives is None else score_count(shared)


def _eviction_order(slot: Slot) -> tuple[int, int, int]:
    """The sort key of eviction: the slot with the smallest key is evicted first."""
    return slot.last_used, slot.length, slot.index
