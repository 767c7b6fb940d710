"""The journal of a batch: a SQLite file with the output line of every answered input line.

Answers are written in transactions, so the journal is consistent after a crash. At the end `Journal.write` makes the
output from it, in the order of the input. The output is written under another name and renamed when it is complete.
All functions block. They may be called from any thread.
"""

from __future__ import annotations

import hashlib
import math
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from afterword.batch.input_lines import BatchRequest, InvalidLine, duplicate_id_error, read_lines, read_row
from afterword.batch.output_lines import OutputLine, invalid_line
from afterword.errors import BatchStopped, SettingError
from afterword.system.files import sync_path

_VERSION = 1
_SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE answers (
    line INTEGER PRIMARY KEY, good INTEGER NOT NULL, text BLOB NOT NULL,
    prompt INTEGER NOT NULL, completion INTEGER NOT NULL, cached INTEGER NOT NULL
);
"""
_ROW_OVERHEAD = 4096  # bytes; an upper bound of a row's size in SQLite without its answer
_NAMES = "CREATE TABLE names (digest BLOB PRIMARY KEY) WITHOUT ROWID"


@dataclass(frozen=True, slots=True)
class BatchCounts:
    """Counts over the answered lines. `failed` lines have an error; the token counts are those of the others."""

    succeeded: int = 0
    failed: int = 0
    prompt: int = 0
    completion: int = 0
    cached: int = 0

    @property
    def total(self) -> int:
        """Number of answered lines."""
        return self.succeeded + self.failed


class Journal:
    """An open journal, with an exclusive lock on its file until `close`.

    All methods raise `SettingError` if the file cannot be used, for example because another process has opened it, and
    `BatchStopped` if the disk is full or fails.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        with self._translated_errors():
            if not path.exists():
                with suppress(OSError):  # SQLite's error is more precise
                    make_private(path)
            self._db = sqlite3.connect(path, timeout=0.2, isolation_level=None, check_same_thread=False)
        try:
            self._lock_and_create()
        except BaseException:
            self._db.close()
            raise

    def _lock_and_create(self) -> None:
        with self._translated_errors():
            self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("BEGIN EXCLUSIVE")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if not version and not self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                for statement in _SCHEMA.split(";"):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {_VERSION}")
            elif version != _VERSION:
                raise SettingError(f"{self.path} is a journal of another version of Afterword. --restart deletes it.")
            self._db.execute("COMMIT")

    def close(self) -> None:
        """Close the file and release its lock."""
        self._db.close()

    def remove(self) -> None:
        """Close the journal and delete its file."""
        self.close()
        with self._translated_errors():
            for ending in ("-journal", ""):
                with suppress(FileNotFoundError):
                    os.unlink(f"{self.path}{ending}")

    # ---- facts about the job

    @property
    def facts(self) -> dict[str, str]:
        """The values written by `set_facts` and `scan`, by name."""
        with self._translated_errors():
            return dict(self._db.execute("SELECT name, value FROM facts"))

    def set_facts(self, facts: Mapping[str, object]) -> None:
        """Write facts; values are converted with `str`. Facts with other names are kept."""
        with self._transaction():
            self._put_facts(facts)

    def _put_facts(self, facts: Mapping[str, object]) -> None:
        rows = [(name, str(value)) for name, value in facts.items()]
        self._db.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", rows)

    def scan(
        self,
        source: Path,
        max_line_bytes: int,
        facts: Mapping[str, object],
        *,
        max_lines: float = math.inf,
        max_faults: float = math.inf,
    ) -> None:
        """Read the input once, in one transaction: count its lines, write an error for each faulty line and the facts.

        `max_line_bytes`: bytes of a line. Reading stops after more than `max_lines` lines or after `max_faults` faulty
        ones. Memory does not grow with the input: names of lines are in a temporary table. Adds the fact `rows`.
        """
        rows = faults = 0
        with self._transaction(), open_input(source) as file:
            self._db.execute(_NAMES)
            for line in read_lines(file, max_line_bytes):
                row = self._unique(read_row(line))
                rows += 1
                if isinstance(row, InvalidLine):
                    self._insert([invalid_line(row)])
                    faults += 1
                if faults >= max_faults or rows > max_lines:
                    break
            self._db.execute("DROP TABLE names")
            self._put_facts({"rows": rows, **facts})

    def _unique(self, row: BatchRequest | InvalidLine) -> BatchRequest | InvalidLine:
        if row.custom_id is None:
            return row
        digest = hashlib.blake2b(row.custom_id.encode(), digest_size=16).digest()
        new = self._db.execute("INSERT OR IGNORE INTO names VALUES (?)", (digest,)).rowcount
        return row if new else duplicate_id_error(row)

    # ---- answers

    def add(self, answers: Iterable[OutputLine]) -> None:
        """Write answers in one transaction."""
        with self._transaction():
            self._insert(answers)

    def _insert(self, answers: Iterable[OutputLine]) -> None:
        self._db.executemany(
            "INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?)",
            ((each.line, each.is_success, each.text, each.prompt, each.completion, each.cached) for each in answers),
        )

    @property
    def max_answer_bytes(self) -> int:
        """Size in bytes of the largest answer that SQLite can store."""
        return self._db.getlimit(sqlite3.SQLITE_LIMIT_LENGTH) - _ROW_OVERHEAD

    def size(self) -> int:
        """Size of the output so far, in bytes."""
        with self._translated_errors():
            (size,) = self._db.execute("SELECT sum(length(text) + 1) FROM answers").fetchone()
            return size or 0

    def done(self, first: int, last: int) -> set[int]:
        """Return the numbers of the answered lines from `first` to `last`, both included."""
        with self._translated_errors():
            return {
                line for (line,) in self._db.execute(f"SELECT line FROM answers WHERE line BETWEEN {first} AND {last}")
            }

    def counts(self) -> BatchCounts:
        """Count the answers so far."""
        columns = "sum(good), sum(NOT good), sum(prompt), sum(completion), sum(cached)"
        with self._translated_errors():
            return BatchCounts(*(value or 0 for value in self._db.execute(f"SELECT {columns} FROM answers").fetchone()))

    def lines(self, succeeded: bool | None = None) -> Iterator[tuple[int, bytes]]:
        """Yield the number of each input line and its output line, in order.

        `succeeded`: True for lines without error, False for lines with an error, None for all.
        """
        only = "" if succeeded is None else f"WHERE good = {int(succeeded)}"
        yield from self._db.execute(f"SELECT line, text FROM answers {only} ORDER BY line")

    def write(self, output: Path, succeeded: bool | None = None, *, private: bool = False) -> int:
        """Write the output and return its size in bytes. A crash leaves no partial file under the name `output`.

        `succeeded`: as for `lines`. `private`: the file gets mode 0600; otherwise the umask decides.
        """
        part = partial_path(output)
        with self._translated_errors():
            if private:
                make_private(part)
        with self._translated_errors(), part.open("wb") as file:
            for _, text in self.lines(succeeded):
                file.write(text)
                file.write(b"\n")
            _fsync(file)
            size = file.tell()
        with self._translated_errors():
            os.replace(part, output)
            sync_path(output.parent)
        return size

    # ----

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._translated_errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _translated_errors(self) -> Iterator[None]:
        """Hold the lock, and translate errors of SQLite and the system to Afterword's."""
        try:
            with self._lock:
                yield
        except (sqlite3.Error, OSError) as error:
            raise _storage_error(self.path, error) from None


def _storage_error(path: Path, error: Exception) -> SettingError | BatchStopped:
    if isinstance(error, sqlite3.Error) and error.sqlite_errorname == "SQLITE_BUSY":
        return SettingError(f"Another process uses {path}. Wait until it ends, or end it.")
    if isinstance(error, sqlite3.Error) and error.sqlite_errorname == "SQLITE_NOTADB":
        return SettingError(f"{path} is not a journal. --restart deletes it.")
    if isinstance(error, sqlite3.Error) and error.sqlite_errorname == "SQLITE_CANTOPEN":
        return SettingError(f"{path} cannot be opened or created.")
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return BatchStopped(f"Reading or writing in {path.parent} failed: {reason}. All answers so far are kept.")


def open_input(path: Path) -> BufferedReader:
    """Open the input file. Raises `SettingError`."""
    try:
        return path.open("rb")
    except OSError as error:
        raise SettingError(f"{path} cannot be read: {error.strerror}.") from None


def partial_path(output: Path) -> Path:
    """Return the path under which an output is written before it is renamed."""
    return output.with_name(output.name + ".part")


def make_private(path: Path) -> None:
    """Create a file with mode 0600, independent of the umask. An existing file gets that mode.

    An existing file is not opened: closing a descriptor of it would release the POSIX locks that SQLite holds on it.
    """
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        os.chmod(path, 0o600)
        return
    try:
        os.fchmod(handle, 0o600)
    finally:
        os.close(handle)


def _fsync(file: BinaryIO) -> None:
    """Flush the file to the disk, so that its content survives a power failure."""
    file.flush()
    os.fsync(file.fileno())
