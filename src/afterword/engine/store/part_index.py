"""Which parts a folder holds, as this process knows it: bounded in bytes, the least recently used are evicted first.

The index is read from the folder at the start, and again every `SCAN_SECONDS` while parts are written, because other
processes may use the folder too. Together they can exceed the bound by what the others write in that time.

The writing thread changes the parts. The engine's thread looks names up and reserves them.
"""

from __future__ import annotations

import time

from afterword.engine.store.part_files import PartFolder, Pieces

SCAN_SECONDS = 60.0
_USE_NS = 60 * 10**9
"""Nanoseconds after which another use of a part is recorded in its file."""

_SLACK = 20  # an eviction frees this fraction of the bound in addition, so that not every write scans the folder


class PartIndex:
    """The parts of a folder. `most_bytes`: the bound. Times of use are in nanoseconds of Unix time.

    Any thread may use `in`, `is_known`, `reserve`, `note_use`, `forget` and the counts. The other methods block.
    """

    def __init__(self, folder: PartFolder, most_bytes: int) -> None:
        self.folder = folder
        self.most_bytes = most_bytes
        self._used: dict[str, int] = {}
        self._sizes: dict[str, int] = {}
        self._reserved: set[str] = set()
        self._next_scan = 0.0
        self.size = 0
        self.written_bytes = 0
        self.evictions = 0

    def __contains__(self, name: str) -> bool:
        return name in self._used

    @property
    def has_any(self) -> bool:
        """Whether the folder holds any part."""
        return bool(self._used)

    def is_known(self, name: str) -> bool:
        """Whether a part exists or will be written."""
        return name in self._used or name in self._reserved

    def reserve(self, name: str) -> None:
        """Note that a part will be written."""
        self._reserved.add(name)

    def note_use(self, name: str, used: int) -> bool:
        """Note that a part is used. Returns whether `record_use` should record it, which is seldom."""
        if used - self._used.get(name, used) < _USE_NS:
            return False
        self._used[name] = used
        return True

    def forget(self, name: str) -> None:
        """Note that a part does not exist, or is damaged. The next write of the part replaces it."""
        self._used.pop(name, None)
        self._reserved.discard(name)

    def scan(self) -> None:
        """Read the folder."""
        self._next_scan = time.monotonic() + SCAN_SECONDS
        parts, temporary = self.folder.scan()
        self._sizes = {part.name: part.size for part in parts}
        self._used = {part.name: part.used for part in parts}
        self.size = temporary + sum(self._sizes.values())

    def record_use(self, name: str) -> None:
        """Record the last use of a part in its file."""
        if (used := self._used.get(name)) is not None:
            self.folder.mark_used(name, used)

    def write(self, name: str, used: int, pieces: Pieces) -> None:
        """Write a reserved part, after evicting others if necessary. Raises `OSError`; then the part is not kept."""
        try:
            expected = sum(map(len, pieces))
            if time.monotonic() > self._next_scan:
                self.scan()
            if not self._make_room(expected):
                return
            size = self.folder.write(name, pieces)
            self.size += size - self._sizes.get(name, 0)
            self.written_bytes += size
            self._sizes[name], self._used[name] = size, used
            self.folder.mark_used(name, used)
        finally:
            self._reserved.discard(name)

    def _make_room(self, size: int) -> bool:
        """Evict parts until `size` bytes fit. Returns whether they do."""
        if size > self.most_bytes:
            return False
        if self.size + size <= self.most_bytes:
            return True
        self.scan()
        goal = max(0, self.most_bytes - self.most_bytes // _SLACK - size)
        for name in sorted(self._used, key=self._used.__getitem__):
            if self.size <= goal:
                break
            if self.folder.delete(name):
                self.size -= self._sizes.pop(name)
                del self._used[name]
                self.evictions += 1
        return self.size + size <= self.most_bytes
