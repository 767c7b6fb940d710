"""The key store: API keys and usage in one SQLite file that only its owner can read.

The file contains digests of keys, not their texts, and pseudonyms of users, not their names. A secret in the file makes
the pseudonyms. Every method opens the file again, so that a replaced file is noticed. Every method may block for
`patience` seconds; a running server calls them from a thread.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any, Literal

from afterword.errors import SettingError
from afterword.keys.key import Allowance, Key, digest, generate_key

UsageGrouping = Literal["key", "user", "day"]
Version = tuple[int, int, int]

_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE install (secret BLOB NOT NULL);
CREATE TABLE keys (
    id TEXT PRIMARY KEY, digest BLOB NOT NULL UNIQUE, name TEXT NOT NULL,
    created INTEGER NOT NULL, expires INTEGER, revoked INTEGER,
    requests INTEGER, tokens INTEGER, concurrent INTEGER, quota INTEGER,
    spent INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE usage (
    key TEXT NOT NULL, user TEXT NOT NULL, day TEXT NOT NULL,
    requests INTEGER NOT NULL, prompt INTEGER NOT NULL, completion INTEGER NOT NULL, cached INTEGER NOT NULL,
    PRIMARY KEY (key, user, day)
) WITHOUT ROWID;
"""
# ids that messages may show. A key's text, which they must not show, is longer and contains "_".
_ID = re.compile(r"[0-9A-Za-z-]{1,32}")
_log = logging.getLogger(__name__)

_COLUMNS = "id, digest, name, created, expires, revoked, requests, tokens, concurrent, quota, spent"


@dataclass(frozen=True, slots=True)
class UsageKey:
    """What usage is counted by. `user` is a pseudonym, or "" for none. `day` is YYYY-MM-DD in UTC."""

    key: str
    user: str
    day: str


@dataclass(frozen=True, slots=True)
class UsageCounts:
    """The usage of one `UsageKey`: requests, and tokens of three kinds."""

    requests: int = 0
    prompt: int = 0
    completion: int = 0
    cached: int = 0

    def plus(self, more: UsageCounts) -> UsageCounts:
        return UsageCounts(*(mine + other for mine, other in zip(astuple(self), astuple(more), strict=True)))


@dataclass(frozen=True, slots=True)
class UsageUpdate:
    """Changes to be written. `spent`: tokens by key id, negative if given back. `used`: usage to be added."""

    spent: Mapping[str, int] = field(default_factory=dict)
    used: Mapping[UsageKey, UsageCounts] = field(default_factory=dict)


class KeyStore:
    """The SQLite file. Methods raise `SettingError` with the reason if the file cannot be used."""

    def __init__(self, path: Path, *, create: bool = False, patience: float = 5.0) -> None:
        self.path = path
        self._patience = patience
        self._skipped: frozenset[str] = frozenset()  # rows that the last read could not use
        if create:
            self._create()
        with self._open() as db:
            found = db.execute("SELECT secret FROM install").fetchone()
        if found is None or not isinstance(found[0], bytes):
            raise self._broken("its secret is missing")
        self._secret = found[0]

    @property
    def skipped_rows(self) -> int:
        """How many rows the last read could not use."""
        return len(self._skipped)

    # ---- keys

    def create(
        self, label: str = "", expires: int | None = None, allowance: Allowance | None = None
    ) -> tuple[Key, str]:
        """Create a key. Returns it with its text, which is stored nowhere."""
        name, text = generate_key()
        key = Key(name, digest(text), label, int(time.time()), expires, None, allowance or Allowance())
        row = (key.id, key.digest, key.name, key.created, key.expires, key.revoked, *astuple(key.allowance), key.spent)
        with self._open(write=True) as db:
            db.execute(f"INSERT INTO keys ({_COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?,?,?)", row)
        return key, text

    def all(self) -> tuple[Key, ...]:
        """All keys, the oldest first. A row that is not a valid key is skipped, and logged once."""
        with self._open() as db:
            return self._keys(db)

    def revoke(self, key: str) -> None:
        """Revoke a key for good. Its usage is kept. Raises `SettingError` if there is no such key."""
        with self._open(write=True) as db:
            db.execute("UPDATE keys SET revoked = coalesce(revoked, ?) WHERE id = ?", (int(time.time()), key))
            if not db.execute("SELECT count(*) FROM keys WHERE id = ?", (key,)).fetchone()[0]:
                raise SettingError("There is no key of that ID; afterword keys list shows all keys.")

    # ---- usage

    def pseudonym(self, user: str) -> str:
        """The name under which a user's usage is stored: an HMAC with the store's secret."""
        return hmac.new(self._secret, user.encode("utf-8", "replace"), hashlib.sha256).hexdigest()[:16]

    def usage(self, by: UsageGrouping, user: str | None = None) -> tuple[tuple[str, UsageCounts], ...]:
        """Sums by key, user or day, in that order; only for `user` if it is given."""
        only = "" if user is None else "WHERE user = ?"
        given = () if user is None else (self.pseudonym(user),)
        sums = "sum(requests), sum(prompt), sum(completion), sum(cached)"
        with self._open() as db:
            rows = db.execute(f"SELECT {by}, {sums} FROM usage {only} GROUP BY {by} ORDER BY {by}", given)
            return tuple((name, UsageCounts(*counts)) for name, *counts in rows)

    # ---- for a running server

    def version(self) -> Version:
        """A value that differs after every change of the file or of its mode.

        It does not open the file: closing a second descriptor would release the locks that SQLite holds on it.
        """
        try:
            stat = self.path.stat()
        except OSError as error:
            raise self._broken(error.strerror) from None
        return stat.st_ino, stat.st_ctime_ns, stat.st_size  # ctime changes with the mode too

    def sync(self, batch: UsageUpdate) -> tuple[Key, ...]:
        """Write a batch and read the keys in one transaction. On an error nothing is written."""
        with self._open(write=bool(batch.spent or batch.used)) as db:
            spent = [(tokens, key) for key, tokens in batch.spent.items()]
            db.executemany("UPDATE keys SET spent = spent + ? WHERE id = ?", spent)
            db.executemany(
                "INSERT INTO usage VALUES (?,?,?,?,?,?,?) ON CONFLICT (key, user, day) DO UPDATE "
                "SET requests = requests + excluded.requests, prompt = prompt + excluded.prompt, "
                "completion = completion + excluded.completion, cached = cached + excluded.cached",
                [(*astuple(usage_key), *astuple(counts)) for usage_key, counts in batch.used.items()],
            )
            return self._keys(db)

    def _keys(self, db: sqlite3.Connection) -> tuple[Key, ...]:
        keys, skipped = [], set()
        for number, *row in db.execute(f"SELECT rowid, {_COLUMNS} FROM keys ORDER BY created, id"):
            try:
                keys.append(_key(*row))
            except (TypeError, ValueError):
                showable = isinstance(row[0], str) and _ID.fullmatch(row[0])
                skipped.add(f"key {row[0]}" if showable else f"row {number}")
        for name in sorted(skipped - self._skipped):
            _log.warning("The key store %s: %s is not valid and is skipped.", self.path, name)
        self._skipped = frozenset(skipped)
        return tuple(keys)

    # ---- the file

    def _create(self) -> None:
        """Create the file if it is missing. Other users have no access to it at any moment."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except FileExistsError:
            pass
        except OSError as error:
            raise self._broken(error.strerror) from None
        with self._open(write=True, check=False) as db:
            if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                for statement in _SCHEMA.split(";"):
                    db.execute(statement)
                db.execute("INSERT INTO install VALUES (?)", (secrets.token_bytes(32),))
                db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")

    @contextmanager
    def _open(self, write: bool = False, check: bool = True) -> Iterator[sqlite3.Connection]:
        """Open the file and begin a transaction, which is committed at the end."""
        self._check_rights()
        try:
            db = sqlite3.connect(f"{self.path.absolute().as_uri()}?mode=rw", timeout=self._patience, uri=True)
            db.isolation_level = None  # this class begins and ends the transactions
            db.text_factory = _text
            try:
                db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
                if check and db.execute("PRAGMA user_version").fetchone()[0] != _SCHEMA_VERSION:
                    raise self._broken("it is not a key store of this version")
                yield db
                db.execute("COMMIT")
            finally:
                db.close()  # rolls back what has not been committed
        except sqlite3.Error as error:
            raise self._broken(str(error)) from None

    def _check_rights(self) -> None:
        try:
            mode = self.path.stat().st_mode
        except FileNotFoundError:
            raise self._broken("it does not exist; create a key with afterword keys create") from None
        except OSError as error:
            raise self._broken(error.strerror) from None
        if os.name == "posix" and mode & 0o077:
            raise self._broken(
                "other users can read or write it; run chmod 600 on it, and replace the keys if they did"
            )

    def _broken(self, why: str | None) -> SettingError:
        return SettingError(f"The key store {self.path} cannot be used: {why}.")


def default_path() -> Path:
    """The path of the key store where no other is given."""
    data = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return Path(data) / "afterword" / "keys.db"


def _text(raw: bytes) -> str:
    """Decode text; invalid UTF-8 becomes surrogates, so that it makes one row unusable and not the whole file."""
    return raw.decode("utf-8", "surrogateescape")


def _key(*row: Any) -> Key:
    """A row as a key. Raises `ValueError` or `TypeError` if it is not a valid key."""
    name, key_digest, label, created, expires, revoked, *limits, spent = row
    if not (isinstance(key_digest, bytes) and len(key_digest) == len(digest(""))):
        raise ValueError("digest")
    for text in (name, label):
        text.encode()  # raises for bytes, and for text that was not UTF-8
    if not name or not all(type(number) is int for number in (created, spent)):
        raise ValueError("id or numbers")
    if not all(number is None or type(number) is int for number in (expires, revoked, *limits)):
        raise ValueError("numbers")
    if any(number is not None and number < 1 for number in limits):
        raise ValueError("limits")
    return Key(name, key_digest, label, created, expires, revoked, Allowance(*limits), spent)
