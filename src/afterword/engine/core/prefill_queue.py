"""Which chunk of which prompt the next pass computes, and when running sequences decode instead.

Pure: it decides from counts and durations that the scheduler passes in. The scheduler owns it, in the engine's thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import filterfalse

from afterword.engine.core.compute_share import ALLOWED_EXCESS, ComputeShare
from afterword.engine.core.fair_share import share_group
from afterword.engine.core.forward_batch import BatchEntry
from afterword.engine.core.prefix_cache import PrefixCache
from afterword.engine.core.sequence import JobState, Sequence
from afterword.engine.core.slot import PrefixHit

MIN_CHUNK = 32  # tokens of a prompt; a pass over fewer is hardly faster
MAX_BUDGETS = 2  # budgets of prompt tokens between two decodes, while many prompts wait and few sequences run
MAX_ROWS = 16  # tokens of a pass whose logits are kept until they are sent: 16 MiB for 262,144 tokens
COMPETING_SHARE = 0.2  # the largest chunk, as a fraction of a budget, while sequences of other clients run


class PrefillQueue:
    """Sequences that are computed in chunks: their prompt is incomplete, or their state was lost in a preemption.

    The parameters are attributes of `Runner` and described there.
    """

    def __init__(self, chunk: int, grid: int, joins_prompts: bool = False) -> None:
        self._chunk = chunk
        self._grid = grid
        self._joins_prompts = joins_prompts
        self._queue: deque[Sequence] = deque()  # next turn first
        self._served: dict[str, int] = {}  # by client: the number of its last turn
        self._count = 0
        self._spent = 0  # prompt tokens computed since the last decode
        self._oldest_first = True
        self.compute_share = ComputeShare()

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._queue)

    def add(self, sequence: Sequence) -> None:
        """Add a sequence that needs prefill."""
        self._queue.append(sequence)

    def discard(self, sequence: Sequence) -> None:
        """Remove a sequence that needs no more prefill or has lost its slot. No effect if it is not in the queue."""
        if sequence in self._queue:
            self._queue.remove(sequence)

    def computes_more(self, state: JobState, hit: PrefixHit | None, slots: PrefixCache) -> bool:
        """Whether a sequence of another job computes more of a waiting job's prompt than its cached prefix."""
        found = hit.keep if hit else 0
        queue = (each for each in self._queue if each.is_scored or state.query.alternatives is None)
        coming = [each for each in queue if not each.job_state.suspended]
        return any(
            other.slot is not None and slots.awaits(state.query, found, other.job_state.query, other.slot)
            for other in coming
        )

    def next_chunks(self, running: list[Sequence], budget: int | None) -> tuple[BatchEntry, ...]:
        """The chunks of the next pass, each of another prompt. Empty if the running sequences decode next.

        `budget`: see `Scheduler.schedule`.
        """
        if not running:
            self._spent = 0
        ready = [sequence for sequence in self._queue if not sequence.job_state.suspended]
        left = self._prefill_tokens(budget, len(running), len(ready)) - self._spent
        if not ready or (self._spent and left < MIN_CHUNK) or self._owes_running(ready, running):
            self._spent = 0
            return ()
        sequence = self._next_turn(ready)
        extra = min(MIN_CHUNK, left // 2)  # half, so that 65 tokens fit where the time allows 47 (docs/log.md)
        if budget is not None and any(each.job_state.job.client != sequence.job_state.job.client for each in running):
            left, extra = min(left, int(budget * COMPETING_SHARE)), 0
        chunks = [self._batch_entry(sequence, left, extra)]
        if self._joins_prompts and not _has_rows(sequence):
            others = (each for each in ready if each is not sequence and _same_client(each, sequence))
            self._join(chunks, filterfalse(_has_rows, others), left + extra)
        self._spent += sum(len(chunk.tokens) for chunk in chunks)
        return tuple(sorted(chunks, key=lambda chunk: chunk.slot))

    def _join(self, chunks: list[BatchEntry], others: Iterator[Sequence], most: int) -> None:
        """Add the ends of other prompts that fit: the whole pass has at most `most` tokens."""
        room = min(most, self._chunk) - len(chunks[0].tokens)
        for sequence in others:
            if sequence.prefill_length - sequence.computed <= room:
                chunks.append(self._batch_entry(sequence, room))
                room -= len(chunks[-1].tokens)

    def _prefill_tokens(self, budget: int | None, running: int, waiting: int) -> int:
        """How many prompt tokens may be computed before running sequences decode.

        It is more while most sequences still wait for their prompt: a decode of few sequences delays all the others.
        """
        if budget is None:
            return self._chunk
        return int(budget * min(1 + waiting / max(running, 1), MAX_BUDGETS))

    def _next_turn(self, ready: list[Sequence]) -> Sequence:
        """A sequence of the client that owes least, or of equal clients the one served longest ago.

        Of the client's sequences, the one with the fewest tokens left and the one that came first take turns.
        """
        client = self._next_client(ready)
        ready = [sequence for sequence in ready if sequence.job_state.job.client == client]
        self._count += 1
        clients = {sequence.job_state.job.client for sequence in self._queue}
        self._served = {name: at for name, at in self._served.items() if name in clients} | {client: self._count}
        self._oldest_first = not self._oldest_first
        chosen = ready[0]
        if not self._oldest_first:
            chosen = min(ready, key=lambda sequence: sequence.prefill_length - sequence.computed)
        if chosen is ready[0]:
            self._queue.remove(chosen)
            self._queue.append(chosen)
        return chosen

    def must_wait(self, client: str) -> bool:
        """Whether a client owes time and already has a prompt in the queue, so that a second prompt would wait too."""
        waits = any(each.job_state.job.client == client and not each.job_state.suspended for each in self._queue)
        return waits and self.compute_share.excess(client) > 0

    def _next_client(self, ready: list[Sequence]) -> str:
        clients = (sequence.job_state.job.client for sequence in ready)
        return min(clients, key=lambda name: (self.compute_share.excess(name), self._served.get(name, -1)))

    def _owes_running(self, ready: list[Sequence], running: list[Sequence]) -> bool:
        """Whether the next client owes too much time while sequences of other clients run."""
        client = self._next_client(ready)
        others = any(share_group(each.job_state.job.client) != share_group(client) for each in running)
        return others and self.compute_share.excess(client) > ALLOWED_EXCESS

    def _batch_entry(self, sequence: Sequence, budget: int, extra: int = 0) -> BatchEntry:
        start = sequence.computed
        stop = self._stop(sequence, self._size(sequence, max(budget, MIN_CHUNK), extra))
        outputs = stop - start if sequence.is_scored else int(stop == sequence.length)
        return BatchEntry(sequence.index, start, sequence.slice(start, stop), outputs)

    def _size(self, sequence: Sequence, budget: int, extra: int) -> int:
        """The tokens of the next chunk: up to `extra` more than `budget` if that completes the prompt.

        The rest of the prompt would take another pass, and one over fewer than `MIN_CHUNK` tokens is hardly faster.
        """
        most = min(MAX_ROWS, self._chunk) if _has_rows(sequence) else self._chunk
        left, size = sequence.prefill_length - sequence.computed, min(budget, most)
        completes = size < left < size + extra and left <= most
        return left if completes and self._stop(sequence, left) == sequence.prefill_length else size

    def _stop(self, sequence: Sequence, size: int) -> int:
        """The end of a chunk of about `size` tokens: at a border or on the grid.

        It is the end of the prompt if less than a grid step is left.
        """
        start, length = sequence.computed, sequence.prefill_length
        whole = length // self._grid * self._grid
        stop = min(start + max(size // self._grid, 1) * self._grid, whole) if start < whole else length
        assert sequence.slot is not None
        return min((border for border in sequence.slot.borders if start < border < stop), default=stop)


def _has_rows(sequence: Sequence) -> bool:
    """Whether the logits of the chunk's tokens are kept until they are sent: `MAX_ROWS` bounds them for one chunk."""
    return sequence.is_scored and sequence.job_state.query.has_rows


def _same_client(one: Sequence, other: Sequence) -> bool:
    return one.job_state.job.client == other.job_state.job.client
