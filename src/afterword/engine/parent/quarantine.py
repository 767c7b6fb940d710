"""The list of jobs and texts that are refused because each crashed the worker twice.

Pure: callers pass in the time.
"""

from __future__ import annotations

import hashlib

import msgspec

from afterword.engine.protocol import Job

QUARANTINE_SECONDS = 3600.0
"""How long an entry is refused."""
_MAX_ENTRIES = 1024  # the oldest entry is removed first


class Quarantine:
    """Stores hashes only, never texts, so that no part of a prompt is kept."""

    def __init__(self) -> None:
        self._until: dict[bytes, float] = {}

    def add(self, work: Job | str, now: float) -> None:
        """Refuse the same job or text for `QUARANTINE_SECONDS`."""
        key = work_hash(work)
        self._until.pop(key, None)
        self._until[key] = now + QUARANTINE_SECONDS
        if len(self._until) > _MAX_ENTRIES:
            del self._until[next(iter(self._until))]

    def contains(self, work: Job | str, now: float) -> bool:
        """Whether a job or text is refused. Hashes nothing while the quarantine is empty."""
        while self._until and (oldest := next(iter(self._until))) and self._until[oldest] <= now:
            del self._until[oldest]
        return bool(self._until) and work_hash(work) in self._until


def work_hash(work: Job | str) -> bytes:
    """A hash of the computation (16 bytes). The client, namespace and random key are left out: a retry changes them."""
    if isinstance(work, Job):
        work = msgspec.structs.replace(work, key=b"", namespace="", client="")
    return hashlib.blake2b(msgspec.msgpack.encode(work), digest_size=16).digest()
