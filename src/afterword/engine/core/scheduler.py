"""Decides what the next forward pass computes. Pure: it touches no model, no clock and no randomness.

Rules: a sequence has a slot for its whole life, so nothing that runs is ever preempted. Prompts are computed
in chunks on a grid counted from their first token, so that the numbers do not depend on who else is here. Chunks
of prompts take turns with tokens of running sequences, so that neither waits for the other to finish. A prompt is
computed once for all its samples: they fork from whichever of them holds it.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable

from afterword.engine.core.batch import Batch, Cut, Fork, Row
from afterword.engine.core.sequence import Sequence, Work
from afterword.engine.protocol import Job, Load


class Scheduler:
    """Owner of all work, sequences and slots. One thread."""

    def __init__(self, slots: int, chunk: int, rewinds: bool = True) -> None:
        self._slots = slots
        self._chunk = chunk
        self._rewinds = rewinds
        self._free = list(range(slots))
        self._works: dict[int, Work] = {}
        self._waiting: deque[Work] = deque()  # nothing computed yet, in order of arrival
        self._held: dict[int, Sequence] = {}  # slot -> its sequence
        self._turns: deque[Sequence] = deque()  # sequences whose prompt is being computed, next turn first
        self._moves: list[Fork | Cut] = []
        self._prompt_turn = True

    # ---- what comes in

    def add(self, run: int, job: Job) -> None:
        """Take a new job, named by `run`."""
        work = Work(run, job)
        self._works[run] = work
        self._waiting.append(work)

    def close(self, run: int) -> None:
        """Forget a job and everything that it holds. Unknown names are ignored: the job may just have ended."""
        work = self._works.get(run)
        if work is None:
            return
        work.queued.clear()
        for sequence in list(work.live):
            self.end(sequence)
        self._forget(work)

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

    def schedule(self) -> Batch | None:
        """The next pass, or None when there is nothing to compute."""
        self._admit()
        running = [s for s in self._held.values() if not s.catching_up]
        if self._turns and (self._prompt_turn or not running):
            rows: tuple[Row, ...] = (self._prompt_row(self._turns[0]),)
            self._turns.rotate(-1)
            self._prompt_turn = False
        elif running:
            self._close_gap()
            rows = tuple(Row(self._slot(s), s.computed, s.slice(s.computed, s.length), 1) for s in running)
            self._prompt_turn = True
        else:
            return None
        moves, self._moves = tuple(self._moves), []
        return Batch(moves, rows)

    def at(self, slot: int) -> Sequence:
        """The sequence in a slot."""
        return self._held[slot]

    def computed(self, row: Row) -> Sequence:
        """Note that a row's tokens are computed; returns its sequence."""
        sequence = self._held[row.slot]
        sequence.computed += len(row.tokens)
        if not sequence.catching_up and sequence in self._turns:
            self._turns.remove(sequence)
        return sequence

    def begin(self, first: Sequence, samples: Iterable[Sequence]) -> None:
        """The prompt in `first` is computed and every sample has its first token.

        `samples` are those that go on; `first` is replaced by one of them, or its slot becomes free.
        """
        work = first.work
        work.started = True
        work.queued.extend(samples)
        self.end(first)

    def end(self, sequence: Sequence) -> None:
        """A sample is complete: its slot goes to a sample of the same prompt, or becomes free."""
        work, slot = sequence.work, sequence.slot
        if slot is None:
            work.queued.remove(sequence)
        elif work.queued:
            keep = len(work.job.prompt) if self._holds_prompt(sequence) else 0
            if keep < sequence.computed:
                self._moves.append(Cut(slot, keep))
            self._leave(sequence)
            self._place(work.queued.popleft(), slot, keep)
        else:
            self._moves.append(Cut(slot, 0))
            self._leave(sequence)
            heapq.heappush(self._free, slot)
        if not work.live and not work.queued:
            self._forget(work)

    def load(self) -> Load:
        """How many sequences there are, are in use, and are waited for."""
        waiting = sum(w.job.samples for w in self._waiting) + sum(len(w.queued) for w in self._works.values())
        return Load(self._slots, len(self._held), waiting)

    # ---- slots

    def _admit(self) -> None:
        while self._free and self._waiting:
            work = self._waiting.popleft()
            self._place(Sequence(work, sample=0), heapq.heappop(self._free), 0)
        for work in [w for w in self._works.values() if w.queued]:
            self._spread(work)

    def _spread(self, work: Work) -> None:
        """Fork queued samples into free slots while a slot of theirs can serve as the source."""
        while self._free and work.queued and (source := self._source(work)) is not None:
            target, keep = heapq.heappop(self._free), len(work.job.prompt)
            self._moves.append(Fork(self._slot(source), target, keep))
            self._place(work.queued.popleft(), target, keep)

    def _source(self, work: Work) -> Sequence | None:
        return next(filter(self._holds_prompt, work.live), None)

    def _holds_prompt(self, sequence: Sequence) -> bool:
        """Whether its slot can give the prompt's state: exactly the prompt, where state cannot be rewound."""
        prompt = len(sequence.work.job.prompt)
        return sequence.computed == prompt or (self._rewinds and sequence.computed > prompt)

    def _close_gap(self) -> None:
        """Move what runs in the highest slot to a free one below: neighbours are computed together, others are not."""
        last = max(self._held)
        sequence = self._held[last]
        if not self._free or self._free[0] > last or sequence.catching_up:
            return
        target = heapq.heapreplace(self._free, last)
        self._moves += [Fork(last, target, sequence.computed), Cut(last, 0)]
        del self._held[last]
        self._held[target], sequence.slot = sequence, target

    def _place(self, sequence: Sequence, slot: int, computed: int) -> None:
        sequence.slot, sequence.computed = slot, computed
        sequence.work.live.append(sequence)
        self._held[slot] = sequence
        if sequence.catching_up:
            self._turns.append(sequence)

    def _leave(self, sequence: Sequence) -> None:
        del self._held[self._slot(sequence)]
        sequence.work.live.remove(sequence)
        if sequence in self._turns:
            self._turns.remove(sequence)
        sequence.slot = None

    def _forget(self, work: Work) -> None:
        self._works.pop(work.run, None)
        if work in self._waiting:
            self._waiting.remove(work)

    def _prompt_row(self, sequence: Sequence) -> Row:
        prompt, start = sequence.work.job.prompt, sequence.computed
        stop = min((start // self._chunk + 1) * self._chunk, len(prompt))
        last = stop == len(prompt) and not sequence.generated
        scored = sequence.work.job.prompt_alternatives is not None and not sequence.generated
        outputs = stop - start if scored else int(last)
        return Row(self._slot(sequence), start, prompt[start:stop], outputs)

    @staticmethod
    def _slot(sequence: Sequence) -> int:
        assert sequence.slot is not None
        return sequence.slot
