"""Counts the bytes of each API key's files: stored ones, and those that are being written. Thread-safe."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping


class StorageQuota:
    """The used bytes by key id."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._used: Counter[str] = Counter()

    def reset(self, stored: Mapping[str, int]) -> None:
        """Replace all counts by the bytes of stored files. Nothing may be reserved at that time."""
        with self._lock:
            self._used = Counter(stored)

    def reserve(self, key: str, size: int, limit: float = float("inf")) -> bool:
        """Add `size` bytes to a key's count and return True; return False if the count would exceed `limit`."""
        with self._lock:
            if self._used[key] + size > limit:
                return False
            self._used[key] += size
            return True

    def release(self, key: str, size: int) -> None:
        """Subtract `size` bytes from a key's count."""
        with self._lock:
            self._used[key] -= size

    def used(self, key: str) -> int:
        """Return the count of a key in bytes."""
        with self._lock:
            return self._used[key]
