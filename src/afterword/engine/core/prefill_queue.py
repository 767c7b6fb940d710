"""Which piece of which prompt the next pass computes, and when running sequences have their turn instead. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from afterword.engine.core.compute_share import ALLOWED_EXCESS, ComputeShare
from afterword.engine.core.fair_share import share_group
from afterword.engine.core.forward_batch import BatchEntry
from afterword.engine.core.sequence import Sequence

MIN_CHUNK = 32  # tokens of a prompt: fewer are computed hardly faster
MAX_BUDGETS = 2  # for prompts at a time, while they are many and few sequences run
COMPETING = 0.2  # of a budget, which a piece takes at most while sequences of other clients run


class PrefillQueue:
    """The sequences that are computed in pieces: their prompt is not complete, or their state was lost in a pause."""

    def __init__(self, chunk: int, grid: int) -> None:
        self._chunk = chunk
        self._grid = grid
        self._clients: deque[Sequence] = deque()  # next turn first
        self._served: dict[str, int] = {}  # by client: how many turns there had been before its last
        self._count = 0
        self._spent = 0  # tokens of prompts computed since running sequences had their turn
        self._short_turn = True
        self.debts = ComputeShare()

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._clients)

    def add(self, sequence: Sequence) -> None:
        """A sequence has something to compute in pieces."""
        self._clients.append(sequence)

    def discard(self, sequence: Sequence) -> None:
        """A sequence has nothing more to compute in pieces, or has no slot any more."""
        if sequence in self._clients:
            self._clients.remove(sequence)

    def next_chunk(self, running: list[Sequence], budget: int | None) -> BatchEntry | None:
        """The next piece, or None if it is the turn of the sequences that run.

        `budget`: see `Scheduler.schedule`.
        """
        if not running:
            self._spent = 0
        turns = [sequence for sequence in self._clients if not sequence.work.held]
        left = self._prefill_tokens(budget, len(running), len(turns)) - self._spent
        if not turns or (self._spent and left < MIN_CHUNK) or self._owes_running(turns, running):
            self._spent = 0
            return None
        sequence = self._next_turn(turns)
        if budget is not None and any(each.work.job.client != sequence.work.job.client for each in running):
            left = min(left, int(budget * COMPETING))
        row = self._row(sequence, left)
        self._spent += len(row.tokens)
        return row

    def _prefill_tokens(self, budget: int | None, running: int, waiting: int) -> int:
        """How many tokens of prompts may be computed before running sequences have a turn.

        More while most are still waiting for their prompt: running few at a time costs all of them.
        """
        if budget is None:
            return self._chunk
        return int(budget * min(1 + waiting / max(running, 1), MAX_BUDGETS))

    def _next_turn(self, turns: list[Sequence]) -> Sequence:
        """Of the client that owes least, or whose turn was longest ago.

        Of its sequences the one with the least to compute and the one that came first take turns.
        """
        client = self._next_client(turns)
        turns = [sequence for sequence in turns if sequence.work.job.client == client]
        self._count += 1
        clients = {sequence.work.job.client for sequence in self._clients}
        self._served = {name: at for name, at in self._served.items() if name in clients} | {client: self._count}
        self._short_turn = not self._short_turn
        chosen = turns[0]
        if not self._short_turn:
            chosen = min(turns, key=lambda sequence: sequence.pieces - sequence.computed)
        if chosen is turns[0]:
            self._clients.remove(chosen)
            self._clients.append(chosen)
        return chosen

    def gives_way(self, client: str) -> bool:
        """Whether a client has a prompt that waits until others have had their time, so that a second one would too."""
        waits = any(each.work.job.client == client and not each.work.held for each in self._clients)
        return waits and self.debts.excess(client) > 0

    def _next_client(self, turns: list[Sequence]) -> str:
        clients = (sequence.work.job.client for sequence in turns)
        return min(clients, key=lambda name: (self.debts.excess(name), self._served.get(name, -1)))

    def _owes_running(self, turns: list[Sequence], running: list[Sequence]) -> bool:
        """Whether the client whose turn it is owes time to one of those that run."""
        client = self._next_client(turns)
        others = any(share_group(each.work.job.client) != share_group(client) for each in running)
        return others and self.debts.excess(client) > ALLOWED_EXCESS

    def _row(self, sequence: Sequence, budget: int) -> BatchEntry:
        start = sequence.computed
        stop = self._stop(start, sequence.pieces, min(max(budget, MIN_CHUNK), self._chunk))
        outputs = stop - start if sequence.is_scored else int(stop == sequence.length)
        return BatchEntry(sequence.index, start, sequence.slice(start, stop), outputs)

    def _stop(self, start: int, length: int, size: int) -> int:
        """Where a pass of about `size` tokens ends: on the grid, or at the end of what is left beyond it."""
        whole = length // self._grid * self._grid
        if start >= whole:
            return length
        return min(start + max(size // self._grid, 1) * self._grid, whole)
