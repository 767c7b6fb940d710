"""Opens the file store's folder: checks that it belongs to Afterword, sets modes, creates or migrates the database.

The folder belongs to Afterword if it is empty or contains Afterword's database. Other files are never changed. All
functions block.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

from afterword.batch.journal import make_private
from afterword.errors import ForeignFolder, StorageFailed

_VERSION = 2
_SCHEMA = """
CREATE TABLE files (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, key TEXT NOT NULL, facts BLOB NOT NULL);
CREATE TABLE batches (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, key TEXT NOT NULL, ended INTEGER NOT NULL, facts BLOB NOT NULL
);
CREATE INDEX files_of ON files (key, number);
CREATE INDEX batches_of ON batches (key, number);
"""
_MIGRATION_2 = """
ALTER TABLE files ADD COLUMN expires INTEGER;
CREATE TABLE unfinished (name TEXT PRIMARY KEY) WITHOUT ROWID;
"""
_DATABASE = "files.db"
_OLD_DATABASE = "shelf.db"  # in folders made before 2026-11-29, which stay in use
_OWN_FILES = frozenset(
    {_DATABASE, f"{_DATABASE}-journal", _OLD_DATABASE, f"{_OLD_DATABASE}-journal", "files", "journals"}
)
_OF_SYSTEM = frozenset({"lost+found"})  # exists if the folder is the root of a file system


def entries(folder: Path) -> set[str]:
    """Return the names in the folder, except those that the file system made."""
    return set(os.listdir(folder)) - _OF_SYSTEM


def database_path(folder: Path) -> Path:
    """Return the path of a folder's database, whether it exists or not."""
    old = folder / _OLD_DATABASE
    return old if old.exists() else folder / _DATABASE


def open_database(folder: Path, clean_up: Callable[[sqlite3.Connection], None]) -> sqlite3.Connection:
    """Open or create the database of a folder, lock it for this process, and call `clean_up` in the first transaction.

    Raises `ForeignFolder` if the folder has files that are not Afterword's, `StorageFailed`, `OSError` and
    `sqlite3.Error`.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = database_path(folder)
    if not path.exists():
        if not _is_empty(folder):
            raise ForeignFolder
        make_private(path)
    db = sqlite3.connect(path, timeout=0.2, isolation_level=None, check_same_thread=False)
    try:
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute("BEGIN EXCLUSIVE")
        _prepare(folder, db)
        clean_up(db)
        db.execute("COMMIT")
    except BaseException as error:
        db.close()
        if isinstance(error, sqlite3.Error) and error.sqlite_errorname == "SQLITE_NOTADB":
            raise ForeignFolder from error
        raise
    return db


def _is_empty(folder: Path) -> bool:
    """Whether the folder has no files, or only those of a server that ended while it created the folder."""
    inner = [folder / name for name in ("files", "journals")]
    return entries(folder) <= _OWN_FILES and not any(each.exists() and os.listdir(each) for each in inner)


def _prepare(folder: Path, db: sqlite3.Connection) -> None:
    """Create or migrate the tables, create missing folders, set all modes.

    Raises `ForeignFolder` for a database of another program, and `StorageFailed` for one of a newer Afterword.
    """
    version = db.execute("PRAGMA user_version").fetchone()[0]
    tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    is_own = tables >= {"files", "batches"} if version else not tables and _is_empty(folder)
    if not is_own:
        raise ForeignFolder
    if version > _VERSION:
        raise StorageFailed("The server's file store was written by a newer version of Afterword.")
    scripts = {0: (_SCHEMA, _MIGRATION_2), 1: (_MIGRATION_2,)}.get(version, ())
    for statement in (statement for script in scripts for statement in script.split(";")):
        db.execute(statement)
    db.execute(f"PRAGMA user_version = {_VERSION}")
    make_private(database_path(folder))
    for each in (folder / "files", folder / "journals"):
        each.mkdir(exist_ok=True, mode=0o700)
    for each in (folder, folder / "files", folder / "journals"):
        each.chmod(0o700)
