"""Decides what the next forward pass computes. Pure: it uses no model, no clock and no randomness.

Prefill passes end on a grid counted from the prompt's first token, so that the numbers do not depend on other requests.
Prefill passes and decodes alternate. A shared prefix is computed once: a job waits for a prefix that another job is
computing, and reuses one that a slot holds. The samples of a prompt copy its state from a slot that holds it.

A sequence keeps its slot until it ends, or until another client waits that holds less than its share
(`core.fair_share`). Then the scheduler preempts the youngest sequence of the client that holds most: its slot goes to
the other client, and the slot's content is lost. A preempted sequence keeps its tokens. It gets a slot again before
anything else of its client, and its state is computed again. The prompt is computed on the same grid as before. The
generated tokens are computed one by one as before, or in chunks if the grouping of tokens does not matter
(`Runner.grid` is 1). So the sequence's numbers stay the same. How often it is preempted is bounded (`core.preemption`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import filterfalse, islice

from afterword.engine.core.fair_share import FairShare
from afterword.engine.core.forward_batch import BatchEntry, ForwardBatch
from afterword.engine.core.preemption import can_preempt, passes_to_wait, preemption_victims
from afterword.engine.core.prefill_queue import PrefillQueue
from afterword.engine.core.prefix_cache import PrefixCache
from afterword.engine.core.sequence import Admission, JobState, Sequence
from afterword.engine.core.sequence_checks import check_sequences
from afterword.engine.core.slot import PrefixHit, PrefixQuery, Slot
from afterword.engine.core.token_budget import TokenBudget
from afterword.engine.core.verification import VerificationTurns
from afterword.engine.core.waiting_jobs import WaitingJobs
from afterword.engine.protocol import Job, Load, Token, score_count

ADMISSION_WINDOW = 32  # jobs of a client that are considered for admission at a time
MAX_TIMES_PASSED_OVER = 8  # how often a job may be passed over for one with a longer cached prefix


class Scheduler:
    """Owner of all jobs, sequences and slots. One thread calls everything. Parameters: see `Runner`."""

    def __init__(self, slots: PrefixCache, chunk: int, grid: int, joins_prompts: bool = False) -> None:
        self._grid = grid
        self._slots = slots
        self._token_budget = TokenBudget(slots, max(chunk, len(slots)))
        self._jobs: dict[int, JobState] = {}
        self._waiting: dict[str, WaitingJobs] = {}  # not admitted yet: by client
        self._admitted: dict[int, JobState] = {}  # in the order of admission
        self._fair_share = FairShare(len(slots))
        self._active: dict[Slot, Sequence] = {}
        self._prefill_queue = PrefillQueue(chunk, grid, joins_prompts)
        self.verification_turns = VerificationTurns(chunk)
        self._passes = 0

    # ---- jobs

    def add(self, job_id: int, job: Job) -> None:
        self._jobs[job_id] = state = JobState(job_id, job, self._slots.prefix_query(job))
        self._waiting.setdefault(job.client, WaitingJobs()).add(state)

    def close(self, job_id: int) -> None:
        """Remove a job and free its slots. Unknown ids are ignored: the job may have ended just before."""
        state = self._jobs.get(job_id)
        if state is None:
            return
        state.queued.clear()
        for sequence in list(state.live):
            self.end(sequence)
        self._remove_job(state)

    def discard_failed(self, job_id: int) -> None:
        """Remove a job and clear its slots, because no other sequence may continue from their content."""
        state = self._jobs.get(job_id)
        slots = [sequence.slot for sequence in state.live] if state else []
        self.close(job_id)
        for slot in slots:
            assert slot is not None
            self._slots.truncate(slot, 0)

    def drop(self, job_id: int, sample: int) -> None:
        """End one sample of a started job. Unknown ids are ignored."""
        state = self._jobs.get(job_id)
        if state is None or not state.started:
            return
        for sequence in (*state.live, *state.queued):
            if sequence.sample == sample:
                self.end(sequence)
                return

    def suspend(self, job_id: int, suspended: bool, reader_is_behind: bool = False) -> bool:
        """Compute nothing for a job while it is suspended. Returns whether a job with that id exists.

        `reader_is_behind`: the suspension may last long, so the job's sequences are preempted for any waiting job.
        """
        state = self._jobs.get(job_id)
        if state is None:
            return False
        state.suspended, state.reader_is_behind = suspended, reader_is_behind
        return True

    # ---- passes and their results

    def admit(self, free_bytes: int) -> list[Admission]:
        """Give slots to waiting jobs and to queued samples. May preempt sequences. Returns the jobs that begin.

        Stops when the cached scores of those jobs take `free_bytes` bytes.
        """
        admissions = []
        while free_bytes > 0 and (found := self._next_admission()):
            victims = self._victims_for(found[0])
            if victims is None:
                break
            for victim in victims:
                self._preempt(victim)
            if admission := self._admit_sequence(*found):
                admissions.append(admission)
                free_bytes -= len(admission.scores) * admission.scores[0].size if admission.scores else 0
        return admissions

    def schedule(self, budget: int | None = None) -> ForwardBatch | None:
        """The next pass, or None if there is nothing to compute.

        `budget`: prompt tokens that may be computed between two decodes while others wait; None: a whole pass of them.
        """
        for sequence in self._token_budget.excess(self._active.values(), self._fair_share):
            self._preempt(sequence)
        entries = self._next_entries(budget)
        self._slots.make_room(sum(len(entry.tokens) for entry in entries))
        self._passes += bool(entries)
        return ForwardBatch(self._slots.take_operations(), entries) if entries else None

    @property
    def running(self) -> list[Sequence]:
        """The sequences that generate, except those of suspended jobs."""
        return [each for each in self._active.values() if not each.needs_prefill and not each.job_state.suspended]

    def sequence_in(self, slot: int) -> Sequence:
        return self._active[self._slots[slot]]

    def charge(self, batch: ForwardBatch, seconds: float) -> None:
        """Charge the duration of a pass to its clients. Call it before `computed`."""
        clients = [self.sequence_in(entry.slot).job_state.job.client for entry in batch.entries]
        self._prefill_queue.compute_share.charge(clients, seconds, self._fair_share.holding)

    def computed(self, entry: BatchEntry, sequence: Sequence, scores: list[Token]) -> list[Token]:
        """Record that an entry's tokens are computed, with the scores of the prompt tokens that follow them.

        Returns the scores that were not returned before: those of a preempted sequence are computed twice.
        """
        assert sequence.slot is not None
        self._slots.computed(sequence.slot, entry.tokens, scores)
        if not sequence.needs_prefill:
            self._prefill_queue.discard(sequence)
        return sequence.job_state.unsent_scores(entry.position, scores)

    def begin(self, first: Sequence, samples: Iterable[Sequence]) -> None:
        """Start a job's samples: the prompt in `first` is computed and every sample has its first token.

        `samples`: those that continue. One of them gets the slot of `first`; if there are none, the slot is released.
        """
        state = first.job_state
        state.started = True
        state.queued.extend(samples)
        if not state.queued:
            self.end(first)
            return
        if len(self._active) + len(state.queued) > len(self._slots) + 1 and first.slot:
            self._slots.save(first.slot)  # some samples get their slot later, when no slot ends with the prompt
        self._hand_over_slot(first)

    def end(self, sequence: Sequence) -> None:
        """End a sample. Its slot goes to a queued sample of the same prompt, or becomes free and keeps its content."""
        state, slot = sequence.job_state, sequence.slot
        if slot is None:
            state.queued.remove(sequence)
        elif self._has_successor(state):
            self._hand_over_slot(sequence)
        else:
            self._release(sequence)
            self._slots.release(slot, redundant=state.holds_prompt)
        if not state.live and not state.queued:
            self._remove_job(state)

    def rewind(self, sequence: Sequence) -> None:
        """Remove from a sequence's slot what was taken back, and its last token, whose logits row is needed again."""
        if sequence.slot is not None:
            self._slots.cut(sequence.slot, sequence.length, len(sequence.job_state.job.prompt))
            if sequence.needs_prefill:
                self._prefill_queue.add(sequence)

    def _has_successor(self, state: JobState) -> bool:
        """Whether a slot that holds a job's prompt should go to a sample of the job that was never preempted."""
        client = state.job.client
        first = self._first_queued(client)
        is_new = first is not None and first.job_state is state and not first.paused
        return is_new and not self._fair_share.should_yield_slot(client)

    def _hand_over_slot(self, sequence: Sequence) -> None:
        """Give a sequence's slot, with the prompt in it, to the first queued sample of the same job."""
        state, slot = sequence.job_state, sequence.slot
        assert slot is not None
        self._slots.truncate(slot, self._slots.restorable(slot, len(state.job.prompt)))
        self._release(sequence)
        self._assign_slot(state.queued.popleft(), slot)

    def load(self) -> Load:
        """The number of slots, of slots in use, and of samples that wait for one."""
        waiting = sum(state.job.samples for states in self._waiting.values() for state in states)
        waiting += sum(len(state.queued) for state in self._admitted.values())
        return Load(len(self._slots), len(self._active), waiting)

    def slot_usage(self) -> tuple[int, int]:
        """The number of tokens in used slots, and in free slots."""
        used = sum(slot.length for slot in self._active)
        return used, self._slots.held - used

    def check(self) -> dict[int, int]:
        """The number of tokens that the runner should hold in each slot, except slots with pending operations.

        Raises `AssertionError` if sequences and slots are inconsistent.
        """
        self._slots.check()
        check_sequences(self._slots, self._active, self._fair_share, self._prefill_queue)
        return {slot.index: slot.length for slot in self._slots if slot.index not in self._slots.slots_being_changed}

    # ---- admission

    def _next_admission(self) -> tuple[Sequence, PrefixHit | None] | None:
        """The sequence that gets a slot next, free or preempted, with its cached prefix; None if no sequence can.

        The client that holds the fewest slots is first. Of a client, samples of admitted jobs are first; then the job
        with the longest cached prefix.
        """
        self._fair_share.set_waiting(self._waiting_clients(), self._passes)
        if not self._slots.has_free_slot and not can_preempt(self._active.values(), self._fair_share, self._passes):
            return None
        stuck = set()  # comparison keys without victims: many clients may wait, but few differ in what they hold
        for client in filterfalse(self._prefill_queue.must_wait, self._fair_share.order(self._slots.has_free_slot)):
            comparison_key = self._fair_share.comparison_key(client)
            if not self._slots.has_free_slot and (comparison_key in stuck or not self._victims(client)):
                stuck.add(comparison_key)
            elif found := self._first(client):
                return found
        return None

    def _waiting_clients(self) -> Iterator[str]:
        """The clients that have a job or a sample without a slot."""
        yield from (state.job.client for state in self._admitted.values() if state.queued and not state.suspended)
        for client, states in self._waiting.items():
            if any(not state.suspended for state in states):
                yield client

    def _first(self, client: str) -> tuple[Sequence, PrefixHit | None] | None:
        if queued := self._first_queued(client):
            return self._resumable(queued)
        state, hit = self._first_waiting(client)
        return (Sequence(state, sample=0), hit) if state else None

    def _first_queued(self, client: str) -> Sequence | None:
        queued = (each for each in self._admitted.values() if each.queued and each.job.client == client)
        return next((each.queued[0] for each in queued if not each.suspended), None)

    def _first_waiting(self, client: str) -> tuple[JobState | None, PrefixHit | None]:
        if not (ready := list(self._ready(client))):
            return None, None
        first = ready[0][0]
        if first.times_passed_over >= MAX_TIMES_PASSED_OVER:
            return ready[0]
        equal = [pair for pair in ready if pair[0].job.priority == first.job.priority]
        chosen = max(equal, key=lambda pair: pair[1].keep if pair[1] else 0)
        first.times_passed_over += chosen[0] is not first
        return chosen

    def _resumable(self, sequence: Sequence) -> tuple[Sequence, PrefixHit | None] | None:
        """A queued sample of an admitted job, with its cached prefix; None if it should wait.

        It waits after a preemption, so that it is not preempted again at once, and for a sample of the same job that
        is computing the prompt.
        """
        state = sequence.job_state
        has_runnable = any(not each.job_state.suspended for each in self._active.values())
        if self._passes < sequence.resume_pass and self._fair_share.load(state.job.client)[0] and has_runnable:
            return None
        source = self._prompt_source(state)
        if source is None and any(other.needs_prefill for other in state.live):
            return None
        hit = self._slots.find(self._resume_query(sequence))
        if source and source.slot and (hit is None or hit.keep < len(state.job.prompt)):
            hit = PrefixHit(source.slot, len(state.job.prompt), scored=False)
        return sequence, hit

    def _resume_query(self, sequence: Sequence) -> PrefixQuery:
        """The query for a queued sample: all tokens but the last, or only the prompt if the grid is not 1."""
        state = sequence.job_state
        if not state.started and not state.query.has_rows:
            return state.query
        if self._grid > 1 or not state.started:
            return self._slots.resume_query(state.job, state.job.prompt, state.finished_prompt)
        return self._slots.resume_query(state.job, sequence.slice(0, sequence.length), sequence.length - 1)

    def _ready(self, client: str) -> Iterator[tuple[JobState, PrefixHit | None]]:
        """The first waiting jobs of a client with their cached prefixes, but not those that wait for a longer one."""
        waiting = (state for state in self._waiting[client] if not state.suspended)
        found = ((state, self._slots.find(state.query)) for state in islice(waiting, ADMISSION_WINDOW))
        yield from (pair for pair in found if not self._prefill_queue.computes_more(*pair, self._slots))

    def _admit_sequence(self, sequence: Sequence, hit: PrefixHit | None) -> Admission | None:
        """Give a free slot to a sequence. Returns the admission if the job's prompt is still to be completed."""
        state = sequence.job_state
        self._fair_share.served(state.job.client)
        if state.job_id in self._admitted:
            state.queued.popleft()
            if state.started:
                self._assign_slot(sequence, self._slots.take(self._resume_query(sequence), hit))
                return None
        return self._admit_job(sequence, hit)

    def _admit_job(self, sequence: Sequence, hit: PrefixHit | None) -> Admission:
        state = sequence.job_state
        job, query = state.job, state.query
        keep, scores = (hit.keep, hit.scores) if hit else (0, [])
        admission = Admission(
            state,
            cached=0 if state.job_id in self._admitted else keep,
            scores=tuple(state.unsent_scores(0, scores)),
            complete=query.max_tokens == len(job.prompt) and keep == score_count(len(job.prompt)),
        )
        if admission.complete:
            if hit:
                self._slots.mark_used(hit.slot)  # frequently requested texts should not be evicted first
            self._remove_job(state)
            return admission
        self._remove_waiting(state)
        self._admitted[state.job_id] = state
        waiting = islice(self._waiting.get(job.client, ()), ADMISSION_WINDOW)
        self._assign_slot(sequence, self._slots.take(query, hit, (each.query for each in waiting)))
        return admission

    # ---- preemption

    def _victims(self, client: str) -> list[Sequence]:
        return preemption_victims(self._active.values(), self._fair_share, client, self._passes)

    def _victims_for(self, sequence: Sequence) -> list[Sequence] | None:
        """The sequences to preempt so that another one gets a slot and memory; None if that is not possible."""
        needs_slot = not self._slots.has_free_slot
        candidates = self._victims(sequence.job_state.job.client) if needs_slot or self._token_budget.capacity else []
        return self._token_budget.victims(self._active.values(), candidates, sequence, needs_slot=needs_slot)

    def _preempt(self, sequence: Sequence) -> None:
        """Take a sequence's slot. The slot's content stays until another sequence needs the slot."""
        state, slot = sequence.job_state, sequence.slot
        assert slot is not None
        sequence.paused, sequence.resume_pass = True, self._passes + passes_to_wait(sequence, self._grid)
        self._release(sequence)
        self._slots.release(slot, redundant=state.holds_prompt)
        state.queued.appendleft(sequence)

    # ---- slots

    def _prompt_source(self, state: JobState) -> Sequence | None:
        """A sequence whose slot can provide the prompt's state."""
        end = len(state.job.prompt)
        return next((each for each in state.live if each.slot and self._slots.restorable(each.slot, end) == end), None)

    def _assign_slot(self, sequence: Sequence, slot: Slot) -> None:
        self._slots.cut(slot, sequence.length, len(sequence.job_state.job.prompt))
        sequence.assign_slot(slot, chunk_generated=self._grid == 1)
        sequence.job_state.live.append(sequence)
        self._active[slot] = sequence
        self._fair_share.acquire(sequence.job_state.job.client)
        if sequence.needs_prefill:
            self._prefill_queue.add(sequence)

    def _release(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        del self._active[sequence.slot]
        sequence.job_state.live.remove(sequence)
        self._fair_share.release(sequence.job_state.job.client)
        self._prefill_queue.discard(sequence)
        sequence.slot = None

    def _remove_job(self, state: JobState) -> None:
        self._jobs.pop(state.job_id, None)
        self._admitted.pop(state.job_id, None)
        self._remove_waiting(state)

    def _remove_waiting(self, state: JobState) -> None:
        if (states := self._waiting.get(state.job.client)) and not states.discard(state):
            del self._waiting[state.job.client]

    # ---- the next pass

    def _next_entries(self, budget: int | None) -> tuple[BatchEntry, ...]:
        alone = len(self._active) == 1 and not self._waiting
        if chunks := self._prefill_queue.next_chunks(running := self.running, None if alone else budget):
            return chunks
        if entry := self.verification_turns.next_entry(running):
            return (entry,)
        if len(running) > 1:
            self._slots.compact()
        return tuple(sorted((each.decode_entry() for each in running), key=lambda entry: entry.slot))
