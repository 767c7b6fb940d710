"""What is done of a batch, in one SQLite file beside its output: kept in transactions, so it is whole at any moment.

The output is made from it in the end, in the order of the lines, and appears under its name whole or not at all.
Everything here blocks, and may be called from any thread.
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

_VERSION = 1
_SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE answers (
    line INTEGER PRIMARY KEY, good INTEGER NOT NULL, text BLOB NOT NULL,
    prompt INTEGER NOT NULL, completion INTEGER NOT NULL, cached INTEGER NOT NULL
);
"""
_ROW_OVERHEAD = 4096  # bytes of a row beside its answer, and some more
_NAMES = "CREATE TABLE names (digest BLOB PRIMARY KEY) WITHOUT ROWID"


@dataclass(frozen=True, slots=True)
class BatchCounts:
    """What is done. `failed` rows have an error; tokens are those of good ones."""

    succeeded: int = 0
    failed: int = 0
    prompt: int = 0
    completion: int = 0
    cached: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.succeeded + self.failed


class Journal:
    """The file, held for as long as this is open: who opens it a second time is refused.

    Raises `SettingError` where it cannot be used, and `BatchStopped` where there is no room for more.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        with self._translated_errors():
            if not path.exists():
                with suppress(OSError):  # SQLite says what is wrong
                    make_private(path)
            self._db = sqlite3.connect(path, timeout=0.2, isolation_level=None, check_same_thread=False)
        try:
            self._hold()
        except BaseException:
            self._db.close()
            raise

    def _hold(self) -> None:
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
                raise SettingError(f"{self.path} is no journal of this version. --restart throws it away.")
            self._db.execute("COMMIT")

    def close(self) -> None:
        """Let go of it. What is in it stays."""
        self._db.close()

    def remove(self) -> None:
        """Throw it away."""
        self.close()
        with self._translated_errors():
            for ending in ("-journal", ""):
                with suppress(FileNotFoundError):
                    os.unlink(f"{self.path}{ending}")

    # ---- what is known of the job

    @property
    def facts(self) -> dict[str, str]:
        """What was noted, by name."""
        with self._translated_errors():
            return dict(self._db.execute("SELECT name, value FROM facts"))

    def set_facts(self, facts: Mapping[str, object]) -> None:
        """Note some facts."""
        with self._transaction():
            self._note(facts)

    def _note(self, facts: Mapping[str, object]) -> None:
        rows = [(name, str(value)) for name, value in facts.items()]
        self._db.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", rows)

    def scan(
        self,
        source: Path,
        longest: int,
        facts: Mapping[str, object],
        *,
        most_rows: float = math.inf,
        most_faults: float = math.inf,
    ) -> None:
        """Read the whole input once: count its rows, keep an answer for every faulty line, note the facts.

        All or nothing, in memory that does not depend on the input. With more rows than `most_rows`, or as many
        faults as `most_faults`, it is read no further.
        """
        rows = faults = 0
        with self._transaction(), open_input(source) as file:
            self._db.execute(_NAMES)
            for line in read_lines(file, longest):
                row = self._unique(read_row(line))
                rows += 1
                if isinstance(row, InvalidLine):
                    self._keep([invalid_line(row)])
                    faults += 1
                if faults >= most_faults or rows > most_rows:
                    break
            self._db.execute("DROP TABLE names")
            self._note({"rows": rows, **facts})

    def _unique(self, row: BatchRequest | InvalidLine) -> BatchRequest | InvalidLine:
        if row.custom_id is None:
            return row
        digest = hashlib.blake2b(row.custom_id.encode(), digest_size=16).digest()
        new = self._db.execute("INSERT OR IGNORE INTO names VALUES (?)", (digest,)).rowcount
        return row if new else duplicate_id_error(row)

    # ---- answers

    def add(self, answers: Iterable[OutputLine]) -> None:
        """Keep answers, all of them or none."""
        with self._transaction():
            self._keep(answers)

    def _keep(self, answers: Iterable[OutputLine]) -> None:
        self._db.executemany(
            "INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?)",
            ((each.line, each.is_success, each.text, each.prompt, each.completion, each.cached) for each in answers),
        )

    @property
    def longest(self) -> int:
        """Bytes of the largest answer that can be kept."""
        return self._db.getlimit(sqlite3.SQLITE_LIMIT_LENGTH) - _ROW_OVERHEAD

    def size(self) -> int:
        """Bytes of the lines of output that there are so far."""
        with self._translated_errors():
            (size,) = self._db.execute("SELECT sum(length(text) + 1) FROM answers").fetchone()
            return size or 0

    def done(self, first: int, last: int) -> set[int]:
        """Which lines among these have an answer."""
        with self._translated_errors():
            return {
                line for (line,) in self._db.execute(f"SELECT line FROM answers WHERE line BETWEEN {first} AND {last}")
            }

    def counts(self) -> BatchCounts:
        """What is done so far."""
        columns = "sum(good), sum(NOT good), sum(prompt), sum(completion), sum(cached)"
        with self._translated_errors():
            return BatchCounts(*(value or 0 for value in self._db.execute(f"SELECT {columns} FROM answers").fetchone()))

    def lines(self, good: bool | None = None) -> Iterator[tuple[int, bytes]]:
        """The lines of output, each with its line of the input, in order; only the good ones, or the others."""
        only = "" if good is None else f"WHERE good = {int(good)}"
        yield from self._db.execute(f"SELECT line, text FROM answers {only} ORDER BY line")

    def write(self, output: Path, good: bool | None = None, *, private: bool = False) -> int:
        """Write the output, whole or not at all. How many bytes it has. `private`: nobody else may read it."""
        part = partial_path(output)
        with self._translated_errors():
            if private:
                make_private(part)
        with self._translated_errors(), part.open("wb") as file:
            for _, text in self.lines(good):
                file.write(text)
                file.write(b"\n")
            _fsync(file)
            size = file.tell()
        with self._translated_errors():
            os.replace(part, output)
            sync_folder(output.parent)
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
        """One thread after the other; and what the system says, in a sentence."""
        try:
            with self._lock:
                yield
        except (sqlite3.Error, OSError) as error:
            raise _storage_error(self.path, error) from None


def _storage_error(path: Path, error: Exception) -> SettingError | BatchStopped:
    if isinstance(error, sqlite3.Error) and error.sqlite_errorname == "SQLITE_BUSY":
        return SettingError(f"Another process is at work on {path}. Wait for it, or end it.")
    if isinstance(error, sqlite3.Error) and error.sqlite_errorname == "SQLITE_NOTADB":
        return SettingError(f"{path} is no journal. --restart throws it away.")
    if isinstance(error, sqlite3.Error) and error.sqlite_errorname == "SQLITE_CANTOPEN":
        return SettingError(f"{path} cannot be opened or made.")
    why = error.strerror if isinstance(error, OSError) else str(error)
    return BatchStopped(f"The batch stops, since {path.parent} cannot be written or read: {why}. What is done is kept.")


def open_input(path: Path) -> BufferedReader:
    """The input, to be read from its beginning."""
    try:
        return path.open("rb")
    except OSError as error:
        raise SettingError(f"{path} cannot be read: {error.strerror}.") from None


def partial_path(output: Path) -> Path:
    """Where an output is until it is whole."""
    return output.with_name(output.name + ".part")


def make_private(path: Path) -> None:
    """Make a file that only its owner can read and write, whatever the umask; of one that is there change the mode.

    A file that is there is not opened: closing it would end the locks that SQLite has on it.
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
    """What was written is there when the power fails."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """What was renamed in a folder stays so when the power fails."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
