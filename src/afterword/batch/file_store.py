"""Uploaded files and the batches over them, in a folder of their own that is made with the first of them.

`shelf.db` says what there is, `files/` has contents by id, `journals/` what is done of batches under way. A file is
here when its line is in `shelf.db`, which is written after its contents. Before anything is written, its name is put on
a list in `shelf.db`; what is on the list without being a file is removed at the start, and nothing else ever is. A
folder that has other files in it is refused. One server at a time: the others are told so. Everything here may block,
and may be called from any thread.
"""

from __future__ import annotations

import logging
import secrets
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from afterword.batch.journal import partial_path, sync_folder
from afterword.batch.storage_quota import StorageQuota
from afterword.batch.store_folder import entries, open_database
from afterword.errors import ForeignFolder, RequestError, SettingError, StorageFailed

BatchStatus = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
FINAL_STATUSES = frozenset({"failed", "completed", "expired", "cancelled"})
SortOrder = Literal["asc", "desc"]
_Item = TypeVar("_Item", "StoredFile", "StoredBatch")

_log = logging.getLogger(__name__)
_encode = msgspec.json.encode


class StoredFile(msgspec.Struct, frozen=True):
    """A file without its contents. `key`: whose it is, by the key's id. Sizes in bytes, times in Unix seconds.

    From `expires` on it is gone, if that is not None.
    """

    id: str
    key: str
    name: str
    purpose: str
    size: int
    created: int
    expires: int | None = None


class BatchError(msgspec.Struct, frozen=True):
    """Why a batch has failed; `line` of its input, if it is that line's fault."""

    code: str
    message: str
    line: int | None = None


class StoredBatch(msgspec.Struct, frozen=True):
    """A batch. Times, by what happened then, are in Unix seconds; `input`, `output` and `errors` are files."""

    id: str
    key: str
    endpoint: str
    window: str
    input: str
    created: int
    expires: int
    metadata: dict[str, str] | None = None
    status: BatchStatus = "validating"
    times: dict[str, int] = {}
    wrong: tuple[BatchError, ...] = ()
    output: str | None = None
    errors: str | None = None
    rows: int = 0
    good: int = 0
    bad: int = 0
    prompt: int = 0
    completion: int = 0
    cached: int = 0

    def with_status(self, status: BatchStatus, now: float, **facts: Any) -> StoredBatch:
        """The same in another state, since now."""
        times = {**self.times, status: int(now)}
        return msgspec.structs.replace(self, status=status, times=times, **facts)


def new_id(kind: str) -> str:
    """A fresh name."""
    return kind + secrets.token_hex(16)


class FileStore:
    """The folder. Raises `StorageFailed` where it cannot be used or has no room."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self.folder = folder
        self.quota = StorageQuota()
        self._clock = clock
        self._lock = threading.RLock()
        self._db: sqlite3.Connection | None = None

    @property
    def exists(self) -> bool:
        """Whether there is anything."""
        return (self.folder / "shelf.db").exists()

    def check(self) -> None:
        """To be called at the start of a server. Raises `SettingError` if the folder has other files in it."""
        try:
            if self.folder.exists() and entries(self.folder):
                with self._use():
                    pass
        except (ForeignFolder, NotADirectoryError):
            raise SettingError(
                f"--batch-dir {self.folder}: this is no folder of Afterword's, and not an empty one. Give a new folder."
            ) from None
        except StorageFailed:
            pass  # who uploads is told

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

    def upload(self, name: str | None = None) -> Path:
        """A place for the contents of a file that is still to come, which has its id for a name."""
        name = name or new_id("file-")
        with self._use() as db:
            db.execute("INSERT OR IGNORE INTO unfinished VALUES (?)", (name,))
        return self.contents(name)

    # ---- files

    def add(self, file: StoredFile, most: int, taken: int = 0) -> None:
        """Take in a file whose contents are at the place that `upload` said.

        `taken`: bytes that its key has taken of its room for it. Raises `RequestError` if there is none for the rest.
        """
        if not self.quota.reserve(file.key, file.size - taken, most):
            raise quota_error(most)
        try:
            with self._use() as db:
                sync_folder(self.folder / "files")
                _insert(db, file)
                db.execute("DELETE FROM unfinished WHERE name = ?", (file.id,))
        except BaseException:
            self.quota.release(file.key, file.size - taken)
            raise

    def discard_upload(self, name: str) -> None:
        """Remove the contents of a file that is not to come after all."""
        with self._use() as db:
            unfinished = db.execute("SELECT count(*) FROM unfinished WHERE name = ?", (name,)).fetchone()[0]
        if unfinished:
            self._discard([name])

    def file(self, key: str, name: str) -> StoredFile:
        """One of a key's files. Raises `RequestError`."""
        with self._use() as db:
            return self._one(db, key, name, StoredFile)

    def files(
        self, key: str, after: str | None, most: int, order: SortOrder, purpose: str | None
    ) -> tuple[list[StoredFile], bool]:
        """Some of a key's files, and whether there are more."""
        with self._use() as db:
            found = self._some(db, key, after, order, StoredFile)
            wanted = [file for file in found if purpose in (None, file.purpose)]
        return wanted[:most], len(wanted) > most

    def remove(self, key: str, name: str) -> None:
        """Remove a file and its contents. Raises `RequestError` if there is none, or a batch still reads it."""
        with self._use() as db:
            file = self._one(db, key, name, StoredFile)
            if name in self._read(db):
                raise RequestError("A batch that has not ended reads this file.", code="file_in_use", status=409)
            _delete(db, file)
        self.quota.release(file.key, file.size)
        self._discard([name])

    def expire(self) -> None:
        """Remove the files whose time has come, but for those that a batch still reads."""
        with self._use() as db:
            late = db.execute("SELECT facts FROM files WHERE expires <= ?", (int(self._clock()),))
            read = self._read(db)
            files = [file for file in _decoded(late, StoredFile) if file.id not in read]
            for file in files:
                _delete(db, file)
        for file in files:
            self.quota.release(file.key, file.size)
        self._discard([file.id for file in files])

    def _discard(self, names: Sequence[str]) -> None:
        """Remove contents that are on the list of what is unfinished, and take them from the list."""
        with self._use() as db:
            self._unlink(db, names)

    def _unlink(self, db: sqlite3.Connection, names: Iterable[str]) -> None:
        for name in names:
            if Path(name).name == name and name.strip("."):
                for path in (self.contents(name), partial_path(self.contents(name))):
                    path.unlink(missing_ok=True)
            db.execute("DELETE FROM unfinished WHERE name = ?", (name,))

    # ---- batches

    def add_batch(self, batch: StoredBatch, most: int) -> None:
        """Take in a new batch. Raises `RequestError` if its key has more than so many."""
        with self._use() as db:
            file = self._one(db, batch.key, batch.input, StoredFile)
            if file.purpose != "batch":
                raise RequestError(
                    "The file of 'input_file_id' has another purpose than 'batch'.", param="input_file_id"
                )
            if sum(each.key == batch.key for each in self._unfinished(db)) >= most:
                message = f"You have {most} batches that have not ended. Wait for one of them, or cancel it."
                raise RequestError(message, code="too_many_batches")
            _insert(db, batch)

    def batch(self, key: str, name: str) -> StoredBatch:
        """One of a key's batches. Raises `RequestError`."""
        with self._use() as db:
            return self._one(db, key, name, StoredBatch)

    def batches(self, key: str, after: str | None, most: int) -> tuple[list[StoredBatch], bool]:
        """Some of a key's batches, the newest first, and whether there are more."""
        with self._use() as db:
            found = self._some(db, key, after, "desc", StoredBatch)
        return found[:most], len(found) > most

    def unfinished_batches(self) -> list[StoredBatch]:
        """Those of all keys that are not at an end, the oldest first."""
        with self._use() as db:
            return self._unfinished(db)

    def save_batch(self, batch: StoredBatch, files: Sequence[StoredFile] = ()) -> StoredBatch:
        """Write how a batch stands, and its new files, whose contents are there; all or nothing.

        Once it is to be cancelled, it does not go back.
        """
        with self._use() as db:
            known = self._one(db, batch.key, batch.id, StoredBatch)
            if known.status == "cancelling" and batch.status in ("in_progress", "validating"):
                batch = msgspec.structs.replace(batch, status=known.status, times=batch.times | known.times)
            before = (
                {each.id: each.size for each in self._some(db, batch.key, None, "asc", StoredFile)} if files else {}
            )
            for file in files:
                db.execute("DELETE FROM files WHERE id = ?", (file.id,))
                db.execute("DELETE FROM unfinished WHERE name = ?", (file.id,))
                _insert(db, file)
            facts = (batch.status in FINAL_STATUSES, _encode(batch), batch.id)
            db.execute("UPDATE batches SET ended = ?, facts = ? WHERE id = ?", facts)
        for file in files:
            self.quota.reserve(file.key, file.size - before.get(file.id, 0))
        return batch

    def _unfinished(self, db: sqlite3.Connection) -> list[StoredBatch]:
        return _decoded(db.execute("SELECT facts FROM batches WHERE NOT ended ORDER BY number"), StoredBatch)

    def _read(self, db: sqlite3.Connection) -> set[str]:
        """The files that batches still read."""
        return {batch.input for batch in self._unfinished(db)}

    # ---- rows of either

    def _one(self, db: sqlite3.Connection, key: str, name: str, kind: type[_Item]) -> _Item:
        rows = db.execute(f"SELECT facts FROM {_TABLES[kind]} WHERE key = ? AND id = ?", (key, name))
        found = [item for item in _decoded(rows, kind) if self._is_available(item)]
        if not found:
            raise RequestError(f"There is no {kind.__name__.lower()} of that ID.", code="not_found", status=404)
        return found[0]

    def _some(
        self, db: sqlite3.Connection, key: str, after: str | None, order: SortOrder, kind: type[_Item]
    ) -> list[_Item]:
        """Those of a key that come after one, all of them: a key has thousands at most."""
        table, than = _TABLES[kind], "<" if order == "desc" else ">"
        beyond, values = "", [key]
        if after is not None:
            self._one(db, key, after, kind)
            beyond, values = f"AND number {than} (SELECT number FROM {table} WHERE id = ?)", [key, after]
        rows = db.execute(f"SELECT facts FROM {table} WHERE key = ? {beyond} ORDER BY number {order}", values)
        return [item for item in _decoded(rows, kind) if self._is_available(item)]

    def _is_available(self, item: StoredFile | StoredBatch) -> bool:
        """Files whose time has come are gone, whenever they are removed."""
        return not isinstance(item, StoredFile) or item.expires is None or self._clock() < item.expires

    # ---- the folder

    @contextmanager
    def _use(self) -> Iterator[sqlite3.Connection]:
        """The open folder, and one transaction."""
        with self._lock:
            try:
                if self._db is None:
                    self._db = open_database(self.folder, self._remove_leftovers)
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

    def _remove_leftovers(self, db: sqlite3.Connection) -> None:
        """Remove what was under way: uploads and outputs that are on the list, and journals of batches that ended."""
        self._unlink(db, [name for (name,) in db.execute("SELECT name FROM unfinished").fetchall()])
        ended = {name for (name,) in db.execute("SELECT id FROM batches WHERE ended")}
        for path in (self.folder / "journals").iterdir():
            if path.name.removesuffix("-journal") in ended:
                path.unlink()
        kept: Counter[str] = Counter()
        for file in _decoded(db.execute("SELECT facts FROM files"), StoredFile):
            kept[file.key] += file.size
        self.quota.reset(kept)


_TABLES: dict[type[Any], str] = {StoredFile: "files", StoredBatch: "batches"}


def _insert(db: sqlite3.Connection, item: StoredFile | StoredBatch) -> None:
    columns, last = ("expires", item.expires) if isinstance(item, StoredFile) else ("ended", 0)
    values = (item.id, item.key, _encode(item), last)
    db.execute(f"INSERT INTO {_TABLES[type(item)]} (id, key, facts, {columns}) VALUES (?, ?, ?, ?)", values)


def _delete(db: sqlite3.Connection, file: StoredFile) -> None:
    """A file is no more; its contents are to be removed."""
    db.execute("DELETE FROM files WHERE id = ?", (file.id,))
    db.execute("INSERT OR IGNORE INTO unfinished VALUES (?)", (file.id,))


def _decoded(rows: Iterable[tuple[Any]], kind: type[_Item]) -> list[_Item]:
    """Rows as what they are. One that is not as expected is left out: it must not keep the others from being used."""
    items = []
    for (facts,) in rows:
        try:
            items.append(msgspec.json.decode(facts, type=kind))
        except (msgspec.MsgspecError, UnicodeDecodeError, TypeError):
            _log.warning("A %s in the storage for files is not as expected and is left out.", kind.__name__.lower())
    return items


def quota_error(most: int) -> RequestError:
    """The error for a key whose files take all of its room."""
    message = f"Your files would be more than {most} bytes together. Delete some that you need no more."
    return RequestError(message, code="storage_limit_reached")


def _failed(error: Exception) -> StorageFailed:
    if isinstance(error, sqlite3.Error) and error.sqlite_errorname == "SQLITE_BUSY":
        return StorageFailed(
            "Another server uses this server's storage for files. Each needs a --batch-dir of its own."
        )
    return StorageFailed("The server's storage for files is full or cannot be used.")
