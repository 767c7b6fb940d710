"""A draft model: a small second model that continues each sequence greedily, several sequences in one pass.

It has slots of its own, with a prefix cache of its own, and follows the tokens of the sequences that it drafts for: it
computes those that it has not computed, and removes its own that were not generated. Its numbers change nothing, so
they may depend on the batch. The engine's thread owns it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from afterword.engine.core.forward_batch import BatchEntry, ForwardBatch, Logits, Runner, slot_rules
from afterword.engine.core.pass_costs import PassCosts
from afterword.engine.core.prefix_cache import PrefixCache
from afterword.engine.core.sampler import finite_rows
from afterword.engine.core.sequence import Sequence
from afterword.engine.core.slot import Slot, common_prefix
from afterword.engine.core.verification import DraftMaker, VerificationTurns, WantedDraft, model_draft
from afterword.engine.draft import Draft, ModelDraft
from afterword.engine.protocol import Job
from afterword.errors import EngineError

READ_PER_TOKEN = 8
"""Tokens of a text that the draft model computes for each token that the sample has generated. So it reads a long
prompt only for a long completion."""

_ONE_BY_ONE = 2  # missing tokens that are computed together with drafts of other sequences: a verified draft leaves two


@dataclass(slots=True)
class _Follower:
    """A slot that follows a sequence. Its first `known` tokens are the sequence's; those behind are drafted."""

    slot: Slot
    known: int


@dataclass(slots=True)
class _Started:
    """A draft in progress. `given`: tokens of the sequence that are not computed yet. `found`: the drafted tokens."""

    wanted: WantedDraft
    slot: Slot
    given: list[int]
    found: list[int] = field(default_factory=list)
    failed: bool = False

    @property
    def complete(self) -> bool:
        return self.failed or len(self.found) == self.wanted.count

    def entry(self) -> BatchEntry:
        """The next token to compute."""
        token = self.given.pop(0) if self.given else self.found[-1]
        return BatchEntry(self.slot.index, self.slot.length, (token,), int(not self.given))


class DraftModel:
    """Owner of a draft model's runner and of the slots of its sequences.

    `context`: the most tokens of a slot. `vocabulary`: the number of first token ids that both models have. `clock`:
    returns seconds. `costs`: of passes of one token of each sequence.
    """

    def __init__(self, runner: Runner, context: int, vocabulary: int, clock: Callable[[], float]) -> None:
        self._runner = runner
        self._context = context
        self._vocabulary = vocabulary
        self._clock = clock
        self._slots = PrefixCache(replace(slot_rules(runner), grid=1, max_snapshots=0))
        self._followers: dict[Sequence, _Follower] = {}
        self.costs = PassCosts()

    def can_draft(self, wanted: WantedDraft) -> bool:
        """Whether a draft can be computed, and the sequence has generated enough for what must be read before it."""
        sequence, tokens = wanted.sequence, wanted.sequence.length + wanted.count
        if tokens > self._context:
            wanted.draft.dropped = True
            return False
        follower = self._followers.get(sequence) or self._begin(wanted)
        if follower is None:
            return False
        end = min(follower.known, sequence.length - 1)  # the last token's row is needed, so it is computed again
        own = np.array(sequence.slice(end, sequence.length - 1), np.int32)
        follower.known = end + common_prefix(follower.slot.tokens[end:], own)
        self._slots.truncate(follower.slot, follower.known)
        return self._is_worth_it(wanted, follower.known) and self._fits(tokens - follower.known)

    def follows(self, wanted: WantedDraft) -> bool:
        """Whether a sequence that it can draft for lacks so few tokens that its draft can begin."""
        return wanted.sequence.length - self._followers[wanted.sequence].known <= _ONE_BY_ONE

    def propose(self, wanted: list[WantedDraft]) -> None:
        """Compute drafts for the sequences that it follows, and read what it lacks of the others: at most a chunk.

        Raises `EngineError` if the library fails; then the draft model must not be used any more.
        """
        started: list[_Started] = []
        left, coming = self._runner.chunk, 0
        for each in wanted:
            sequence, follower = each.sequence, self._followers[each.sequence]
            needed = sequence.length + each.count - follower.known
            if not self._fits(coming + needed):
                continue
            self._slots.make_room(coming + needed)
            if self.follows(each):
                given = sequence.slice(follower.known, sequence.length)
                started.append(_Started(each, follower.slot, list(given)))
                follower.known, coming = sequence.length, coming + needed
            elif tokens := sequence.slice(follower.known, min(follower.known + left, sequence.length - 1)):
                self._run([BatchEntry(follower.slot.index, follower.known, tokens, 0)])
                follower.known, left = follower.known + len(tokens), left - len(tokens)
        self._continue(started)

    def release(self, running: list[Sequence], capacity: int | None) -> None:
        """Release the slots of sequences that do not run or get no more drafts. `capacity`: the most tokens to hold."""
        self._slots.capacity = capacity
        drafting = set(filter(model_draft, running))
        for sequence in [each for each in self._followers if each not in drafting]:
            self._slots.release(self._followers.pop(sequence).slot, redundant=False)

    def give_back_memory(self) -> None:
        """Empty slots beyond the capacity. Raises `EngineError` as `propose` does."""
        self._slots.make_room(0)
        if operations := self._slots.take_operations():
            self._runner.run(ForwardBatch(operations, ()))

    def check(self) -> None:
        """Raise `AssertionError` if the slots and the runner disagree about any token."""
        self._slots.check()
        for slot in self._slots:
            if slot.index not in self._slots.slots_being_changed:
                held = self._runner.cached_tokens(slot.index)
                assert held == slot.length, f"slot {slot.index} should hold {slot.length} tokens and not {held}"

    def _begin(self, wanted: WantedDraft) -> _Follower | None:
        """A slot for a sequence, with what another slot holds of its text; None if it should not or cannot get one."""
        if not self._slots.has_free_slot:
            return None
        sequence, end = wanted.sequence, wanted.sequence.length - 1
        query = self._slots.resume_query(sequence.job_state.job, sequence.slice(0, end), end)
        hit = self._slots.find(query)
        if not self._is_worth_it(wanted, hit.keep if hit else 0) or not self._fits(sequence.length + wanted.count):
            return None
        slot = self._slots.take(query, hit)
        follower = self._followers[sequence] = _Follower(slot, slot.length)
        return follower

    def _is_worth_it(self, wanted: WantedDraft, known: int) -> bool:
        """Whether a sequence has generated enough for the tokens after the first `known` ones to be computed."""
        sequence = wanted.sequence
        if sequence.length - known > max(_ONE_BY_ONE, READ_PER_TOKEN * len(sequence.generated)):
            return False
        wanted.draft.dropped = max(sequence.slice(known, sequence.length)) >= self._vocabulary
        return not wanted.draft.dropped

    def _fits(self, tokens: int) -> bool:
        """Whether so many more tokens fit, if all slots without a running sequence are emptied."""
        used = sum(slot.length for slot in self._slots if slot.in_use)
        return self._slots.capacity is None or used + tokens <= self._slots.capacity

    def _continue(self, started: list[_Started]) -> None:
        """Compute drafts token by token, each pass for all sequences whose draft is not complete."""
        while active := [each for each in started if not each.complete]:
            active.sort(key=lambda each: each.slot.index)
            entries = [each.entry() for each in active]
            start = self._clock()
            logits = self._run(entries)[:, : self._vocabulary]
            self.costs.record(len(entries), self._clock() - start)
            rows = iter(zip(logits.argmax(axis=1).tolist(), finite_rows(logits).tolist(), strict=True))
            for each, entry in zip(active, entries, strict=True):
                if entry.outputs:
                    token, finite = next(rows)
                    each.failed = not finite
                    each.found += [token] * finite
        for each in started:
            each.wanted.draft.dropped |= each.failed
            each.wanted.draft.propose(tuple(each.found))

    def _run(self, entries: list[BatchEntry]) -> Logits:
        logits = self._runner.run(ForwardBatch(self._slots.take_operations(), tuple(entries)))
        for entry in entries:
            self._slots.computed(self._slots[entry.slot], entry.tokens, [])
        return logits


class Drafter:
    """What the engine drafts with beside predictions.

    `verifies`: whether drafts can be verified at all. `ngrams`: whether tokens are drafted from each sample's own text.
    `model`: the draft model. `report`: receives a line if it fails; then it drafts no more, and all jobs go on.
    """

    def __init__(self, verifies: bool) -> None:
        self._verifies = verifies
        self.ngrams = False
        self.model: DraftModel | None = None
        self.report: Callable[[str], None] = lambda _: None

    def drafts(self, job: Job) -> list[tuple[Draft | ModelDraft, ...]]:
        """The drafts of each sample of a job.

        A drafted token that the grammar does not allow must not be accepted, and a text that is taken back cannot be
        followed by a draft. So jobs with a grammar or with banned texts have none. A verification would keep a packed
        row for each drafted token at a time, which takes much memory.
        """
        if not self._verifies or job.grammar or job.banned_text or job.has_rows:
            return [()] * job.samples
        maker = DraftMaker(job, self.ngrams, model=self.model is not None)
        return [maker.drafts() for _ in range(job.samples)]

    def propose(self, turns: VerificationTurns, running: list[Sequence], capacity: int | None) -> None:
        """Let the draft model compute the drafts that pay. `capacity`: the most tokens that its slots may hold."""
        if self.model is None:
            return
        self.model.release(running, capacity)
        if wanted := turns.wanted_drafts(running, self.model):
            self._attempt(lambda model: model.propose(wanted))

    def give_back_memory(self, capacity: int | None) -> None:
        """Empty slots of the draft model beyond the capacity. Call it only when idle."""
        if self.model is not None:
            self.model.release([], capacity)
            self._attempt(DraftModel.give_back_memory)

    def check(self) -> None:
        """Raise `AssertionError` if the draft model's slots are inconsistent."""
        if self.model is not None:
            self.model.check()

    def _attempt(self, work: Callable[[DraftModel], None]) -> None:
        assert self.model is not None
        try:
            work(self.model)
        except EngineError as error:
            self.model = None
            self.report(f"The draft model has failed and drafts no more; all requests go on. {error.message}")
