"""The folder of files and batches: whose it is, who may read it, and the database in it.

It is ours if it is empty or has our database. What else lies in it is left alone. Everything here blocks.
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
_OWN_FILES = frozenset({"shelf.db", "shelf.db-journal", "files", "journals"})
_OF_SYSTEM = frozenset({"lost+found"})  # in a folder that is a disk of its own


def entries(folder: Path) -> set[str]:
    """The names of what is in it."""
    return set(os.listdir(folder)) - _OF_SYSTEM


def open_database(folder: Path, sweep: Callable[[sqlite3.Connection], None]) -> sqlite3.Connection:
    """Its database, held until it is closed, after `sweep`. Made if there is none.

    Raises `ForeignFolder` if other files are in the folder, `StorageFailed`, `OSError` and `sqlite3.Error`.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    place = folder / "shelf.db"
    if not place.exists():
        if not _is_empty(folder):
            raise ForeignFolder
        make_private(place)
    db = sqlite3.connect(place, timeout=0.2, isolation_level=None, check_same_thread=False)
    try:
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute("BEGIN EXCLUSIVE")
        _prepare(folder, db)
        sweep(db)
        db.execute("COMMIT")
    except BaseException as error:
        db.close()
        if isinstance(error, sqlite3.Error) and error.sqlite_errorname == "SQLITE_NOTADB":
            raise ForeignFolder from error
        raise
    return db


def _is_empty(folder: Path) -> bool:
    """Whether there is nothing but what a server left that ended while it made the folder."""
    inner = [folder / name for name in ("files", "journals")]
    return entries(folder) <= _OWN_FILES and not any(each.exists() and os.listdir(each) for each in inner)


def _prepare(folder: Path, db: sqlite3.Connection) -> None:
    """Make or mend what is missing. Raises `ForeignFolder` for the database of something else."""
    version = db.execute("PRAGMA user_version").fetchone()[0]
    tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    ours = tables >= {"files", "batches"} if version else not tables and _is_empty(folder)
    if not ours:
        raise ForeignFolder
    if version > _VERSION:
        raise StorageFailed("The server's storage for files is of another version.")
    scripts = {0: (_SCHEMA, _MIGRATION_2), 1: (_MIGRATION_2,)}.get(version, ())
    for statement in (statement for script in scripts for statement in script.split(";")):
        db.execute(statement)
    db.execute(f"PRAGMA user_version = {_VERSION}")
    make_private(folder / "shelf.db")
    for each in (folder / "files", folder / "journals"):
        each.mkdir(exist_ok=True, mode=0o700)
    for each in (folder, folder / "files", folder / "journals"):
        each.chmod(0o700)
