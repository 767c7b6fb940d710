"""The file store: uploaded files and batches, in one folder that is created with the first upload.

- `files.db` is the database, `shelf.db` in folders made before 2026-11-29: tables `files`, `batches` and `unfinished`.
- `files/` has the contents of files, named by id. The row in `files` is written after the contents.
- `journals/` has the journals of unfinished batches.

Before contents are written, their name goes into `unfinished`. At the start, contents whose name is in `unfinished` are
deleted; no other contents are. The first use opens and locks the database; a second server gets `StorageFailed`. A
folder with other files is refused. All methods may block. They may be called from any thread.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from afterword.batch.journal import partial_path
from afterword.batch.storage_quota import StorageQuota
from afterword.batch.store_folder import database_path, entries, open_database
from afterword.batch.stored_items import FINAL_STATUSES, StoredBatch, StoredFile, new_id
from afterword.errors import ForeignFolder, RequestError, SettingError, StorageFailed
from afterword.system.files import sync_path

SortOrder = Literal["asc", "desc"]
_Item = TypeVar("_Item", StoredFile, StoredBatch)

_log = logging.getLogger(__name__)
_to_json = msgspec.json.encode


class FileStore:
    """The files and batches in a folder, by key. `clock` returns Unix seconds.

    All methods raise `StorageFailed` if the folder cannot be used or its disk is full.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self.folder = folder
        self.quota = StorageQuota()
        self._clock = clock
        self._lock = threading.RLock()
        self._db: sqlite3.Connection | None = None

    @property
    def exists(self) -> bool:
        """Whether the database exists."""
        return database_path(self.folder).exists()

    def check(self) -> None:
        """Check the folder at the start of a server. Raises `SettingError` if it has files that are not Afterword's."""
        try:
            if self.folder.exists() and entries(self.folder):
                with self._use():
                    pass
        except (ForeignFolder, NotADirectoryError):
            raise SettingError(
                f"--batch-dir {self.folder} has files that Afterword did not create. Give a new or an empty folder."
            ) from None
        except StorageFailed:
            pass  # uploads get the error

    def close(self) -> None:
        """Close the database. The next use opens it again."""
        with self._lock:
            if self._db is not None:
                self._db.close()
                self._db = None

    # ---- paths

    def contents(self, file: str) -> Path:
        """Return the path of a file's contents."""
        return self.folder / "files" / file

    def journal(self, batch: str) -> Path:
        """Return the path of a batch's journal."""
        return self.folder / "journals" / batch

    def upload(self, name: str | None = None) -> Path:
        """Return the path for the contents of a new file. Its last part is the file's id; `name` sets it."""
        name = name or new_id("file-")
        with self._use() as db:
            db.execute("INSERT OR IGNORE INTO unfinished VALUES (?)", (name,))
        return self.contents(name)

    # ---- files

    def add(self, file: StoredFile, limit: int, reserved: int = 0) -> None:
        """Add a file whose contents are at the path that `upload` returned.

        `limit`: bytes of all files of the key. `reserved`: bytes that the caller has already reserved for this file.
        Raises `RequestError` if the file exceeds the limit.
        """
        if not self.quota.reserve(file.key, file.size - reserved, limit):
            raise quota_error(limit)
        try:
            with self._use() as db:
                sync_path(self.folder / "files")
                _insert(db, file)
                db.execute("DELETE FROM unfinished WHERE name = ?", (file.id,))
        except BaseException:
            self.quota.release(file.key, file.size - reserved)
            raise

    def discard_upload(self, name: str) -> None:
        """Delete the contents of an upload that was given up. Contents of a file that was added are kept."""
        with self._use() as db:
            unfinished = db.execute("SELECT count(*) FROM unfinished WHERE name = ?", (name,)).fetchone()[0]
        if unfinished:
            self._discard([name])

    def file(self, key: str, name: str) -> StoredFile:
        """Return one of a key's files. Raises `RequestError` if it does not exist."""
        with self._use() as db:
            return self._get_item(db, key, name, StoredFile)

    def files(
        self, key: str, after: str | None, limit: int, order: SortOrder, purpose: str | None
    ) -> tuple[list[StoredFile], bool]:
        """Return at most `limit` of a key's files that come after the file `after`, and whether there are more."""
        with self._use() as db:
            found = self._list_items(db, key, after, order, StoredFile)
            wanted = [file for file in found if purpose in (None, file.purpose)]
        return wanted[:limit], len(wanted) > limit

    def remove(self, key: str, name: str) -> None:
        """Delete a file. Raises `RequestError` if it does not exist, or an unfinished batch reads it."""
        with self._use() as db:
            file = self._get_item(db, key, name, StoredFile)
            if name in self._inputs_in_use(db):
                raise RequestError("An unfinished batch reads this file.", code="file_in_use", status=409)
            _delete(db, file)
        self.quota.release(file.key, file.size)
        self._discard([name])

    def expire(self) -> None:
        """Delete expired files, except those that an unfinished batch reads."""
        with self._use() as db:
            expired = db.execute("SELECT facts FROM files WHERE expires <= ?", (int(self._clock()),))
            in_use = self._inputs_in_use(db)
            files = [file for file in _decode_rows(expired, StoredFile) if file.id not in in_use]
            for file in files:
                _delete(db, file)
        for file in files:
            self.quota.release(file.key, file.size)
        self._discard([file.id for file in files])

    def _discard(self, names: Sequence[str]) -> None:
        """Delete contents whose names are in `unfinished`, and remove the names."""
        with self._use() as db:
            self._unlink(db, names)

    def _unlink(self, db: sqlite3.Connection, names: Iterable[str]) -> None:
        for name in names:
            if Path(name).name == name and name.strip("."):
                for path in (self.contents(name), partial_path(self.contents(name))):
                    path.unlink(missing_ok=True)
            db.execute("DELETE FROM unfinished WHERE name = ?", (name,))

    # ---- batches

    def add_batch(self, batch: StoredBatch, limit: int) -> None:
        """Add a new batch.

        Raises `RequestError` if its file does not exist or has another purpose, or if the key already has `limit`
        unfinished batches.
        """
        with self._use() as db:
            file = self._get_item(db, batch.key, batch.input_file, StoredFile)
            if file.purpose != "batch":
                raise RequestError("The file of 'input_file_id' must have the purpose 'batch'.", param="input_file_id")
            if sum(each.key == batch.key for each in self._unfinished(db)) >= limit:
                message = f"You have {limit} unfinished batches. Wait until one of them ends, or cancel one."
                raise RequestError(message, code="too_many_batches")
            _insert(db, batch)

    def batch(self, key: str, name: str) -> StoredBatch:
        """Return one of a key's batches. Raises `RequestError` if it does not exist."""
        with self._use() as db:
            return self._get_item(db, key, name, StoredBatch)

    def batches(self, key: str, after: str | None, limit: int) -> tuple[list[StoredBatch], bool]:
        """Return at most `limit` of a key's batches older than `after`, newest first, and whether there are more."""
        with self._use() as db:
            found = self._list_items(db, key, after, "desc", StoredBatch)
        return found[:limit], len(found) > limit

    def unfinished_batches(self) -> list[StoredBatch]:
        """Return the unfinished batches of all keys, oldest first."""
        with self._use() as db:
            return self._unfinished(db)

    def save_batch(self, batch: StoredBatch, files: Sequence[StoredFile] = ()) -> StoredBatch:
        """Write a batch and its output files in one transaction. The contents of the files must be written already.

        Returns the batch as it was written: a batch with the status `cancelling` does not return to an earlier status.
        """
        with self._use() as db:
            known = self._get_item(db, batch.key, batch.id, StoredBatch)
            if known.status == "cancelling" and batch.status in ("in_progress", "validating"):
                batch = msgspec.structs.replace(batch, status=known.status, times=batch.times | known.times)
            before = (
                {each.id: each.size for each in self._list_items(db, batch.key, None, "asc", StoredFile)}
                if files
                else {}
            )
            for file in files:
                db.execute("DELETE FROM files WHERE id = ?", (file.id,))
                db.execute("DELETE FROM unfinished WHERE name = ?", (file.id,))
                _insert(db, file)
            facts = (batch.status in FINAL_STATUSES, _to_json(batch), batch.id)
            db.execute("UPDATE batches SET ended = ?, facts = ? WHERE id = ?", facts)
        for file in files:
            self.quota.reserve(file.key, file.size - before.get(file.id, 0))
        return batch

    def _unfinished(self, db: sqlite3.Connection) -> list[StoredBatch]:
        return _decode_rows(db.execute("SELECT facts FROM batches WHERE NOT ended ORDER BY number"), StoredBatch)

    def _inputs_in_use(self, db: sqlite3.Connection) -> set[str]:
        """Return the ids of the files that unfinished batches read."""
        return {batch.input_file for batch in self._unfinished(db)}

    # ---- files and batches alike

    def _get_item(self, db: sqlite3.Connection, key: str, name: str, kind: type[_Item]) -> _Item:
        rows = db.execute(f"SELECT facts FROM {_TABLES[kind]} WHERE key = ? AND id = ?", (key, name))
        found = [item for item in _decode_rows(rows, kind) if self._is_available(item)]
        if not found:
            raise RequestError(f"There is no {_NOUNS[kind]} of that ID.", code="not_found", status=404)
        return found[0]

    def _list_items(
        self, db: sqlite3.Connection, key: str, after: str | None, order: SortOrder, kind: type[_Item]
    ) -> list[_Item]:
        """Return all items of a key that come after the item `after`. A key has thousands at most."""
        table, comparison = _TABLES[kind], "<" if order == "desc" else ">"
        condition, values = "", [key]
        if after is not None:
            self._get_item(db, key, after, kind)
            condition, values = f"AND number {comparison} (SELECT number FROM {table} WHERE id = ?)", [key, after]
        rows = db.execute(f"SELECT facts FROM {table} WHERE key = ? {condition} ORDER BY number {order}", values)
        return [item for item in _decode_rows(rows, kind) if self._is_available(item)]

    def _is_available(self, item: StoredFile | StoredBatch) -> bool:
        """Whether clients can see the item. Expired files are hidden even before `expire` deletes them."""
        return not isinstance(item, StoredFile) or item.expires is None or self._clock() < item.expires

    # ---- the folder

    @contextmanager
    def _use(self) -> Iterator[sqlite3.Connection]:
        """Open the database if necessary, and run the block in one transaction under the lock."""
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
                raise _storage_error(error) from error

    def _remove_leftovers(self, db: sqlite3.Connection) -> None:
        """Delete what a previous server left: unfinished uploads and outputs, and journals of batches that ended.

        Counts the stored bytes of each key.
        """
        self._unlink(db, [name for (name,) in db.execute("SELECT name FROM unfinished").fetchall()])
        ended = {name for (name,) in db.execute("SELECT id FROM batches WHERE ended")}
        for path in (self.folder / "journals").iterdir():
            if path.name.removesuffix("-journal") in ended:
                path.unlink()
        stored: Counter[str] = Counter()
        for file in _decode_rows(db.execute("SELECT facts FROM files"), StoredFile):
            stored[file.key] += file.size
        self.quota.reset(stored)


_TABLES: dict[type[Any], str] = {StoredFile: "files", StoredBatch: "batches"}
_NOUNS: dict[type[Any], str] = {StoredFile: "file", StoredBatch: "batch"}


def _insert(db: sqlite3.Connection, item: StoredFile | StoredBatch) -> None:
    columns, last = ("expires", item.expires) if isinstance(item, StoredFile) else ("ended", 0)
    values = (item.id, item.key, _to_json(item), last)
    db.execute(f"INSERT INTO {_TABLES[type(item)]} (id, key, facts, {columns}) VALUES (?, ?, ?, ?)", values)


def _delete(db: sqlite3.Connection, file: StoredFile) -> None:
    """Remove a file's row, and note its contents for deletion."""
    db.execute("DELETE FROM files WHERE id = ?", (file.id,))
    db.execute("INSERT OR IGNORE INTO unfinished VALUES (?)", (file.id,))


def _decode_rows(rows: Iterable[tuple[Any]], kind: type[_Item]) -> list[_Item]:
    """Decode rows. A row that cannot be decoded is logged and left out, so that the others stay usable."""
    items = []
    for (facts,) in rows:
        try:
            items.append(msgspec.json.decode(facts, type=kind))
        except (msgspec.MsgspecError, UnicodeDecodeError, TypeError):
            _log.warning("A %s in the file store cannot be decoded and is ignored.", _NOUNS[kind])
    return items


def quota_error(limit: int) -> RequestError:
    """Make the error for a key with files above its storage limit of `limit` bytes."""
    message = f"Your files would exceed the storage limit of {limit} bytes. Delete files that you do not need."
    return RequestError(message, code="storage_limit_reached")


def _storage_error(error: Exception) -> StorageFailed:
    if isinstance(error, sqlite3.Error) and error.sqlite_errorname == "SQLITE_BUSY":
        return StorageFailed(
            "Another server uses this server's file store. Start each server with its own --batch-dir."
        )
    return StorageFailed("The disk of the server's file store is full or fails.")
