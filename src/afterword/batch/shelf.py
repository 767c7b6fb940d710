"""Uploaded files and the batches over them, in a folder of their own that is made with the first of them.

`shelf.db` says what there is, `files/` has contents by id, `journals/` what is done of batches under way. A file is
here when its line is in `shelf.db`, which is written after its contents; what has no line is thrown away at the start.
One server at a time: the others are told so. Everything here may block, and may be called from any thread.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from afterword.batch.journal import sync_folder
from afterword.errors import RequestError, StorageFailed

Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
ENDED = frozenset({"failed", "completed", "expired", "cancelled"})
Order = Literal["asc", "desc"]
_Item = TypeVar("_Item", "File", "Batch")

_VERSION = 1
_SCHEMA = """
CREATE TABLE files (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, key TEXT NOT NULL, facts BLOB NOT NULL);
CREATE TABLE batches (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, key TEXT NOT NULL, ended INTEGER NOT NULL, facts BLOB NOT NULL
);
CREATE INDEX files_of ON files (key, number);
CREATE INDEX batches_of ON batches (key, number);
"""
_encode = msgspec.json.encode


class File(msgspec.Struct, frozen=True):
    """A file without its contents. `key`: whose it is, by the key's id. Sizes in bytes, times in Unix seconds."""

    id: str
    key: str
    name: str
    purpose: str
    size: int
    created: int


class Wrong(msgspec.Struct, frozen=True):
    """Why a batch has failed; `line` of its input, if it is that line's fault."""

    code: str
    message: str
    line: int | None = None


class Batch(msgspec.Struct, frozen=True):
    """A batch. Times, by what happened then, are in Unix seconds; `input`, `output` and `errors` are files."""

    id: str
    key: str
    endpoint: str
    window: str
    input: str
    created: int
    expires: int
    metadata: dict[str, str] | None = None
    status: Status = "validating"
    times: dict[str, int] = {}
    wrong: tuple[Wrong, ...] = ()
    output: str | None = None
    errors: str | None = None
    rows: int = 0
    good: int = 0
    bad: int = 0
    prompt: int = 0
    completion: int = 0
    cached: int = 0

    def at(self, status: Status, now: float, **facts: Any) -> Batch:
        """The same in another state, since now."""
        times = {**self.times, status: int(now)}
        return msgspec.structs.replace(self, status=status, times=times, **facts)


def new_id(kind: str) -> str:
    """A fresh name."""
    return kind + secrets.token_hex(16)


class Shelf:
    """The folder. Raises `StorageFailed` where it cannot be used or has no room."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.RLock()
        self._db: sqlite3.Connection | None = None

    @property
    def exists(self) -> bool:
        """Whether there is anything."""
        return (self.folder / "shelf.db").exists()

    def close(self) -> None:
        """Let go of it."""
        with self._lock:
            if self._db is not None:
                self._db.close()
                self._db = None

    # ---- places

    def contents(self, file: str) -> Path:
        """Where a file's contents are."""
        return self.folder / "files" / file

    def journal(self, batch: str) -> Path:
        """Where what is done of a batch is."""
        return self.folder / "journals" / batch

    def upload(self) -> Path:
        """A place for contents that are still to come; nobody else has it."""
        with self._use():
            return self.folder / "files" / new_id(".upload-")

    # ---- files

    def add(self, file: File, place: Path, most: int) -> None:
        """Take in a file whose contents are at a place. Raises `RequestError` if its key then has too many bytes."""
        with self._use() as db:
            if self._stored(db, file.key) + file.size > most:
                raise RequestError(
                    f"Your files would be more than {most} bytes together. Delete some that you need no more.",
                    code="storage_limit_reached",
                )
            os.replace(place, self.contents(file.id))
            sync_folder(self.folder / "files")
            _insert(db, file)

    def file(self, key: str, name: str) -> File:
        """One of a key's files. Raises `RequestError`."""
        with self._use() as db:
            return self._one(db, key, name, File)

    def files(
        self, key: str, after: str | None, most: int, order: Order, purpose: str | None
    ) -> tuple[list[File], bool]:
        """Some of a key's files, and whether there are more."""
        with self._use() as db:
            found = self._some(db, key, after, order, File)
            wanted = [file for file in found if purpose in (None, file.purpose)]
        return wanted[:most], len(wanted) > most

    def remove(self, key: str, name: str) -> None:
        """Remove a file and its contents. Raises `RequestError` if there is none, or a batch still reads it."""
        with self._use() as db:
            self._one(db, key, name, File)
            if any(batch.input == name for batch in self._unended(db)):
                raise RequestError("A batch that has not ended reads this file.", code="file_in_use", status=409)
            db.execute("DELETE FROM files WHERE id = ?", (name,))
            with suppress(FileNotFoundError):
                self.contents(name).unlink()

    def _stored(self, db: sqlite3.Connection, key: str) -> int:
        rows = db.execute("SELECT facts FROM files WHERE key = ?", (key,))
        return sum(msgspec.json.decode(facts, type=File).size for (facts,) in rows)

    # ---- batches

    def begin(self, batch: Batch, most: int) -> None:
        """Take in a new batch. Raises `RequestError` if its key has more than so many."""
        with self._use() as db:
            file = self._one(db, batch.key, batch.input, File)
            if file.purpose != "batch":
                raise RequestError(
                    "The file of 'input_file_id' has another purpose than 'batch'.", param="input_file_id"
                )
            if sum(each.key == batch.key for each in self._unended(db)) >= most:
                message = f"You have {most} batches that have not ended. Wait for one of them, or cancel it."
                raise RequestError(message, code="too_many_batches")
            _insert(db, batch)

    def batch(self, key: str, name: str) -> Batch:
        """One of a key's batches. Raises `RequestError`."""
        with self._use() as db:
            return self._one(db, key, name, Batch)

    def batches(self, key: str, after: str | None, most: int) -> tuple[list[Batch], bool]:
        """Some of a key's batches, the newest first, and whether there are more."""
        with self._use() as db:
            found = self._some(db, key, after, "desc", Batch)
        return found[:most], len(found) > most

    def unended(self) -> list[Batch]:
        """Those of all keys that are not at an end, the oldest first."""
        with self._use() as db:
            return self._unended(db)

    def put(self, batch: Batch, files: Sequence[File] = ()) -> Batch:
        """Write how a batch stands, and its new files, whose contents are there; all or nothing.

        Once it is to be cancelled, it does not go back.
        """
        with self._use() as db:
            known = self._one(db, batch.key, batch.id, Batch)
            if known.status == "cancelling" and batch.status in ("in_progress", "validating"):
                batch = msgspec.structs.replace(batch, status=known.status, times=batch.times | known.times)
            for file in files:
                db.execute("DELETE FROM files WHERE id = ?", (file.id,))
                _insert(db, file)
            facts = (batch.status in ENDED, _encode(batch), batch.id)
            db.execute("UPDATE batches SET ended = ?, facts = ? WHERE id = ?", facts)
            return batch

    def _unended(self, db: sqlite3.Connection) -> list[Batch]:
        rows = db.execute("SELECT facts FROM batches WHERE NOT ended ORDER BY number")
        return [msgspec.json.decode(facts, type=Batch) for (facts,) in rows]

    # ---- rows of either

    def _one(self, db: sqlite3.Connection, key: str, name: str, kind: type[_Item]) -> _Item:
        found = db.execute(f"SELECT facts FROM {_TABLES[kind]} WHERE key = ? AND id = ?", (key, name)).fetchone()
        if found is None:
            raise RequestError(f"There is no {kind.__name__.lower()} of that ID.", code="not_found", status=404)
        return msgspec.json.decode(found[0], type=kind)

    def _some(
        self, db: sqlite3.Connection, key: str, after: str | None, order: Order, kind: type[_Item]
    ) -> list[_Item]:
        """Those of a key that come after one, all of them: a key has thousands at most."""
        table, than = _TABLES[kind], "<" if order == "desc" else ">"
        beyond, values = "", [key]
        if after is not None:
            self._one(db, key, after, kind)
            beyond, values = f"AND number {than} (SELECT number FROM {table} WHERE id = ?)", [key, after]
        rows = db.execute(f"SELECT facts FROM {table} WHERE key = ? {beyond} ORDER BY number {order}", values)
        return [msgspec.json.decode(facts, type=kind) for (facts,) in rows]

    # ---- the folder

    @contextmanager
    def _use(self) -> Iterator[sqlite3.Connection]:
        """The open folder, and one transaction."""
        with self._lock:
            try:
                if self._db is None:
                    self._db = self._open()
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield self._db
                    self._db.execute("COMMIT")
                except BaseException:
                    with suppress(sqlite3.Error):
                        self._db.execute("ROLLBACK")
                    raise
            except (sqlite3.Error, OSError) as error:
                raise _failed(error) from error

    def _open(self) -> sqlite3.Connection:
        for folder in (self.folder, self.folder / "files", self.folder / "journals"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        db = sqlite3.connect(self.folder / "shelf.db", timeout=0.2, isolation_level=None, check_same_thread=False)
        try:
            db.execute("PRAGMA locking_mode = EXCLUSIVE")
            db.execute("BEGIN EXCLUSIVE")
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if not version:
                for statement in _SCHEMA.split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {_VERSION}")
            elif version != _VERSION:
                raise StorageFailed("The server's storage for files is of another version.")
            self._sweep(db)
            db.execute("COMMIT")
        except BaseException:
            db.close()
            raise
        return db

    def _sweep(self, db: sqlite3.Connection) -> None:
        """Throw away what nobody knows: uploads and outputs that were under way."""
        known = {name for (name,) in db.execute("SELECT id FROM files UNION SELECT id FROM batches WHERE NOT ended")}
        for folder in ("files", "journals"):
            for path in (self.folder / folder).iterdir():
                if path.name.removesuffix("-journal") not in known:
                    path.unlink()


_TABLES: dict[type[Any], str] = {File: "files", Batch: "batches"}


def _insert(db: sqlite3.Connection, item: File | Batch) -> None:
    columns, marks = (
        ("id, key, facts", "?, ?, ?") if isinstance(item, File) else ("id, key, ended, facts", "?, ?, 0, ?")
    )
    db.execute(f"INSERT INTO {_TABLES[type(item)]} ({columns}) VALUES ({marks})", (item.id, item.key, _encode(item)))


def _failed(error: Exception) -> StorageFailed:
    if isinstance(error, sqlite3.Error) and error.sqlite_errorname == "SQLITE_BUSY":
        return StorageFailed(
            "Another server uses this server's storage for files. Each needs a --batch-dir of its own."
        )
    return StorageFailed("The server's storage for files is full or cannot be used.")
