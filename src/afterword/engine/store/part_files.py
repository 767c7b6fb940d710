"""The files of a store of prefixes: one file for each part, in a folder that belongs to Afterword. All functions block.

The folder is private (0700, files 0600) and has a file `KEY_FILE` with 32 random bytes. The name of a part is a hash
with this key over fingerprint, namespace and tokens, so a name reveals none of them. A file begins with a checksum with
the same key over its name and content: a damaged file, or one that was renamed, is recognized when it is read.

A file is written under a temporary name, synchronized with the disk and renamed. A writer that is killed leaves a
temporary file, which is locked by nobody: the next scan deletes it. Several processes can use the same folder. A file
is deleted only if its name has the form of a part's name and it begins with `_MAGIC`, or if its name has the form of a
temporary name.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from afterword.errors import SettingError
from afterword.system.files import sync_path

KEY_FILE = "afterword-prefixes"
_KEY_MAGIC = b"Afterword prefixes 1\n"
_KEY_BYTES = 32
_MAGIC = b"AFTWPF1\n"
_DIGEST_BYTES = 32
_HEADER_BYTES = len(_MAGIC) + _DIGEST_BYTES
_PART = re.compile(r"[0-9a-f]{40}\.part")
_TEMPORARY = re.compile(rf"(?:[0-9a-f]{{40}}|{KEY_FILE})\.[0-9a-f]{{16}}\.tmp")
_OF_SYSTEM = frozenset({"lost+found"})  # exists if the folder is the root of a file system
_YOUNG_SECONDS = 2.0  # a temporary file of this age may be about to be locked by its writer

Pieces = tuple[bytes | bytearray, ...]


class Found(NamedTuple):
    """A part on the disk: its name, its size in bytes, and when it was last used, in nanoseconds of Unix time."""

    name: str
    size: int
    used: int


class DamagedPart(Exception):
    """A part's file is torn, damaged or not the one that its name says."""


class PartFolder:
    """The folder. Any thread may call the methods, which raise `OSError`. `open` raises `SettingError`."""

    def __init__(self, path: Path, key: bytes) -> None:
        self.path = path
        self.key = key

    @classmethod
    def open(cls, path: Path) -> PartFolder:
        """Open or create the folder. It must be new, empty or Afterword's."""
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            foreign = [name for name in os.listdir(path) if name not in _OF_SYSTEM and not _TEMPORARY.fullmatch(name)]
            if foreign and KEY_FILE not in foreign:
                raise SettingError(
                    f"--cache-dir {path} has files that Afterword did not create. Give a new or an empty folder."
                )
            path.chmod(0o700)
            if KEY_FILE not in foreign:
                _create_key(path)
            data = (path / KEY_FILE).read_bytes()
        except OSError as error:
            raise SettingError(f"--cache-dir {path} cannot be used: {error.strerror}.") from None
        if not data.startswith(_KEY_MAGIC) or len(data) != len(_KEY_MAGIC) + _KEY_BYTES:
            raise SettingError(f"--cache-dir {path}: the file {KEY_FILE} is damaged. Delete this folder's files.")
        return cls(path, data.removeprefix(_KEY_MAGIC))

    def read(self, name: str) -> memoryview:
        """The content of a part. Raises `DamagedPart`, and `FileNotFoundError` if there is none."""
        with open(self._path(name), "rb", buffering=0) as file:
            data = bytearray(os.fstat(file.fileno()).st_size)
            view, position = memoryview(data), 0
            while position < len(data) and (count := file.readinto(view[position:])):
                position += count
        content = view[_HEADER_BYTES:]
        if position < _HEADER_BYTES or view[:_HEADER_BYTES] != self._header(name, (content,)):
            raise DamagedPart
        return content

    def write(self, name: str, pieces: Pieces) -> int:
        """Write a part. Returns the bytes of its file. If this raises `OSError`, no file is left."""
        temporary = self.path / f"{name}.{secrets.token_hex(8)}.tmp"
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for piece in (self._header(name, pieces), *pieces):
                _write_all(handle, piece)
            os.fsync(handle)
            os.rename(temporary, self._path(name))
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        finally:
            os.close(handle)
        return _HEADER_BYTES + sum(map(len, pieces))

    def synchronize(self) -> None:
        """Make the names of written files durable."""
        sync_path(self.path)

    def mark_used(self, name: str, used: int) -> None:
        """Record when a part was used, in nanoseconds of Unix time."""
        with suppress(FileNotFoundError):  # another process has evicted it
            os.utime(self._path(name), ns=(used, used))

    def scan(self) -> tuple[list[Found], int]:
        """All parts, and the bytes of temporary files of running writers. Deletes the files of killed writers."""
        parts, temporary = [], 0
        with os.scandir(self.path) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    if _PART.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                        state = entry.stat(follow_symlinks=False)
                        parts.append(Found(entry.name.removesuffix(".part"), state.st_size, state.st_mtime_ns))
                    elif _TEMPORARY.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                        temporary += 0 if _delete_abandoned(entry) else entry.stat(follow_symlinks=False).st_size
        return parts, temporary

    def delete(self, name: str) -> bool:
        """Delete a part. Returns whether its file is gone; a file that Afterword did not write is left alone."""
        path = self._path(name)
        try:
            with open(path, "rb") as file:
                if file.read(len(_MAGIC)) != _MAGIC:
                    return False
            path.unlink()
        except FileNotFoundError:  # another process has deleted it
            pass
        return True

    def _path(self, name: str) -> Path:
        return self.path / f"{name}.part"

    def _header(self, name: str, pieces: tuple[bytes | bytearray | memoryview, ...]) -> bytes:
        digest = hashlib.blake2b(name.encode(), key=self.key, digest_size=_DIGEST_BYTES)
        for piece in pieces:
            digest.update(piece)
        return _MAGIC + digest.digest()


def _create_key(path: Path) -> None:
    """Create the file with the key, complete or not at all. Another process may do the same: one of them wins."""
    temporary = path / f"{KEY_FILE}.{secrets.token_hex(8)}.tmp"
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        _write_all(handle, _KEY_MAGIC + secrets.token_bytes(_KEY_BYTES))
        os.fsync(handle)
        with suppress(FileExistsError):
            os.link(temporary, path / KEY_FILE)
    finally:
        os.close(handle)
        os.unlink(temporary)


def _write_all(handle: int, data: bytes | bytearray | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def _delete_abandoned(entry: os.DirEntry[str]) -> bool:
    """Delete a temporary file that no process writes any more. Returns whether it was deleted."""
    if time.time() - entry.stat(follow_symlinks=False).st_mtime < _YOUNG_SECONDS:
        return False
    handle = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(entry.path)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True
