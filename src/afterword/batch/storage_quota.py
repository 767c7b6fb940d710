"""How many bytes each key's files take: those that are kept, and those that are being written. From any thread."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping


class StorageQuota:
    """What is taken, by key."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._used: Counter[str] = Counter()

    def reset(self, kept: Mapping[str, int]) -> None:
        """Count what is kept from here on; nothing is being written."""
        with self._lock:
            self._used = Counter(kept)

    def reserve(self, key: str, size: int, most: float = float("inf")) -> bool:
        """Take so many bytes if the key then has no more than `most`; whether it has them."""
        with self._lock:
            if self._used[key] + size > most:
                return False
            self._used[key] += size
            return True

    def release(self, key: str, size: int) -> None:
        """Give bytes back."""
        with self._lock:
            self._used[key] -= size

    def used(self, key: str) -> int:
        """How many bytes a key has."""
        with self._lock:
            return self._used[key]
