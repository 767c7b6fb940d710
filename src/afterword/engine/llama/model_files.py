"""The files that a model was loaded from: what tells them apart from others, and whether their bytes have changed.

llama.cpp maps files to memory, so a file that is overwritten in place changes weights under a running engine. Each file
is therefore held open from before it is loaded, and compared with what it was: after loading, after each pass and each
second. A file that is replaced by renaming another one over it does not change: the bytes that were loaded stay.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import cached_property

from afterword.errors import EngineError, SettingError

HEAD_BYTES = 2**20  # bytes read whole: they hold what shapes the model
SAMPLES, SAMPLE_BYTES = 2**12, 2**12  # of the rest, evenly spaced; up to 16 MiB all of it

FileState = tuple[int, int, int]
"""Size in bytes, time of the last change of the content and of the last change of anything (both in ns)."""


class ModelFiles:
    """All parts of one model, open for reading until the process ends. `check` may be called from any thread."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._parts = [_FilePart(path) for path in paths]

    def digest(self) -> bytes:
        """Names the content of all parts by size, start and samples: tells models apart without reading gigabytes."""
        return hashlib.sha256(b"".join(part.digest for part in self._parts)).digest()

    def confirm_loaded(self) -> None:
        """Raise `SettingError` unless the paths have named these files, unchanged, since they were opened."""
        for part in self._parts:
            if part.replaced() or part.changed():
                raise SettingError(f"{part.path} was changed while it was being loaded.")

    def check(self) -> None:
        """Raise `EngineError` if a file is no longer what was loaded from it. Takes a microsecond a part."""
        for part in self._parts:
            if part.changed():
                raise EngineError(f"{part.path} was changed while it was in use; it has to be loaded again.")


class _FilePart:
    """One file. Raises `SettingError` if it cannot be read."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._state = self._now()
        except OSError as error:
            raise SettingError(f"{path} cannot be read: {error.strerror}.") from None

    @cached_property
    def digest(self) -> bytes:
        """See `ModelFiles.digest`. After loading, since the file's pages are then in memory."""
        return _digest(self._file, self._state[0])

    def changed(self) -> bool:
        """Whether its bytes may be others. A new name, owner or mode changes no byte, and is told by the digest."""
        try:
            now = self._now()
            if now == self._state:
                return False
            if now[:2] != self._state[:2] or _digest(self._file, now[0]) != self.digest:
                return True
        except OSError:  # on a network's disk the file may be gone
            return True
        self._state = now
        return False

    def replaced(self) -> bool:
        """Whether its path names another file now, or none."""
        try:
            return not os.path.samestat(os.stat(self.path), os.fstat(self._file))
        except OSError:
            return True

    def _now(self) -> FileState:
        found = os.fstat(self._file)
        return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _digest(file: int, size: int) -> bytes:
    digest = hashlib.sha256(str(size).encode())
    digest.update(os.pread(file, HEAD_BYTES, 0))
    for offset in range(HEAD_BYTES, size, max((size - HEAD_BYTES) // SAMPLES, SAMPLE_BYTES)):
        digest.update(os.pread(file, SAMPLE_BYTES, offset))
    return digest.digest()
