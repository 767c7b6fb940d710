"""Implements the core's `PrefixStore` with files (`part_files`), for one loaded model.

A text is stored in parts of `PART_TOKENS` tokens: the keys and values of these tokens. For a model with recurrent
layers there is also an end part at the length of a snapshot: the recurrent state, and the keys and values of the tokens
after the last whole part. The name of a part is a keyed hash of everything that the part depends on: fingerprint,
namespace, and all tokens up to the end of the part. So equal names mean equal bits.

The engine's thread copies parts in memory and never waits for the disk. One thread writes and evicts, another one
reads. Every failure of the disk is a line in the log: what cannot be read is a miss, what cannot be written is not
kept.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NoReturn, Protocol

from afterword.engine.core.prefix_store import MIN_STORED_TOKENS, PART_TOKENS, StoredState
from afterword.engine.core.slot import Slot
from afterword.engine.core.snapshots import TokenArray
from afterword.engine.store.part_files import DamagedPart, Pieces
from afterword.engine.store.part_index import PartIndex
from afterword.engine.store.part_names import PartNames
from afterword.engine.store_stats import StoreStats
from afterword.system.resources import available_memory
from afterword.system.tasks import vital_thread

MAX_QUEUED_BYTES = 64 * 2**20
"""Bytes of copied parts that wait to be written. Then no more parts are copied until some are written."""

PAUSE_SECONDS = 60.0
"""Seconds without writing after the disk has refused a write."""

Buffer = bytes | bytearray | memoryview


class StateAccess(Protocol):
    """How the runner's states are copied and assembled; see `llama.slot_states.SlotStates`."""

    token_bytes: int
    is_recurrent: bool

    def part(self, slot: int, start: int, stop: int) -> bytearray:
        """A copy of the keys and values of the tokens from `start` up to `stop`."""
        ...

    def snapshot(self, number: int) -> bytes:
        """A copy of the recurrent state of a snapshot."""
        ...

    def assemble(self, tokens: TokenArray, parts: list[Buffer], recurrent: Buffer = b"") -> object:
        """The state of a slot that holds these tokens. Called by the reading thread."""
        ...


@dataclass(frozen=True, slots=True)
class _Write:
    """A part to be written: its name, when it was used (nanoseconds of Unix time), its content."""

    name: str
    used: int
    pieces: Pieces

    @property
    def size(self) -> int:
        return sum(map(len, self.pieces))


@dataclass(frozen=True, slots=True)
class _Use:
    """The name of a part whose use is to be recorded."""

    name: str


class DiskStore:
    """The store of one model. The engine's thread calls the methods of `PrefixStore`; `stats` may be called by any.

    `distance`: tokens between two lengths at which snapshots are taken. `log`: called with one line for each failure.
    """

    def __init__(
        self,
        index: PartIndex,
        fingerprint: str,
        states: StateAccess,
        *,
        distance: int,
        log: Callable[[str], None],
    ) -> None:
        self.token_bytes = max(1, states.token_bytes)
        self._index = index
        self._names = PartNames(index.folder.key, fingerprint)
        self._states = states
        self._has_whole = states.token_bytes > 0
        self._distance = distance
        self._log = log
        self._reads: queue.SimpleQueue[tuple[int, str, TokenArray]] = queue.SimpleQueue()
        self._writes: queue.SimpleQueue[_Write | _Use] = queue.SimpleQueue()
        self._ended: deque[tuple[int, StoredState | None]] = deque()
        self._changed = threading.Condition()
        self._queued_bytes = 0  # changed under `_changed`
        self._paused_until = 0.0
        self._taken: dict[Slot, int] = {}  # when the texts in slots were first seen, in nanoseconds of Unix time
        self._hits = self._hit_tokens = self._failures = 0  # written by the reading thread; failures by both

    def start(self) -> None:
        """Start the threads that read and write."""
        vital_thread(self._read_all, name="prefix reader")
        vital_thread(self._write_all, name="prefix writer")

    def stats(self) -> StoreStats:
        """The counts since the start of this process, and the bytes in the folder."""
        return StoreStats(
            hits=self._hits,
            hit_tokens=self._hit_tokens,
            written_bytes=self._index.written_bytes,
            evictions=self._index.evictions,
            failures=self._failures,
            bytes=self._index.size,
        )

    # ---- the engine's thread

    def find(self, namespace: str, tokens: TokenArray) -> int:
        """See `PrefixStore.find`."""
        if not self._index.has_any or len(tokens) < MIN_STORED_TOKENS:
            return 0
        whole = 0
        for name in self._names.at(namespace, tokens, _whole_lengths(len(tokens)), b"W") if self._has_whole else ():
            if name not in self._index:
                break
            whole += PART_TOKENS
        if not self._states.is_recurrent:
            return whole if whole >= MIN_STORED_TOKENS else 0
        most = min(len(tokens), whole + PART_TOKENS - 1) if self._has_whole else len(tokens)
        lengths = range(self._distance, most + 1, self._distance)
        ends = zip(lengths, self._names.at(namespace, tokens, lengths, b"E"), strict=True)
        found = max((length for length, name in ends if name in self._index), default=0)
        return found if found >= MIN_STORED_TOKENS else 0

    def fetch(self, ticket: int, namespace: str, tokens: TokenArray) -> None:
        """See `PrefixStore.fetch`."""
        self._reads.put((ticket, namespace, tokens))

    def fetched(self) -> list[tuple[int, StoredState | None]]:
        """See `PrefixStore.fetched`."""
        ended = []
        while self._ended:
            ended.append(self._ended.popleft())
        return ended

    @property
    def is_writing(self) -> bool:
        """See `PrefixStore.is_writing`."""
        return self._queued_bytes > 0

    def wait(self, seconds: float) -> None:
        """See `PrefixStore.wait`."""
        with self._changed:
            if not self._ended:
                self._changed.wait(seconds)

    def keep(self, slot: Slot, shared: frozenset[int]) -> bool:
        """See `PrefixStore.keep`.

        Of the snapshots, the longest one of a slot is stored and those that several slots hold, once the slot's
        sequence has ended: while a prompt is computed, each of its snapshots is the longest for a moment.
        """
        if self._states.is_recurrent:
            return not slot.in_use and self._keep_snapshots(slot, shared)
        if slot.reusable < MIN_STORED_TOKENS or slot.reusable // PART_TOKENS == slot.stored // PART_TOKENS:
            return False
        return self._keep_whole(slot, slot.reusable)

    def _keep_snapshots(self, slot: Slot, shared: frozenset[int]) -> bool:
        """Store the first snapshot that is worth it, after the whole parts before it."""
        longest = max(slot.snapshots, default=0)
        for length in sorted(slot.snapshots.keys() - slot.stored_snapshots):
            number = slot.snapshots[length]
            worth = length == longest or number in shared
            if worth and MIN_STORED_TOKENS <= length <= slot.reusable and length % self._distance == 0:
                if self._has_whole and self._keep_whole(slot, length):
                    return True
                if self._has_whole and slot.stored < length - length % PART_TOKENS:
                    return False  # the queue is full
                (name,) = self._names.at(slot.namespace, slot.tokens, range(length, length + 1), b"E")
                start = length - length % PART_TOKENS if self._has_whole else length
                copied = self._keep_part(
                    name,
                    self._used(slot, length // PART_TOKENS),
                    partial(self._copy_end, slot.index, start, length, number),
                )
                if copied is None:
                    return False
                slot.stored_snapshots.add(length)
                if copied:
                    return True
            slot.stored_snapshots.add(length)
        slot.stored = slot.reusable
        return False

    def _keep_whole(self, slot: Slot, length: int) -> bool:
        """Store the first whole part of the first `length` tokens that is not stored. Returns whether there was one."""
        first = slot.stored // PART_TOKENS
        lengths = range((first + 1) * PART_TOKENS, length + 1, PART_TOKENS)
        for place, name in enumerate(self._names.at(slot.namespace, slot.tokens, lengths, b"W"), first):
            start = place * PART_TOKENS
            copied = self._keep_part(name, self._used(slot, place), partial(self._copy_whole, slot.index, start))
            if copied is None:
                return False
            slot.stored = start + PART_TOKENS
            if copied:
                return True
        return False

    def _copy_whole(self, slot: int, start: int) -> Pieces:
        return (self._states.part(slot, start, start + PART_TOKENS),)

    def _copy_end(self, slot: int, start: int, length: int, snapshot: int) -> Pieces:
        return self._states.part(slot, start, length), self._states.snapshot(snapshot)

    def _used(self, slot: Slot, place: int) -> int:
        """When a part of a slot's text counts as used: see `_use_time`."""
        if not slot.stored or slot not in self._taken:
            self._taken[slot] = time.time_ns()
        return _use_time(self._taken[slot], place)

    def _keep_part(self, name: str, used: int, copy: Callable[[], Pieces]) -> bool | None:
        """Copy a part and queue it, unless it is stored. Returns whether it was copied; None if there is no room."""
        if self._index.is_known(name):
            if name in self._index and self._index.note_use(name, used):
                self._writes.put(_Use(name))
            return False
        if self._queued_bytes >= MAX_QUEUED_BYTES or time.monotonic() < self._paused_until:
            return None
        self._index.reserve(name)
        write = _Write(name, used, copy())
        self._add_queued(write.size)
        self._writes.put(write)
        return True

    # ---- the reading thread

    def _read_all(self) -> NoReturn:
        while True:
            ticket, namespace, tokens = self._reads.get()
            try:
                stored = self._read(namespace, tokens)
            except Exception as problem:  # a prefix that cannot be read must not end the worker
                self._fail(f"A stored prefix cannot be read ({problem!r}); it is computed.")
                stored = None
            if stored is not None:
                self._hits += 1
                self._hit_tokens += stored.length
            self._ended.append((ticket, stored))
            with self._changed:
                self._changed.notify_all()

    def _read(self, namespace: str, tokens: TokenArray) -> StoredState | None:
        """Read the state of these tokens, or without recurrent layers of fewer if a part is missing."""
        if available_memory() < 2 * len(tokens) * self._states.token_bytes:
            raise MemoryError(f"for the state of {len(tokens)} tokens")
        parts: list[Buffer] = []
        for place, name in enumerate(
            self._names.at(namespace, tokens, _whole_lengths(len(tokens)), b"W") if self._has_whole else ()
        ):
            part = self._read_part(name, place)
            if part is None or len(part) != PART_TOKENS * self._states.token_bytes:
                break
            parts.append(part)
        if self._states.is_recurrent:
            return self._read_end(namespace, tokens, parts)
        length = len(parts) * PART_TOKENS
        if length < MIN_STORED_TOKENS:
            return None
        return StoredState(length, self._states.assemble(tokens[:length], parts))

    def _read_end(self, namespace: str, tokens: TokenArray, parts: list[Buffer]) -> StoredState | None:
        length = len(tokens)
        if self._has_whole and len(parts) < length // PART_TOKENS:
            return None
        (name,) = self._names.at(namespace, tokens, range(length, length + 1), b"E")
        end = self._read_part(name, length // PART_TOKENS)
        size = (length % PART_TOKENS) * self._states.token_bytes
        if end is None or len(end) <= size:
            return None
        rest = [end[:size]] if size else []
        return StoredState(length, self._states.assemble(tokens, [*parts, *rest], end[size:]))

    def _read_part(self, name: str, place: int) -> memoryview | None:
        """The content of a part, None if there is none or it is damaged."""
        try:
            content = self._index.folder.read(name)
        except FileNotFoundError:  # another process has evicted it
            self._index.forget(name)
            return None
        except DamagedPart:
            self._index.forget(name)
            self._fail(f"The stored prefix {name}.part is damaged; it is computed again.")
            return None
        except OSError as error:
            self._index.forget(name)
            self._fail(f"The stored prefix {name}.part cannot be read ({error.strerror}); it is computed again.")
            return None
        if self._index.note_use(name, _use_time(time.time_ns(), place)):
            self._writes.put(_Use(name))
        return content

    # ---- the writing thread

    def _write_all(self) -> NoReturn:
        unsynchronized = False
        while True:
            try:
                task = self._writes.get(timeout=1.0 if unsynchronized else None)
            except queue.Empty:
                self._attempt(self._index.folder.synchronize)
                unsynchronized = False
                continue
            if isinstance(task, _Use):
                self._attempt(partial(self._index.record_use, task.name))
                continue
            if time.monotonic() < self._paused_until:
                self._index.forget(task.name)
            else:
                unsynchronized |= self._attempt(partial(self._index.write, task.name, task.used, task.pieces))
            self._add_queued(-task.size)

    def _attempt(self, work: Callable[[], None]) -> bool:
        """Do some work with the disk. If the disk refuses it, log a line and write nothing for a while."""
        try:
            work()
        except Exception as problem:  # a disk that cannot be written must not end the worker
            self._paused_until = time.monotonic() + PAUSE_SECONDS
            reason = problem.strerror if isinstance(problem, OSError) else repr(problem)
            self._fail(
                f"--cache-dir {self._index.folder.path} cannot be written ({reason}). "
                f"No prefixes are stored for {PAUSE_SECONDS:.0f} s."
            )
            return False
        return True

    def _add_queued(self, size: int) -> None:
        with self._changed:
            self._queued_bytes += size
            self._changed.notify_all()

    def _fail(self, line: str) -> None:
        with self._changed:
            self._failures += 1
        self._log(line)


def _use_time(now: int, place: int) -> int:
    """When a part counts as used if its text was used `now`. `place`: the number of parts before it.

    Without the first parts of a text the later ones are useless. So the later ones count as older, and are evicted
    first. The parts of a text that is being computed have the time of its beginning, for the same reason.
    """
    return now - place * 1000


def _whole_lengths(tokens: int) -> range:
    """The lengths at which the whole parts of a text end."""
    return range(PART_TOKENS, tokens + 1, PART_TOKENS)
