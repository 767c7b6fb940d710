"""What could be on a disk after each of a job's writes, from the log that `disk.c` keeps of them.

A file's contents are safe after its `fsync`, its name after its folder's: what is not can be lost when the power fails,
or in part be there.
"""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import NamedTuple

_HEAD = struct.Struct("<4q")


def build(folder: Path) -> Path:
    """The library, compiled."""
    library = folder / "disk.so"
    source = Path(__file__).with_name("disk.c")
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-w", "-o", library, source, "-ldl", "-lpthread"], check=True)
    return library


class Call(NamedTuple):
    """A call that has changed something: `o`pen (new), `w`rite, `s`ize, `f`sync, `r`ename, `u`nlink."""

    what: str
    path: str
    offset: int
    data: bytes


def read_calls(log: bytes) -> Iterator[Call]:
    place = 0
    while place < len(log):
        what, path, size, offset = _HEAD.unpack_from(log, place)
        place += _HEAD.size
        yield Call(chr(what), log[place : place + path].decode(), offset, log[place + path : place + path + size])
        place += path + size


@dataclass
class _File:
    """Contents as programs see them, as they are safe, and what lies between."""

    now: bytearray = field(default_factory=bytearray)
    safe: bytes = b""
    unsafe: list[Call] = field(default_factory=list)


Contents = dict[str, bytes]
"""A folder: contents by path."""


class Disk:
    """One folder's files, call by call."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._names: dict[str, _File] = {}
        self._safe_names: dict[str, _File] = {}

    def do(self, call: Call) -> None:
        if call.what == "f" and call.path == self._folder:
            self._safe_names = dict(self._names)
            return
        if call.what == "o":
            self._names[call.path] = _File()
        elif call.what == "r":
            self._names[call.data.decode()] = self._names.pop(call.path)
        elif call.what == "u":
            del self._names[call.path]
        else:
            file = self._names[call.path]
            if call.what == "f":
                file.safe, file.unsafe = bytes(file.now), []
            else:
                _apply(file.now, call)
                file.unsafe.append(call)

    def killed(self) -> Contents:
        """The files after the process ends at this point."""
        return {path: bytes(file.now) for path, file in self._names.items()}

    def powerless(self) -> Contents:
        """The files after a power failure at this point, if only safe contents and names survive."""
        return {path: file.safe for path, file in self._safe_names.items()}

    def renamed(self) -> Contents:
        """The same, but for names, which disks may keep sooner than contents."""
        return {path: file.safe for path, file in self._names.items()}

    def torn(self, random: Random) -> Contents:
        """The possible files after a power failure at this point: old or new names, and any part of unsafe contents."""
        contents = {}
        for path, file in random.choice((self._safe_names, self._names)).items():
            made = bytearray(file.safe)
            for call in file.unsafe:
                if random.random() < 0.5:
                    _apply(made, call)
            contents[path] = bytes(made)
        return contents


def _apply(contents: bytearray, call: Call) -> None:
    if call.what == "s":
        del contents[call.offset :]
        contents.extend(bytes(call.offset - len(contents)))
    else:
        contents.extend(bytes(max(0, call.offset - len(contents))))
        contents[call.offset : call.offset + len(call.data)] = call.data
