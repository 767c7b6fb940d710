"""Decides what the next forward pass computes. Pure: it touches no model, no clock and no randomness.

Rules: passes over a prompt end on a grid counted from its first token, so that the numbers do not depend on who else is
here. They take turns with tokens of running sequences, so that neither waits for the other to finish. A prompt's
beginning is computed once: what is being computed is waited for, what is in a slot is used, and the samples of a prompt
fork from whichever holds it.

A sequence keeps its slot until it ends, or until another client waits that holds less than its share (`core.shares`).
Then the youngest sequence of the client that holds most is paused: its slot goes to the other client, and what the slot
held is lost. A paused sequence keeps its tokens. It gets a slot again before anything else of its client does, and its
state is computed again: of the prompt as at first, of the generated tokens one by one, as at first too, or in pieces
where it does not matter how tokens are grouped (`Runner.grid` is 1). So its numbers stay the same.
Nothing is computed again without end: a paused sequence waits for about as long as that costs before it takes a slot
that is unused, and then brings some tokens (`core.pauses`) before it can be paused again. The oldest sequences of a
client are paused last, so they always come to their end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import filterfalse, islice

from afterword.engine.core.fair_share import FairShare
from afterword.engine.core.forward_batch import BatchEntry, ForwardBatch
from afterword.engine.core.preemption import can_preempt, preemption_victims
from afterword.engine.core.prefill_queue import MIN_CHUNK, PrefillQueue
from afterword.engine.core.prefix_cache import PrefixCache, PrefixHit, PrefixQuery, Slot
from afterword.engine.core.sequence import Admission, JobState, Sequence
from afterword.engine.protocol import Job, Load, Token, score_count

ADMISSION_WINDOW = 32  # of a client's waiting jobs, how many are looked at
MAX_OVERTAKEN = 8  # how often a job may be passed over for one whose prompt is further computed
REST_PASSES = (32, 256)  # passes, at least and at most, that a paused sample leaves an unused slot to others


class Scheduler:
    """Owner of all work, sequences and slots. One thread."""

    def __init__(self, slots: int, chunk: int, grid: int, least_shared: int, rewinds: bool) -> None:
        self._grid = grid
        self._least_shared = least_shared
        self._rewinds = rewinds
        self._slots = PrefixCache(slots, grid, least_shared, rewinds)
        self._works: dict[int, JobState] = {}
        self._waiting: dict[str, dict[int, JobState]] = {}  # nothing computed yet: by client, in order of arrival
        self._begun: dict[int, JobState] = {}  # all others, in the order in which they began
        self._fair_share = FairShare(slots)
        self._held: dict[Slot, Sequence] = {}
        self._prefill_queue = PrefillQueue(chunk, grid)
        self._passes = 0

    # ---- what comes in

    def add(self, run: int, job: Job) -> None:
        """Take a new job, named by `run`."""
        self._works[run] = work = JobState(run, job, self._slots.prefix_query(job))
        self._waiting.setdefault(job.client, {})[run] = work

    def close(self, run: int) -> None:
        """Forget a job and everything that it holds. Unknown names are ignored: the job may just have ended."""
        work = self._works.get(run)
        if work is None:
            return
        work.queued.clear()
        for sequence in list(work.live):
            self.end(sequence)
        self._remove_work(work)

    def discard_failed(self, run: int) -> None:
        """Forget a job, and what its slots hold: nothing else may be continued from that."""
        work = self._works.get(run)
        slots = [sequence.slot for sequence in work.live] if work else []
        self.close(run)
        for slot in slots:
            assert slot is not None
            self._slots.truncate(slot, 0)

    def drop(self, run: int, sample: int) -> None:
        """End one sample of a started job. Unknown names are ignored."""
        work = self._works.get(run)
        if work is None or not work.started:
            return
        for sequence in (*work.live, *work.queued):
            if sequence.sample == sample:
                self.end(sequence)
                return

    def hold(self, run: int, held: bool, unread: bool = False) -> bool:
        """Compute nothing for a job while it is held. Returns whether there is a job of that name.

        `unread`: its reader is behind, perhaps for long, so its sequences give way to anything that waits.
        """
        work = self._works.get(run)
        if work is None:
            return False
        work.held, work.reader_is_behind = held, unread
        return True

    # ---- what goes out

    def admit(self, room: int) -> list[Admission]:
        """Give slots to jobs that wait for them, and to samples of jobs that have begun. Sequences may be paused.

        No more jobs begin when the known scores of those that do take `room` bytes.
        """
        begun = []
        while room > 0 and (found := self._next()):
            if not self._slots.has_free_slot:
                self._preempt(self._victims(found[0].work.job.client)[-1])
            if first := self._give_slot(*found):
                begun.append(first)
                room -= len(first.scores) * first.scores[0].size if first.scores else 0
        return begun

    def schedule(self, budget: int | None = None) -> ForwardBatch | None:
        """The next pass, or None when there is nothing to compute.

        `budget` is how many tokens of prompts may be computed at a time while others wait; None: as many as fit a pass.
        """
        rows = self._decode_entries(budget)
        self._passes += bool(rows)
        return ForwardBatch(self._slots.take_operations(), rows) if rows else None

    def sequence_in(self, slot: int) -> Sequence:
        """The sequence in a slot."""
        return self._held[self._slots[slot]]

    def charge(self, batch: ForwardBatch, seconds: float) -> None:
        """Note how long a pass took, before anything of it is noted as computed."""
        clients = [self.sequence_in(row.slot).work.job.client for row in batch.entries]
        self._prefill_queue.debts.spent(clients, seconds, self._fair_share.holding)

    def computed(self, row: BatchEntry, sequence: Sequence, scores: list[Token]) -> list[Token]:
        """Note that a row's tokens are computed, with the scores of the prompt's tokens that follow them.

        Returns those scores that the job has not been told: a paused sequence's are computed twice.
        """
        assert sequence.slot is not None
        self._slots.computed(sequence.slot, row.tokens, scores)
        if not sequence.catching_up:
            self._prefill_queue.discard(sequence)
        return sequence.work.unsent_scores(row.position, scores)

    def begin(self, first: Sequence, samples: Iterable[Sequence]) -> None:
        """The prompt in `first` is computed and every sample has its first token.

        `samples` are those that go on; `first` is replaced by one of them, or its slot is left.
        """
        work = first.work
        work.started = True
        work.queued.extend(samples)
        if work.queued:
            self._pass_slot(first)
        else:
            self.end(first)

    def end(self, sequence: Sequence) -> None:
        """A sample is complete: its slot goes to a sample of the same prompt, or keeps what it holds for others."""
        work, slot = sequence.work, sequence.slot
        if slot is None:
            work.queued.remove(sequence)
        elif self._has_successor(work):
            self._pass_slot(sequence)
        else:
            self._release(sequence)
            self._slots.release(slot, again=self._source(work) is not None)
        if not work.live and not work.queued:
            self._remove_work(work)

    def _has_successor(self, work: JobState) -> bool:
        """Whether a slot that holds a job's prompt should go to a sample of it that was never paused."""
        client = work.job.client
        first = self._first_queued(client)
        fresh = first is not None and first.work is work and not first.paused
        return fresh and not self._fair_share.should_yield_slot(client)

    def _pass_slot(self, sequence: Sequence) -> None:
        """Give a sequence's slot, with the prompt in it, to the first queued sample of the same job."""
        work, slot = sequence.work, sequence.slot
        assert slot is not None
        self._slots.truncate(slot, len(work.job.prompt) if self._holds_prompt(sequence) else 0)
        self._release(sequence)
        self._place(work.queued.popleft(), slot)

    def load(self) -> Load:
        """How many sequences there are, are in use, and are waited for."""
        waiting = sum(work.job.samples for works in self._waiting.values() for work in works.values())
        queued = sum(len(work.queued) for work in self._begun.values())
        return Load(len(self._slots), len(self._held), waiting + queued)

    def slot_usage(self) -> tuple[int, int]:
        """Tokens in the slots of sequences, and in those that nobody uses."""
        held = sum(slot.length for slot in self._held)
        return held, sum(slot.length for slot in self._slots) - held

    def check(self) -> dict[int, int]:
        """How many tokens a runner should hold in each slot; unknown for those that a move still to be made changes.

        Raises `AssertionError` where sequences and slots contradict each other.
        """
        self._slots.check()
        assert {slot for slot in self._slots if slot.in_use} == set(self._held), "a slot is taken by one sequence"
        held = [sequence.work.job.client for sequence in self._held.values()]
        assert all(self._fair_share.load(client)[1] == held.count(client) for client in held), "shares are counted"
        for slot, sequence in self._held.items():
            assert sequence.slot is slot
            assert sequence in sequence.work.live
            assert tuple(slot.tokens.tolist()) == sequence.slice(0, slot.length), "a slot holds its sequence's tokens"
        assert set(self._prefill_queue) == {sequence for sequence in self._held.values() if sequence.catching_up}
        return {slot.index: slot.length for slot in self._slots if slot.index not in self._slots.slots_being_changed}

    # ---- who is next

    def _next(self) -> tuple[Sequence, PrefixHit | None] | None:
        """What gets a slot now, unused or taken from another client: of the client that holds least, what comes first.

        First of all come samples of jobs that have begun; of the other jobs, the one whose prompt is computed furthest.
        """
        self._fair_share.want(self._waiting_clients(), self._passes)
        if not self._slots.has_free_slot and not can_preempt(self._held.values(), self._fair_share, self._passes):
            return None
        stuck = set()  # many clients may wait, but few differ in what they hold
        for client in filterfalse(self._prefill_queue.gives_way, self._fair_share.order(self._slots.has_free_slot)):
            standing = self._fair_share.standing(client)
            if not self._slots.has_free_slot and (standing in stuck or not self._victims(client)):
                stuck.add(standing)
            elif found := self._first(client):
                return found
        return None

    def _waiting_clients(self) -> Iterator[str]:
        """Clients that have something without a slot."""
        yield from (work.job.client for work in self._begun.values() if work.queued and not work.held)
        for client, works in self._waiting.items():
            if any(not work.held for work in works.values()):
                yield client

    def _first(self, client: str) -> tuple[Sequence, PrefixHit | None] | None:
        if queued := self._first_queued(client):
            return self._resumable(queued)
        work, hit = self._first_waiting(client)
        return (Sequence(work, sample=0), hit) if work else None

    def _first_queued(self, client: str) -> Sequence | None:
        works = (each for each in self._begun.values() if each.queued and each.job.client == client and not each.held)
        work = next(works, None)
        return work.queued[0] if work else None

    def _first_waiting(self, client: str) -> tuple[JobState | None, PrefixHit | None]:
        ready = [(work, hit) for work, hit in self._candidates(client) if not self._is_being_computed(work, hit)]
        if not ready:
            return None, None
        first = ready[0][0]
        if first.times_passed_over >= MAX_OVERTAKEN:
            return ready[0]
        chosen = max(ready, key=lambda pair: pair[1].keep if pair[1] else 0)
        first.times_passed_over += chosen[0] is not first
        return chosen

    def _resumable(self, sequence: Sequence) -> tuple[Sequence, PrefixHit | None] | None:
        """A sample of a job that has begun, with what slots hold of it; None if it should rather wait.

        It waits after a pause, lest it is paused again at once, and for a sample that computes the same prompt.
        """
        work = sequence.work
        passes_are_made = any(not each.work.held for each in self._held.values())
        if self._passes < sequence.resume_pass and self._fair_share.load(work.job.client)[0] and passes_are_made:
            return None
        source = self._source(work)
        if source is None and any(other.catching_up for other in work.live):
            return None
        hit = self._slots.find(self._resume_query(sequence))
        if source and source.slot and (hit is None or hit.keep < len(work.job.prompt)):
            hit = PrefixHit(source.slot, len(work.job.prompt), scored=False)
        return sequence, hit

    def _resume_query(self, sequence: Sequence) -> PrefixQuery:
        """What may be found of a queued sample in slots: all but its last token, or the prompt."""
        work = sequence.work
        if not work.started:
            return work.query
        if self._grid > 1:
            return self._slots.resume_query(work.job, work.job.prompt, len(work.job.prompt))
        return self._slots.resume_query(work.job, sequence.slice(0, sequence.length), sequence.length - 1)

    def _candidates(self, client: str) -> Iterator[tuple[JobState, PrefixHit | None]]:
        for work in islice((work for work in self._waiting[client].values() if not work.held), ADMISSION_WINDOW):
            yield work, self._slots.find(work.query)

    def _is_being_computed(self, work: JobState, hit: PrefixHit | None) -> bool:
        """Whether more of a prompt than was found is being computed for another job just now."""
        found = hit.keep if hit else 0
        scored = work.query.alternatives is not None
        coming = [each for each in self._prefill_queue if not each.work.held and (each.is_scored or not scored)]
        return any(
            self._slots.expected_prefix(work.query, other.work.query)
            >= max(found + self._least_shared, other.computed + 1)
            for other in coming
        )

    def _give_slot(self, sequence: Sequence, hit: PrefixHit | None) -> Admission | None:
        """Give an unused slot to what waits for one. Tells if its job begins, or begins again after a pause."""
        work = sequence.work
        self._fair_share.served(work.job.client)
        if work.run in self._begun:
            work.queued.popleft()
            if work.started:
                self._place(sequence, self._slots.take(self._resume_query(sequence), hit))
                return None
        return self._start(sequence, hit)

    def _start(self, sequence: Sequence, hit: PrefixHit | None) -> Admission:
        work = sequence.work
        job, query = work.job, work.query
        keep, scores = (hit.keep, hit.scores) if hit else (0, [])
        begun = Admission(
            work,
            cached=0 if work.run in self._begun else keep,
            scores=tuple(work.unsent_scores(0, scores)),
            complete=query.max_tokens == len(job.prompt) and keep == score_count(len(job.prompt)),
        )
        if begun.complete:
            if hit:
                self._slots.mark_used(hit.slot)  # the text that is asked for most is not the first to be given up
            self._remove_work(work)
            return begun
        self._no_longer_waits(work)
        self._begun[work.run] = work
        self._place(sequence, self._slots.take(query, hit))
        return begun

    # ---- pauses

    def _victims(self, client: str) -> list[Sequence]:
        return preemption_victims(self._held.values(), self._fair_share, client, self._passes)

    def _preempt(self, sequence: Sequence) -> None:
        """Take a sequence's slot. What it holds stays until another sequence needs the slot."""
        work, slot = sequence.work, sequence.slot
        assert slot is not None
        lost = -(-sequence.computed // MIN_CHUNK) + (len(sequence.generated) if self._grid > 1 else 0)  # passes
        sequence.paused, sequence.resume_pass = True, self._passes + min(max(lost, REST_PASSES[0]), REST_PASSES[1])
        self._release(sequence)
        self._slots.release(slot, again=self._source(work) is not None)
        work.queued.appendleft(sequence)

    # ---- slots

    def _source(self, work: JobState) -> Sequence | None:
        return next(filter(self._holds_prompt, work.live), None)

    def _holds_prompt(self, sequence: Sequence) -> bool:
        """Whether its slot can give the prompt's state: exactly the prompt, where state cannot be rewound."""
        prompt = len(sequence.work.job.prompt)
        return sequence.computed == prompt or (self._rewinds and sequence.computed > prompt)

    def _place(self, sequence: Sequence, slot: Slot) -> None:
        sequence.occupy(slot, in_pieces=self._grid == 1)
        sequence.work.live.append(sequence)
        self._held[slot] = sequence
        self._fair_share.acquire(sequence.work.job.client)
        if sequence.catching_up:
            self._prefill_queue.add(sequence)

    def _release(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        del self._held[sequence.slot]
        sequence.work.live.remove(sequence)
        self._fair_share.release(sequence.work.job.client)
        self._prefill_queue.discard(sequence)
        sequence.slot = None

    def _remove_work(self, work: JobState) -> None:
        self._works.pop(work.run, None)
        self._begun.pop(work.run, None)
        self._no_longer_waits(work)

    def _no_longer_waits(self, work: JobState) -> None:
        works = self._waiting.get(work.job.client, {})
        works.pop(work.run, None)
        if not works:
            self._waiting.pop(work.job.client, None)

    # ---- passes

    def _decode_entries(self, budget: int | None) -> tuple[BatchEntry, ...]:
        running = [each for each in self._held.values() if not each.catching_up and not each.work.held]
        alone = len(self._held) == 1 and not self._waiting
        if piece := self._prefill_queue.next_chunk(running, None if alone else budget):
            return (piece,)
        if len(running) > 1:
            self._slots.compact()
        rows = [BatchEntry(s.index, s.computed, s.slice(s.computed, s.computed + 1), int(s.is_last)) for s in running]
        return tuple(sorted(rows, key=lambda row: row.slot))
