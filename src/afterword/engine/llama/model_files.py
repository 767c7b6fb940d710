"""Identifies the files of a loaded model, and detects changes of their content.

llama.cpp maps the files into memory, so overwriting a file in place changes the weights of a running worker. Each file
is therefore opened before it is loaded, and its state is compared after loading, after each pass and every second. A
file that is replaced by renaming does not count as changed: the open file keeps the bytes that were loaded.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import cached_property

from afterword.errors import EngineError, SettingError

HEAD_BYTES = 2**20  # the first bytes are hashed completely: they hold the metadata
SAMPLES, SAMPLE_BYTES = 2**12, 2**12  # evenly spaced samples of the rest; a rest of up to 16 MiB is hashed completely

FileState = tuple[int, int, int]
"""Size in bytes, `st_mtime_ns` and `st_ctime_ns`."""


class ModelFiles:
    """Holds all parts of one model open until the process ends. `check` may be called from any thread."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._parts = [_FilePart(path) for path in paths]

    def digest(self) -> bytes:
        """A SHA-256 over size, first bytes and samples of all parts. It avoids reading gigabytes."""
        return hashlib.sha256(b"".join(part.digest for part in self._parts)).digest()

    def confirm_loaded(self) -> None:
        """Raise `SettingError` if a file was changed or replaced since it was opened."""
        for part in self._parts:
            if part.replaced() or part.changed():
                raise SettingError(f"{part.path} was changed while it was being loaded.")

    def check(self) -> None:
        """Raise `EngineError` if the content of a file has changed. Takes a microsecond for each part."""
        for part in self._parts:
            if part.changed():
                raise EngineError(f"{part.path} was changed while it was in use. The model must be loaded again.")


class _FilePart:
    """One open file. Raises `SettingError` if it cannot be read."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._state = self._now()
        except OSError as error:
            raise SettingError(f"{path} cannot be read: {error.strerror}.") from None

    @cached_property
    def digest(self) -> bytes:
        """See `ModelFiles.digest`. Computed after loading, because the file's pages are in memory then."""
        return _digest(self._file, self._state[0])

    def changed(self) -> bool:
        """Whether the content may have changed.

        A rename or a new owner or mode changes only `st_ctime_ns`; then the digest decides.
        """
        try:
            now = self._now()
            if now == self._state:
                return False
            if now[:2] != self._state[:2] or _digest(self._file, now[0]) != self.digest:
                return True
        except OSError:  # a file on a network file system may have disappeared
            return True
        self._state = now
        return False

    def replaced(self) -> bool:
        """Whether the path now names another file, or none."""
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
