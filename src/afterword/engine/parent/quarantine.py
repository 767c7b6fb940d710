"""Work that killed the engine twice, so that it is not tried a third time. Pure: time is an argument."""

from __future__ import annotations

import hashlib

import msgspec

from afterword.engine.protocol import Job

QUARANTINE_SECONDS = 3600.0
"""How long it is refused."""
_MAX_ENTRIES = 1024  # entries; the oldest leaves first


class Quarantine:
    """What is refused, by fingerprint: never by text, so that nothing of a prompt is kept."""

    def __init__(self) -> None:
        self._until: dict[bytes, float] = {}

    def add(self, work: Job | str, now: float) -> None:
        """Refuse the same from now on."""
        name = fingerprint(work)
        self._until.pop(name, None)
        self._until[name] = now + QUARANTINE_SECONDS
        if len(self._until) > _MAX_ENTRIES:
            del self._until[next(iter(self._until))]

    def contains(self, work: Job | str, now: float) -> bool:
        """Whether it is refused. Costs nothing while nothing is."""
        while self._until and (oldest := next(iter(self._until))) and self._until[oldest] <= now:
            del self._until[oldest]
        return bool(self._until) and fingerprint(work) in self._until


def fingerprint(work: Job | str) -> bytes:
    """Names what is computed; not for whom, nor with which dice: another try has others."""
    if isinstance(work, Job):
        work = msgspec.structs.replace(work, key=b"", namespace="", client="")
    return hashlib.blake2b(msgspec.msgpack.encode(work), digest_size=16).digest()
