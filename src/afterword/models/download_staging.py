"""A download comes into the cache whole and as it was listed, or not at all, whoever else downloads the same.

Each process downloads into a folder of its own beside the cache's, where nobody looks for models; file locks, which
some shared disks only pretend to have, are not relied on. What a process that has died left there is taken up again.
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


@dataclass(frozen=True, slots=True)
class ListedFile:
    """What the Hub says of a file. A mirror may list no size, 0 here; only large files have a SHA-256."""

    size: int
    sha256: str | None = None


@contextlib.contextmanager
def staging_folder(cache: Path, repository: str) -> Iterator[Path]:
    """A folder to download into. What is in it at the end is moved to the cache; after an error it stays, to go on."""
    cache.mkdir(parents=True, exist_ok=True)
    folder = _folder(cache, repository)
    yield folder
    _move_in(folder, cache)
    shutil.rmtree(folder, ignore_errors=True)


def find_difference(path: Path, listed: ListedFile) -> str | None:
    """How a file is not the one that was listed, in words; None if it is."""
    found = path.stat().st_size
    if listed.size not in (found, 0):
        return f"came with {found} bytes where the Hub lists {listed.size}"
    if listed.sha256 is not None:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != listed.sha256:
                return "came with other content than the Hub lists"
    return None


def partial_bytes(cache: Path, repository: str) -> int:
    """Bytes that are here already of downloads that were broken off, and will be taken up."""
    total = 0
    for left in _free(cache, repository):
        for folder, _, names in os.walk(left):  # of what another process takes up meanwhile nothing is found
            for part in fnmatch.filter(names, "*.part"):
                with contextlib.suppress(OSError):
                    total += Path(folder, part).stat().st_size
    return total


def _folder(cache: Path, repository: str) -> Path:
    """A new one, or one that nobody uses any more: renaming it decides between several who want it."""
    mine = cache / f"{_begin(repository)}{os.getpid()}"
    for left in _free(cache, repository):
        with contextlib.suppress(OSError):
            return left.rename(mine)
    mine.mkdir(exist_ok=True)
    return mine


def _begin(repository: str) -> str:
    """Of the names of this machine's folders."""
    return f".pull--{repository.replace('/', '--')}--{socket.gethostname()}--"


def _free(cache: Path, repository: str) -> Iterator[Path]:
    """Folders that no other process uses."""
    begin = _begin(repository)
    for left in cache.glob(f"{begin}*"):
        process = left.name.removeprefix(begin)
        if process.isdigit() and (int(process) == os.getpid() or not psutil.pid_exists(int(process))):
            yield left


def _move_in(folder: Path, cache: Path) -> None:
    """Contents first, then what points to them, so that there is no moment at which a model is there in part."""
    order = {"blobs": 0, "snapshots": 1, "refs": 2}
    files = [path for path in folder.glob("models--*/*/**/*") if path.is_symlink() or path.is_file()]
    for path in sorted(files, key=lambda path: (order.get(path.relative_to(folder).parts[1], 3), path)):
        if not path.is_symlink():
            _flush(path)
        target = cache / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)


def _flush(path: Path) -> None:
    """Have a file on the disk before it has its name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
