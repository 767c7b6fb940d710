"""Moves a download into the Hub's cache only when it is complete and verified, also if other processes download it.

Each process downloads into its own staging folder in the cache folder, where no program searches for models. A later
process continues the downloads that a dead process left there. The module does not use file locks, because some network
file systems do not implement them.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from afterword.system.files import sync_path


@dataclass(frozen=True, slots=True)
class ListedFile:
    """The size in bytes and the SHA-256 that the Hub lists for a file.

    `size` is 0 if a mirror lists none. Only large files have a SHA-256.
    """

    size: int
    sha256: str | None = None


@contextlib.contextmanager
def staging_folder(cache: Path, repository: str) -> Iterator[Path]:
    """A folder to download into. On success its files are moved into the cache; after an exception they stay."""
    cache.mkdir(parents=True, exist_ok=True)
    folder = _folder(cache, repository)
    yield folder
    _move_in(folder, cache)
    shutil.rmtree(folder, ignore_errors=True)


def find_difference(path: Path, listed: ListedFile) -> str | None:
    """How a file differs from the listed one, as the predicate of a sentence; None if it does not."""
    found = path.stat().st_size
    if listed.size not in (found, 0):
        return f"has {found} bytes, but the Hub lists {listed.size}"
    if listed.sha256 is not None:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != listed.sha256:
                return "has another SHA-256 than the Hub lists"
    return None


def partial_bytes(cache: Path, repository: str) -> int:
    """Bytes of interrupted downloads of a repository, which the next download will continue."""
    total = 0
    for unused in _unused_folders(cache, repository):
        for folder, _, names in os.walk(unused):  # finds nothing if another process has renamed the folder
            for part in fnmatch.filter(names, "*.part"):
                with contextlib.suppress(OSError):
                    total += Path(folder, part).stat().st_size
    return total


def _folder(cache: Path, repository: str) -> Path:
    """An unused staging folder, or a new one. Renaming is atomic: if processes compete, only one gets the folder."""
    own = cache / f"{_prefix(repository)}{os.getpid()}"
    for unused in _unused_folders(cache, repository):
        with contextlib.suppress(OSError):
            return unused.rename(own)
    own.mkdir(exist_ok=True)
    return own


def _prefix(repository: str) -> str:
    """The common prefix of the names of this machine's staging folders; the process id follows."""
    return f".pull--{repository.replace('/', '--')}--{socket.gethostname()}--"


def _unused_folders(cache: Path, repository: str) -> Iterator[Path]:
    """This machine's staging folders that no other live process owns."""
    prefix = _prefix(repository)
    for folder in cache.glob(f"{prefix}*"):
        process = folder.name.removeprefix(prefix)
        if process.isdigit() and (int(process) == os.getpid() or not psutil.pid_exists(int(process))):
            yield folder


def _move_in(folder: Path, cache: Path) -> None:
    """Move contents first, then links to them, then references, so that the cache never shows an incomplete model."""
    order = {"blobs": 0, "snapshots": 1, "refs": 2}
    files = [path for path in folder.glob("models--*/*/**/*") if path.is_symlink() or path.is_file()]
    for path in sorted(files, key=lambda path: (order.get(path.relative_to(folder).parts[1], 3), path)):
        if not path.is_symlink():
            sync_path(path)  # its content, before it gets its final name
        target = cache / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
