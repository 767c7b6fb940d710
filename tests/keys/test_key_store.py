"""The key store: access rights, contents, and errors when the file cannot be used."""

from __future__ import annotations

import os
import re
import sqlite3
from pathlib import Path

import pytest

from afterword.errors import SettingError
from afterword.keys.key import Allowance, digest, parse_duration, static_keys
from afterword.keys.key_store import KeyStore, UsageCounts, UsageKey, UsageUpdate, default_path


@pytest.fixture
def store(tmp_path: Path) -> KeyStore:
    return KeyStore(tmp_path / "deep" / "keys.db", create=True, patience=0.05)


def test_a_key_has_its_format_and_only_its_digest_is_stored(store):
    key, text = store.create("mine")
    assert re.fullmatch(r"aw_[0-9a-f]{8}_[A-Za-z0-9_-]{43}", text)
    assert text.split("_")[1] == key.id
    assert store.all() == (key,)
    assert key.digest == digest(text)
    assert text[-43:].encode() not in store.path.read_bytes()


def test_several_keys_are_valid_with_their_own_limits(store):
    allowance = Allowance(1, 2, 3, 4)
    first, second = store.create()[0], store.create("b", 100, allowance)[0]
    assert {key.id: key for key in store.all()} == {first.id: first, second.id: second}
    assert (second.allowance, second.expires, first.allowance) == (allowance, 100, Allowance())


def test_a_key_expires_and_can_be_revoked(store):
    permanent, temporary = store.create()[0], store.create(expires=100)[0]
    assert (permanent.state(1e12), temporary.state(99.9), temporary.state(100)) == ("active", "active", "expired")
    store.revoke(temporary.id)
    states = {key.id: key.state(0) for key in store.all()}
    assert states == {permanent.id: "active", temporary.id: "revoked"}


def test_only_keys_that_exist_can_be_revoked(store):
    with pytest.raises(SettingError, match="no key of that ID"):
        store.revoke("' OR 1=1 --")


# ---- access rights


def test_only_the_owner_can_read_the_file(store):
    """A rollback journal gets the same mode. No other file is left in the folder."""
    store.create()
    assert [path.name for path in store.path.parent.iterdir()] == ["keys.db"]
    assert store.path.stat().st_mode & 0o777 == 0o600
    assert store.path.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o602])
def test_a_file_with_access_for_other_users_is_refused(store, mode):
    store.path.chmod(mode)
    with pytest.raises(SettingError, match="chmod 600"):
        KeyStore(store.path)
    with pytest.raises(SettingError, match="chmod 600"):
        store.sync(UsageUpdate())


def test_a_missing_file_is_created_only_on_request(tmp_path):
    with pytest.raises(SettingError, match="afterword keys create"):
        KeyStore(tmp_path / "keys.db")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"this is no database" * 100, b"SQLite format 3\0" + b"\1" * 2000])
def test_a_file_that_is_not_a_key_store_is_refused_and_unchanged(tmp_path, content):
    path = tmp_path / "keys.db"
    path.write_bytes(content)
    path.chmod(0o600)
    for create in (False, True):
        with pytest.raises(SettingError, match="cannot be used"):
            KeyStore(path, create=create)
    assert path.read_bytes() == content


def test_a_file_of_a_later_version_is_refused(store):
    with sqlite3.connect(store.path) as db:
        db.execute("PRAGMA user_version = 2")
    db.close()
    with pytest.raises(SettingError, match="version"):
        KeyStore(store.path, create=True)


def test_the_default_path_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_path() == tmp_path / "afterword" / "keys.db"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_path() == tmp_path / ".local/share/afterword/keys.db"


# ---- usage


def test_usage_adds_up_by_key_user_and_day(store):
    alice, bob = store.pseudonym("alice"), store.pseudonym("bob")
    used = {
        UsageKey("k1", alice, "2026-01-01"): UsageCounts(1, 10, 20, 5),
        UsageKey("k1", bob, "2026-01-02"): UsageCounts(2, 100, 200, 50),
        UsageKey("k2", alice, "2026-01-02"): UsageCounts(1, 1, 1, 1),
    }
    store.sync(UsageUpdate({}, used))
    store.sync(UsageUpdate({}, used))
    assert store.usage("key") == (("k1", UsageCounts(6, 220, 440, 110)), ("k2", UsageCounts(2, 2, 2, 2)))
    assert store.usage("day") == (
        ("2026-01-01", UsageCounts(2, 20, 40, 10)),
        ("2026-01-02", UsageCounts(6, 202, 402, 102)),
    )
    assert dict(store.usage("user")) == {alice: UsageCounts(4, 22, 42, 12), bob: UsageCounts(4, 200, 400, 100)}
    assert store.usage("key", "bob") == (("k1", UsageCounts(4, 200, 400, 100)),)
    assert store.usage("key", "carol") == ()


def test_pseudonyms_differ_between_stores(store, tmp_path):
    other = KeyStore(tmp_path / "other.db", create=True)
    assert store.pseudonym("alice") == KeyStore(store.path).pseudonym("alice") != other.pseudonym("alice")


def test_spent_tokens_add_up_and_can_be_given_back(store):
    key = store.create()[0]
    store.sync(UsageUpdate({key.id: 100}))
    (after,) = store.sync(UsageUpdate({key.id: -40, "given-1": 5}))
    assert after.spent == 60


# ---- errors


def test_a_locked_file_is_not_partly_written(store):
    key = store.create()[0]
    batch = UsageUpdate({key.id: 1}, {UsageKey(key.id, "", "2026-01-01"): UsageCounts(1, 1, 1, 1)})
    blocker = sqlite3.connect(store.path, isolation_level=None)
    blocker.execute("BEGIN EXCLUSIVE")
    with pytest.raises(SettingError, match="locked"):
        store.sync(batch)
    blocker.execute("ROLLBACK")
    blocker.close()
    assert store.sync(batch)[0].spent == 1
    assert store.usage("key") == ((key.id, UsageCounts(1, 1, 1, 1)),)


def test_a_full_disk_is_an_error_and_changes_nothing(store, monkeypatch):
    key = store.create()[0]
    fill_disk(monkeypatch)
    used = {UsageKey(key.id, f"user{number}", "2026-01-01"): UsageCounts(1, 1, 1, 1) for number in range(1000)}
    with pytest.raises(SettingError, match="full"):
        store.sync(UsageUpdate({key.id: 1000}, used))
    monkeypatch.undo()
    assert store.all() == (key,)
    assert store.usage("key") == ()


def fill_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let SQLite report a full disk from now on."""
    connect = sqlite3.connect

    def connect_to_full_disk(*args: object, **options: object) -> sqlite3.Connection:
        db = connect(*args, **options)
        db.execute("PRAGMA max_page_count = 1")
        return db

    monkeypatch.setattr(sqlite3, "connect", connect_to_full_disk)


def test_every_change_changes_the_version_and_a_read_does_not(store):
    before = store.version()
    store.all()
    assert store.version() == before
    store.create()
    assert store.version() != before


def test_a_replaced_file_changes_the_version(store, tmp_path):
    before = store.version()
    other = KeyStore(tmp_path / "other.db", create=True)
    os.replace(other.path, store.path)
    assert store.version() != before


# ---- command-line values


@pytest.mark.parametrize(("text", "hours"), [("1h", 1), ("30d", 720), ("2w", 336)])
def test_durations(text, hours):
    assert parse_duration(text).total_seconds() == hours * 3600


@pytest.mark.parametrize("text", ["", "0d", "-1d", "1", "d", "1m", "1.5d", "٣d", "9999999d"])
def test_an_invalid_duration_is_refused(text):
    with pytest.raises(SettingError, match="--expires"):
        parse_duration(text)


def test_given_keys_are_named_by_their_position(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# two\nb\n\n c \n")
    assert [(key.id, key.digest) for key in static_keys(("a",), file)] == [
        ("given-1", digest("a")),
        ("given-2", digest("b")),
        ("given-3", digest("c")),
    ]


@pytest.mark.parametrize("secret", [None, "text", 5])
def test_a_file_without_its_secret_is_refused(store, secret):
    with sqlite3.connect(store.path) as db:
        db.execute("DELETE FROM install")
        if secret is not None:
            db.execute("INSERT INTO install VALUES (?)", (secret,))
    db.close()
    with pytest.raises(SettingError, match="secret"):
        KeyStore(store.path)


def test_a_change_of_mode_changes_the_version(store):
    before = store.version()
    store.path.chmod(0o644)
    assert store.version() != before
