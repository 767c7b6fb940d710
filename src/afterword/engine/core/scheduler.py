"""Decides what the next forward pass computes. Pure: it touches no model, no clock and no randomness.

Rules: a sequence keeps its slot until it ends, so nothing that runs is ever preempted. Passes over a prompt end on a
grid counted from its first token, so that the numbers do not depend on who else is here. They take turns with tokens
of running sequences, so that neither waits for the other to finish. A prompt's beginning is computed once: what is
being computed is waited for, what is in a slot is used, and the samples of a prompt fork from whichever holds it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from afterword.engine.core.batch import Batch, Row
from afterword.engine.core.sequence import Sequence, Work
from afterword.engine.core.slots import Hit, Slot, Slots
from afterword.engine.protocol import Job, Load, Token

WINDOW = 32  # of a client's waiting jobs, how many are looked at
LEAST_PASS = 32  # tokens of a prompt: fewer are computed hardly faster
MOST_BUDGETS = 2  # for prompts at a time, while they are many and few sequences run
PATIENCE = 8  # how often a job may be passed over for one whose prompt is further computed


@dataclass(frozen=True, slots=True)
class Begun:
    """A job leaves the queue with what is known of its prompt. `complete`: there is nothing more to compute."""

    work: Work
    cached: int
    scores: tuple[Token, ...]
    complete: bool


class Scheduler:
    """Owner of all work, sequences and slots. One thread."""

    def __init__(self, slots: int, chunk: int, grid: int, least_shared: int, rewinds: bool) -> None:
        self._chunk = chunk
        self._grid = grid
        self._least_shared = least_shared
        self._rewinds = rewinds
        self._slots = Slots(slots, grid, least_shared, rewinds)
        self._works: dict[int, Work] = {}
        self._waiting: dict[str, dict[int, Work]] = {}  # nothing computed yet: by client, in order of arrival
        self._held: dict[Slot, Sequence] = {}
        self._turns: deque[Sequence] = deque()  # sequences whose prompt is being computed, next turn first
        self._spent = 0  # tokens of prompts computed since running sequences had their turn
        self._short_turn = True

    # ---- what comes in

    def add(self, run: int, job: Job) -> None:
        """Take a new job, named by `run`."""
        self._works[run] = work = Work(run, job, self._slots.wanted(job))
        self._waiting.setdefault(job.client, {})[run] = work

    def close(self, run: int) -> None:
        """Forget a job and everything that it holds. Unknown names are ignored: the job may just have ended."""
        work = self._works.get(run)
        if work is None:
            return
        work.queued.clear()
        for sequence in list(work.live):
            self.end(sequence)
        self._forget(work)

    def discard(self, run: int) -> None:
        """Forget a job, and what its slots hold: nothing else may be continued from that."""
        work = self._works.get(run)
        slots = [sequence.slot for sequence in work.live] if work else []
        self.close(run)
        for slot in slots:
            assert slot is not None
            self._slots.cut(slot, 0)

    def drop(self, run: int, sample: int) -> None:
        """End one sample of a started job. Unknown names are ignored."""
        work = self._works.get(run)
        if work is None or not work.started:
            return
        for sequence in (*work.live, *work.queued):
            if sequence.sample == sample:
                self.end(sequence)
                return

    # ---- what goes out

    def admit(self) -> list[Begun]:
        """Give slots to jobs that wait for them, and to samples of jobs that have begun."""
        begun = []
        while self._slots.room and (found := self._next()):
            begun.append(self._start(*found))
        for work in [work for work in self._works.values() if work.queued]:
            self._spread(work)
        return begun

    def schedule(self, budget: int | None = None) -> Batch | None:
        """The next pass, or None when there is nothing to compute.

        `budget` is how many tokens of prompts may be computed at a time while others wait; None: as many as fit a pass.
        """
        rows = self._rows(budget)
        return Batch(self._slots.moves(), rows) if rows else None

    def at(self, slot: int) -> Sequence:
        """The sequence in a slot."""
        return self._held[self._slots[slot]]

    def computed(self, row: Row, sequence: Sequence, scores: list[Token]) -> None:
        """Note that a row's tokens are computed, with the scores of the prompt's tokens that follow them."""
        assert sequence.slot is not None
        self._slots.computed(sequence.slot, row.tokens, scores)
        if not sequence.catching_up and sequence in self._turns:
            self._turns.remove(sequence)

    def begin(self, first: Sequence, samples: Iterable[Sequence]) -> None:
        """The prompt in `first` is computed and every sample has its first token.

        `samples` are those that go on; `first` is replaced by one of them, or its slot is left.
        """
        work = first.work
        work.started = True
        work.queued.extend(samples)
        self.end(first)

    def end(self, sequence: Sequence) -> None:
        """A sample is complete: its slot goes to a sample of the same prompt, or keeps what it holds for others."""
        work, slot = sequence.work, sequence.slot
        if slot is None:
            work.queued.remove(sequence)
        elif work.queued and not self._must_yield(work):
            self._slots.cut(slot, len(work.job.prompt) if self._holds_prompt(sequence) else 0)
            self._leave(sequence)
            self._place(work.queued.popleft(), slot)
        else:
            self._leave(sequence)
            self._slots.leave(slot, again=self._source(work) is not None)
        if not work.live and not work.queued:
            self._forget(work)

    def _must_yield(self, work: Work) -> bool:
        """Whether a client with many samples runs more than one who waits. Its last slot stays: it holds the prompt."""
        if not self._waiting or len(work.live) == 1:
            return False
        running = Counter(sequence.work.job.client for sequence in self._held.values())
        return any(running[client] < running[work.job.client] - 1 for client in self._waiting)

    def load(self) -> Load:
        """How many sequences there are, are in use, and are waited for."""
        waiting = sum(work.job.samples for works in self._waiting.values() for work in works.values())
        queued = sum(len(work.queued) for work in self._works.values())
        return Load(len(self._slots), len(self._held), waiting + queued)

    def filled(self) -> tuple[int, int]:
        """Tokens in the slots of sequences, and in those that nobody uses."""
        held = sum(slot.length for slot in self._held)
        return held, sum(slot.length for slot in self._slots) - held

    def check(self) -> dict[int, int]:
        """How many tokens a runner should hold in each slot; unknown for those that a move still to be made changes.

        Raises `AssertionError` where sequences and slots contradict each other.
        """
        self._slots.check()
        assert {slot for slot in self._slots if slot.taken} == set(self._held), "a slot is taken by one sequence"
        for slot, sequence in self._held.items():
            assert sequence.slot is slot
            assert sequence in sequence.work.live
            assert tuple(slot.tokens.tolist()) == sequence.slice(0, slot.length), "a slot holds its sequence's tokens"
        assert set(self._turns) == {sequence for sequence in self._held.values() if sequence.catching_up}
        return {slot.index: slot.length for slot in self._slots if slot.index not in self._slots.moving}

    # ---- who is next

    def _next(self) -> tuple[Work, Hit | None] | None:
        """The job to begin now: of the client that runs least, the one whose prompt is computed furthest."""
        if not self._waiting:
            return None
        running = [sequence.work.job.client for sequence in self._held.values()]
        for client in sorted(self._waiting, key=running.count):
            ready = [(work, hit) for work, hit in self._candidates(client) if not self._is_coming(work, hit)]
            if not ready:
                continue
            first = ready[0][0]
            if first.passed >= PATIENCE:
                return ready[0]
            chosen = max(ready, key=lambda pair: pair[1].keep if pair[1] else 0)
            first.passed += chosen[0] is not first
            return chosen
        return None

    def _candidates(self, client: str) -> Iterator[tuple[Work, Hit | None]]:
        for work in islice(self._waiting[client].values(), WINDOW):
            yield work, self._slots.find(work.wanted)

    def _is_coming(self, work: Work, hit: Hit | None) -> bool:
        """Whether more of a prompt than was found is being computed for another job just now."""
        found = hit.keep if hit else 0
        return any(
            self._slots.promised(work.wanted, other.work.wanted) >= max(found + self._least_shared, other.computed + 1)
            for other in self._turns
        )

    def _start(self, work: Work, hit: Hit | None) -> Begun:
        job, wanted = work.job, work.wanted
        works = self._waiting.pop(job.client)
        del works[work.run]
        if works:
            self._waiting[job.client] = works  # now behind the clients that run as much
        keep, scores = (hit.keep, hit.scores) if hit else (0, ())
        if wanted.most == len(job.prompt) and keep == len(job.prompt) - 1:
            if hit:
                self._slots.touch(hit.slot)  # the text that is asked for most is not the first to be given up
            self._forget(work)
            return Begun(work, keep, scores, complete=True)
        self._place(Sequence(work, sample=0), self._slots.take(wanted, hit))
        return Begun(work, keep, scores, complete=False)

    # ---- slots

    def _spread(self, work: Work) -> None:
        """Fork queued samples into slots that nobody uses, while a slot of theirs can serve as the source."""
        while self._slots.room and work.queued and (source := self._source(work)) is not None:
            assert source.slot is not None
            self._place(work.queued.popleft(), self._slots.fork(source.slot, len(work.job.prompt)))

    def _source(self, work: Work) -> Sequence | None:
        return next(filter(self._holds_prompt, work.live), None)

    def _holds_prompt(self, sequence: Sequence) -> bool:
        """Whether its slot can give the prompt's state: exactly the prompt, where state cannot be rewound."""
        prompt = len(sequence.work.job.prompt)
        return sequence.computed == prompt or (self._rewinds and sequence.computed > prompt)

    def _place(self, sequence: Sequence, slot: Slot) -> None:
        sequence.slot = slot
        sequence.work.live.append(sequence)
        self._held[slot] = sequence
        if sequence.catching_up:
            self._turns.append(sequence)

    def _leave(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        del self._held[sequence.slot]
        sequence.work.live.remove(sequence)
        if sequence in self._turns:
            self._turns.remove(sequence)
        sequence.slot = None

    def _forget(self, work: Work) -> None:
        self._works.pop(work.run, None)
        works = self._waiting.get(work.job.client, {})
        works.pop(work.run, None)
        if not works:
            self._waiting.pop(work.job.client, None)

    # ---- passes

    def _rows(self, budget: int | None) -> tuple[Row, ...]:
        running = [sequence for sequence in self._held.values() if not sequence.catching_up]
        if not running:
            self._spent = 0
        left = self._share(budget, len(running)) - self._spent
        if self._turns and (not self._spent or left >= LEAST_PASS):
            row = self._prompt_row(self._next_turn(), left)
            self._spent += len(row.tokens)
            return (row,)
        self._spent = 0
        if len(running) > 1:
            self._slots.gather()
        rows = [Row(_index(s), s.computed, s.slice(s.computed, s.length), 1) for s in running]
        return tuple(sorted(rows, key=lambda row: row.slot))

    def _share(self, budget: int | None, running: int) -> int:
        """How many tokens of prompts may be computed before running sequences have a turn.

        More while most are still waiting for their prompt: running few at a time costs all of them.
        """
        if budget is None or (len(self._held) == 1 and not self._waiting):
            return self._chunk
        return int(budget * min(1 + len(self._turns) / max(running, 1), MOST_BUDGETS))

    def _next_turn(self) -> Sequence:
        """By turns the one with the least to compute and the one that has waited longest."""
        self._short_turn = not self._short_turn
        if self._short_turn:
            return self._turns[0]
        return min(self._turns, key=lambda sequence: len(sequence.work.job.prompt) - sequence.computed)

    def _prompt_row(self, sequence: Sequence, budget: int) -> Row:
        prompt, start = sequence.work.job.prompt, sequence.computed
        stop = self._stop(start, len(prompt), min(max(budget, LEAST_PASS), self._chunk))
        if self._turns[0] is sequence:
            self._turns.rotate(-1)
        last = stop == len(prompt) and not sequence.generated
        scored = sequence.work.job.prompt_alternatives is not None and not sequence.generated
        outputs = stop - start if scored else int(last)
        return Row(_index(sequence), start, prompt[start:stop], outputs)

    def _stop(self, start: int, length: int, size: int) -> int:
        """Where a pass of about `size` tokens ends: on the grid, or at the end of what is left beyond it."""
        whole = length // self._grid * self._grid
        if start >= whole:
            return length
        return min(start + max(size // self._grid, 1) * self._grid, whole)


def _index(sequence: Sequence) -> int:
    assert sequence.slot is not None
    return sequence.slot.index
