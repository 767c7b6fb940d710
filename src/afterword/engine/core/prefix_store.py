"""The interface to a store of prefixes outside of the slots, and the keeper that moves prefixes between both.

The store (`engine.store` implements it with files) outlives the process. The keeper decides which prompts wait for a
read, and passes slots to the store so that it can copy what it does not hold. It does no I/O and does not know where
the store keeps anything. Waiting for a read never blocks the engine's thread: other jobs are computed meanwhile.

Prefixes of scored prompts are not read, because the store keeps no scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from afterword.engine.core.prefix_cache import PrefixCache
from afterword.engine.core.slot import PrefixQuery, Slot, common_prefix
from afterword.engine.core.snapshots import TokenArray
from afterword.engine.protocol import Job

PART_TOKENS = 256
"""Tokens of one stored part. Parts are found, checked and evicted one by one; texts with a common beginning share them.

256 tokens are also the least that a read must gain over what the slots hold: as many as one prefill pass computes.
"""

MIN_STORED_TOKENS = 2 * PART_TOKENS
"""Shorter prefixes are not stored: two passes compute them again, and prompts that occur once are often short."""

READ_SECONDS = 20.0
"""The longest time that a prompt waits for a read. Then it is computed."""

MAX_READ_BYTES = 2**30
"""The most bytes of states that are being read or wait for a slot. One state may be larger."""


@dataclass(frozen=True, slots=True)
class StoredState:
    """The state of the first `length` tokens of a text, in the form that the runner restores."""

    length: int
    state: object


class PrefixStore(Protocol):
    """Keeps the states of prefixes by namespace and tokens. The engine's thread calls the methods, which do no I/O."""

    token_bytes: int
    """Bytes of the state of one token."""

    def find(self, namespace: str, tokens: TokenArray) -> int:
        """How many of the first tokens have a stored state, as far as known; 0 for fewer than `MIN_STORED_TOKENS`."""
        ...

    def fetch(self, ticket: int, namespace: str, tokens: TokenArray) -> None:
        """Begin to read the state of these tokens. `fetched` returns it with `ticket`."""
        ...

    def fetched(self) -> list[tuple[int, StoredState | None]]:
        """The reads that have ended since the last call: with the state of all or fewer tokens, or without a state."""
        ...

    def keep(self, slot: Slot, shared: frozenset[int]) -> bool:
        """Copy one part of a slot that is not stored yet. Returns whether there was one and it could be copied.

        The slot must have no pending operations. `shared`: the numbers of snapshots that several slots hold.
        """
        ...

    @property
    def is_writing(self) -> bool:
        """Whether copied parts wait to be written, so that `keep` may copy more soon."""
        ...

    def wait(self, seconds: float) -> None:
        """Wait until a read or a write ends, at most so long."""
        ...


@dataclass(slots=True)
class _Read:
    """The read of one text's state. `jobs`: those that wait for it, or for a slot to put it into."""

    namespace: str
    tokens: TokenArray
    deadline: float
    jobs: set[int]
    begun: bool = False
    ended: bool = False


@dataclass(slots=True)
class PrefixKeeper:
    """Owned by the engine loop, in the engine's thread. Without a store it does nothing. `clock`: returns seconds."""

    slots: PrefixCache
    store: PrefixStore | None
    clock: Callable[[], float]
    _reads: dict[int, _Read] = field(default_factory=dict)  # by ticket, in the order of arrival
    _tickets: dict[int, int] = field(default_factory=dict)  # of jobs, by job id
    _last_ticket: int = 0

    def request(self, job_id: int, job: Job) -> None:
        """Read the state of a prompt's prefix if the store has at least `PART_TOKENS` tokens more than the slots."""
        if self.store is None or len(job.prompt) <= MIN_STORED_TOKENS or job.prompt_alternatives is not None:
            return
        query = self.slots.prefix_query(job)
        found = self.store.find(query.namespace, query.prompt[: query.max_tokens])
        hit = self.slots.find(query) if found else None
        if found < (hit.keep if hit else 0) + PART_TOKENS:
            return
        ticket = self._same(query, found) or self._new(query, found)
        self._reads[ticket].jobs.add(job_id)
        self._tickets[job_id] = ticket
        self._begin()

    def is_reading(self, job_id: int) -> bool:
        """Whether a job waits for a read."""
        ticket = self._tickets.get(job_id)
        return ticket is not None and not self._reads[ticket].ended

    @property
    def waits(self) -> bool:
        """Whether any job waits for a read."""
        return any(not read.ended for read in self._reads.values())

    def forget(self, job_ids: Iterable[int]) -> None:
        """Note that jobs have a slot or have ended. A state that no job needs any more is dropped."""
        for job_id in job_ids:
            ticket = self._tickets.pop(job_id, None)
            if ticket is not None:
                self._reads[ticket].jobs.discard(job_id)
                self._drop_unneeded(ticket)
        self._begin()

    def collect(self) -> list[int]:
        """Offer the states that were read to the prefix cache. Returns the jobs that need not wait any longer."""
        if self.store is None or not self._reads:
            return []
        released: list[int] = []
        for ticket, stored in self.store.fetched():
            read = self._reads.get(ticket)
            if read is None or read.ended:
                continue
            if stored is not None:
                self.slots.offer(ticket, read.namespace, read.tokens[: stored.length], stored.state)
            released += self._end(ticket)
        now = self.clock()
        for ticket in [ticket for ticket, read in self._reads.items() if not read.ended and read.deadline < now]:
            released += self._end(ticket)
        self._begin()
        return released

    def keep(self, most: int) -> bool:
        """Let the store copy up to `most` parts of slots. Returns whether it copied any."""
        if self.store is None:
            return False
        candidates = [slot for slot in self.slots.settled_slots if slot.has_unstored]
        shared = self.slots.shared_snapshots if candidates else frozenset()
        copied = 0
        for slot in sorted(candidates, key=lambda slot: slot.last_used, reverse=True):
            while copied < most and self.store.keep(slot, shared):
                copied += 1
        return copied > 0

    def work_while_idle(self) -> bool:
        """Copy parts, or wait shortly for a read or a write. Returns False if there is nothing to wait for."""
        if self.store is None:
            return False
        if self.keep(most=4):
            return True
        if self.waits or (self.store.is_writing and any(slot.has_unstored for slot in self.slots)):
            self.store.wait(0.02)
            return True
        return False

    def _same(self, query: PrefixQuery, found: int) -> int | None:
        """The read of another job that provides the same prefix, up to a part."""
        for ticket, read in self._reads.items():
            same = read.namespace == query.namespace and common_prefix(read.tokens, query.prompt[:found])
            if same and same + PART_TOKENS > found and len(read.tokens) == same:
                return ticket
        return None

    def _new(self, query: PrefixQuery, found: int) -> int:
        self._last_ticket += 1
        self._reads[self._last_ticket] = _Read(
            query.namespace, query.prompt[:found], self.clock() + READ_SECONDS, jobs=set()
        )
        return self._last_ticket

    def _begin(self) -> None:
        """Begin reads, in the order of arrival, as long as the states in memory stay below `MAX_READ_BYTES`."""
        if self.store is None or not self._reads:
            return
        size = sum(len(read.tokens) for read in self._reads.values() if read.begun) * self.store.token_bytes
        for ticket, read in self._reads.items():
            if not read.begun and not read.ended and (size == 0 or size < MAX_READ_BYTES):
                read.begun = True
                size += len(read.tokens) * self.store.token_bytes
                self.store.fetch(ticket, read.namespace, read.tokens)

    def _end(self, ticket: int) -> list[int]:
        read = self._reads[ticket]
        read.ended = True
        return list(read.jobs)

    def _drop_unneeded(self, ticket: int) -> None:
        if not self._reads[ticket].jobs:
            del self._reads[ticket]
            self.slots.withdraw(ticket)
