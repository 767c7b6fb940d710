"""The states in which a disk can be after each write of a batch, computed from the log that `disk.c` writes.

A file's contents are durable after its `fsync`, its name after the `fsync` of its folder. All other data can be lost,
or be present in part, after a power failure.
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
    """Compile `disk.c` and return the path of the library."""
    library = folder / "disk.so"
    source = Path(__file__).with_name("disk.c")
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-w", "-o", library, source, "-ldl", "-lpthread"], check=True)
    return library


class Call(NamedTuple):
    """A call that changed a file: `o`pen (new), `w`rite, `s`ize, `f`sync, `r`ename, `u`nlink."""

    what: str
    path: str
    offset: int
    data: bytes


def read_calls(log: bytes) -> Iterator[Call]:
    position = 0
    while position < len(log):
        what, path, size, offset = _HEAD.unpack_from(log, position)
        position += _HEAD.size
        yield Call(
            chr(what), log[position : position + path].decode(), offset, log[position + path : position + path + size]
        )
        position += path + size


@dataclass
class _File:
    """The contents that programs read, the durable contents, and the writes that are not durable yet."""

    now: bytearray = field(default_factory=bytearray)
    safe: bytes = b""
    unsafe: list[Call] = field(default_factory=list)


Contents = dict[str, bytes]
"""The files of a folder: contents by path."""


class Disk:
    """The files of one folder. `do` applies one logged call."""

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
        """The files after a power failure at this point, if only durable contents and names survive."""
        return {path: file.safe for path, file in self._safe_names.items()}

    def renamed(self) -> Contents:
        """The same with all current names, because a disk can store names before contents."""
        return {path: file.safe for path, file in self._names.items()}

    def torn(self, random: Random) -> Contents:
        """Possible files after a power failure: old or new names, and a random part of the unsafe contents."""
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
