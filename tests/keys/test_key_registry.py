"""`KeyRegistry`: it sees changes of the store, writes usage to it, and works on while the store is unusable."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afterword.errors import Overloaded, SettingError
from afterword.keys.key import Allowance, Key, TokenUsage, digest, static_keys
from afterword.keys.key_limits import KeyLimits
from afterword.keys.key_registry import Grant, KeyRegistry
from afterword.keys.key_store import KeyStore, UsageCounts, UsageUpdate
from afterword.keys.rate_limiter import MINUTE_NS, LimitExceeded

NEW_YEAR = 1_767_225_600


@dataclass
class Clock:
    """A clock that a test sets: `now` is in nanoseconds."""

    now: int = 0

    def __call__(self) -> int:
        return self.now

    def wall(self) -> float:
        return NEW_YEAR + self.now / 10**9


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path) -> KeyStore:
    return KeyStore(tmp_path / "keys.db", create=True, patience=0.05)


@pytest.fixture
def new_registry(clock: Clock) -> Callable[..., KeyRegistry]:
    return lambda given=(), store=None, wrong_keys=0: KeyRegistry(
        given, store, KeyLimits(wrong_keys), clock, clock.wall
    )


def admit(registry: KeyRegistry, text: str) -> Grant:
    account = registry.find(text)
    assert account is not None
    grant = registry.admit(account)
    assert isinstance(grant, Grant)
    return grant


def sync(registry: KeyRegistry) -> None:
    asyncio.run(registry.sync())


def spent(store: KeyStore) -> int:
    (key,) = store.all()
    return key.spent


# ---- validity of keys


def test_keys_of_the_command_line_and_of_the_store_are_valid(new_registry, store):
    key, text = store.create()
    registry = new_registry(static_keys(("a", "b"), None), store)
    assert [admit(registry, each).key for each in ("a", "b", text)] == ["given-1", "given-2", key.id]
    for wrong in ("", "c", text[:-1], text + "x", text.upper(), key.id):
        assert registry.find(wrong) is None


def test_a_registry_without_keys_accepts_no_text(new_registry):
    assert new_registry().find("") is None


def test_new_and_revoked_keys_are_seen(new_registry, store):
    old, old_text = store.create()
    registry = new_registry((), store)
    _, new_text = store.create()
    assert registry.find(new_text) is None
    store.revoke(old.id)
    sync(registry)
    assert (registry.find(old_text), admit(registry, new_text).key != old.id) == (None, True)


def test_a_key_expires_without_a_synchronization(new_registry, store, clock):
    _, text = store.create(expires=NEW_YEAR + 10)
    registry = new_registry((), store)
    clock.now = 9 * 10**9
    assert registry.find(text)
    clock.now += 10**9
    assert registry.find(text) is None


def test_a_synchronization_does_not_reset_limits(new_registry, store):
    _, text = store.create(allowance=Allowance(requests=1, concurrent=5))
    registry = new_registry((), store)
    admit(registry, text)
    store.create()
    sync(registry)
    account = registry.find(text)
    assert isinstance(registry.admit(account), LimitExceeded)


def test_a_running_request_outlives_its_key_and_is_charged(new_registry, store):
    key, text = store.create()
    registry = new_registry((), store)
    grant = admit(registry, text)
    assert grant.reserve(100) is None
    store.revoke(key.id)
    sync(registry)
    grant.close(TokenUsage(10, 20), None)
    sync(registry)
    assert spent(store) == 30


# ---- usage


def test_a_request_is_charged_for_what_it_used(new_registry, store):
    _, text = store.create(allowance=Allowance(tokens=100))
    registry = new_registry((), store)
    grant = admit(registry, text)
    assert grant.reserve(80) is None
    assert grant.limit_status()[0].remaining == 20
    grant.close(TokenUsage(10, 5, 3), registry.pseudonym("alice"))
    assert grant.limit_status()[0].remaining == 85
    sync(registry)
    assert spent(store) == 15
    assert store.usage("user") == ((store.pseudonym("alice"), UsageCounts(1, 10, 5, 3)),)
    assert store.usage("day") == (("2026-01-01", UsageCounts(1, 10, 5, 3)),)


def test_a_request_is_charged_for_more_than_it_reserved(new_registry, store):
    """No request should; if one does, it is not free."""
    _, text = store.create(allowance=Allowance(tokens=100, quota=200))
    registry = new_registry((), store)
    grant = admit(registry, text)
    assert grant.reserve(80) is None
    grant.close(TokenUsage(10, 100), None)
    assert grant.limit_status()[0].remaining == 0
    sync(registry)
    assert spent(store) == 110
    assert admit(registry, text).reserve(91) == LimitExceeded("quota", 200, 90, 91, None)


def test_a_request_that_never_began_is_charged_nothing(new_registry, store):
    _, text = store.create(allowance=Allowance(tokens=100, concurrent=1))
    registry = new_registry((), store)
    grant = admit(registry, text)
    grant.reserve(80)
    grant.close(None, None)
    assert admit(registry, text).limit_status()[0].remaining == 100
    sync(registry)
    assert (spent(store), store.usage("key")) == (0, ())


def test_running_requests_count_against_the_quota(new_registry, store):
    _, text = store.create(allowance=Allowance(quota=100))
    registry = new_registry((), store)
    first, second = admit(registry, text), admit(registry, text)
    assert first.reserve(60) is None
    assert second.reserve(60) == LimitExceeded("quota", 100, 40, 60, None)
    first.close(TokenUsage(10, 10), None)
    assert second.reserve(60) is None


def test_a_quota_survives_a_restart_and_a_crash_does_not_forget_what_was_reserved(new_registry, store):
    _, text = store.create(allowance=Allowance(quota=100))
    registry = new_registry((), store)
    admit(registry, text).reserve(60)
    sync(registry)  # the server is killed here
    assert admit(new_registry((), store), text).reserve(60) == LimitExceeded("quota", 100, 40, 60, None)


def test_servers_that_share_a_store_share_the_quota(new_registry, store):
    _, text = store.create(allowance=Allowance(quota=100))
    one, other = new_registry((), store), new_registry((), store)
    admit(one, text).reserve(60)
    sync(one)
    sync(other)
    assert admit(other, text).reserve(60) == LimitExceeded("quota", 100, 40, 60, None)


def test_rates_do_not_survive_a_restart(new_registry, store):
    _, text = store.create(allowance=Allowance(requests=1))
    admit(new_registry((), store), text)
    admit(new_registry((), store), text)


def test_usage_of_given_keys_is_kept_too(new_registry, store):
    registry = new_registry(static_keys(("a",), None), store)
    admit(registry, "a").close(TokenUsage(1, 2), None)
    sync(registry)
    assert store.usage("key") == (("given-1", UsageCounts(1, 1, 2, 0)),)


requests = st.lists(
    st.tuples(st.sampled_from("ABC"), st.integers(0, 40), st.integers(0, 40), st.booleans(), st.integers(0, MINUTE_NS)),
    max_size=30,
)


@given(requests)
@settings(max_examples=50, deadline=None)
def test_the_sums_are_right_for_any_sequence_of_requests(requests):
    """The quota is never exceeded. At the end each key is charged exactly what its requests used."""
    asyncio.run(simulate(requests))


async def simulate(requests: list[tuple[str, int, int, bool, int]]) -> None:
    clock = Clock()
    store = MemoryStore(tuple(Key(name, digest(name), allowance=Allowance(quota=200, concurrent=3)) for name in "ABC"))
    registry = KeyRegistry((), store, KeyLimits(), clock, clock.wall)
    running: list[tuple[Grant, int]] = []
    used = dict.fromkeys("ABC", 0)
    for name, reserved, used_tokens, finishes, pause in requests:
        clock.now += pause
        grant = registry.admit(registry.find(name))
        if isinstance(grant, Grant):
            if grant.reserve(reserved) is None:
                running.append((grant, min(reserved, used_tokens)))
            else:
                grant.close(None, None)
        if finishes and running:
            close(*running.pop(0), used)
        await registry.sync()
        assert all(used[key.id] <= key.spent <= 200 for key in store.known)
    for grant, tokens in running:
        close(grant, tokens, used)
    await registry.sync()
    assert {key.id: key.spent for key in store.known} == used


def close(grant: Grant, tokens: int, used: dict[str, int]) -> None:
    grant.close(TokenUsage(0, tokens), None)
    used[grant.key] += tokens


class MemoryStore:
    """A key store without a file."""

    def __init__(self, keys: tuple[Key, ...]) -> None:
        self.known = keys

    def all(self) -> tuple[Key, ...]:
        return self.known

    def version(self) -> tuple[int, int, int]:
        return 0, 0, 0

    def sync(self, batch: UsageUpdate) -> tuple[Key, ...]:
        def after(key: Key) -> Key:
            return Key(key.id, key.digest, allowance=key.allowance, spent=key.spent + batch.spent.get(key.id, 0))

        self.known = tuple(map(after, self.known))
        return self.known


# ---- a store that cannot be used


@pytest.mark.parametrize("damage", ["locked", "missing", "open to others"])
def test_requests_go_on_and_usage_is_kept_while_the_store_is_unusable(new_registry, store, damage, caplog):
    key, text = store.create(allowance=Allowance(quota=100))
    registry = new_registry((), store)
    aside = store.path.with_name("aside")
    blocker = sqlite3.connect(store.path, isolation_level=None)
    if damage == "locked":
        blocker.execute("BEGIN EXCLUSIVE")
    elif damage == "missing":
        store.path.rename(aside)
    else:
        store.path.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            grant = admit(registry, text)
            assert grant.reserve(30) is None
            grant.close(TokenUsage(10, 20), "u")
            sync(registry)
    assert isinstance(admit(registry, text).reserve(30), LimitExceeded), "the quota applies nevertheless"
    assert len(caplog.records) == 1, "logged once"
    if damage == "missing":
        aside.rename(store.path)
    store.path.chmod(0o600)
    blocker.close()
    sync(registry)
    assert spent(store) == 90
    assert store.usage("user") == (("u", UsageCounts(3, 30, 60, 0)),)
    assert store.usage("key") == ((key.id, UsageCounts(3, 30, 60, 0)),)


def test_usage_in_memory_is_bounded_while_the_store_is_unusable(new_registry, store, monkeypatch):
    monkeypatch.setattr("afterword.keys.key_registry._MAX_USAGE_ROWS", 10)
    registry = new_registry(static_keys(("a",), None), store)
    store.path.chmod(0o644)
    for number in range(50):
        admit(registry, "a").close(TokenUsage(1, 1), f"user{number}")
        sync(registry)
    store.path.chmod(0o600)
    sync(registry)
    assert len(store.usage("user")) <= 11
    assert store.usage("key") == (("given-1", UsageCounts(50, 50, 50, 0)),)


def test_usage_is_written_at_the_end(new_registry, store):
    async def open_and_close() -> None:
        async with registry.syncing():
            admit(registry, "a").close(TokenUsage(1, 1), None)

    registry = new_registry(static_keys(("a",), None), store)
    asyncio.run(open_and_close())
    assert store.usage("key") == (("given-1", UsageCounts(1, 1, 1, 0)),)


def test_wrong_keys_are_counted_by_address(new_registry):
    registry = new_registry(static_keys(("a",), None), None, 2)
    assert [registry.record_wrong_key("192.0.2.1") > 0 for _ in range(3)] == [False, False, True]
    assert registry.record_wrong_key("192.0.2.2") == 0


# ---- invalid files

INVALID_VALUES = {
    "expires": "'never'",
    "revoked": "1.5",
    "requests": "'many'",
    "tokens": "0",
    "concurrent": "-1",
    "quota": "x'00'",
    "created": "'today'",
    "spent": "1e300",
    "digest": "'text'",
    "name": "CAST(x'ff' AS TEXT)",
    "id": "CAST(x'ff' AS TEXT)",
}


def corrupt(store: KeyStore, key: str, column: str, value: str) -> None:
    with sqlite3.connect(store.path) as db:
        db.execute(f"UPDATE keys SET {column} = {value} WHERE id = ?", (key,))
    db.close()


@pytest.mark.parametrize("column", INVALID_VALUES)
def test_an_invalid_row_is_skipped_and_other_keys_stay_valid(new_registry, store, column, caplog):
    (bad, bad_text), (good, good_text), (_, other_text) = (store.create() for _ in range(3))
    registry = new_registry((), store)
    corrupt(store, bad.id, column, INVALID_VALUES[column])
    sync(registry)
    assert registry.find(bad_text) is None
    store.revoke(good.id)
    sync(registry)
    assert registry.find(good_text) is None
    assert registry.find(other_text)
    (message,) = [record.getMessage() for record in caplog.records]
    assert (f"key {bad.id}" if column != "id" else "row 1") in message
    assert bad_text not in message
    assert registry.skipped_rows == 1


def test_an_invalid_row_at_the_start_is_skipped_until_it_is_valid(new_registry, store, caplog):
    (bad, bad_text), (_, text) = store.create(), store.create()
    corrupt(store, bad.id, "expires", "'never'")
    registry = new_registry((), store)
    assert (registry.find(bad_text), bool(registry.find(text))) == (None, True)
    corrupt(store, bad.id, "expires", "NULL")
    sync(registry)
    assert registry.find(bad_text)
    assert registry.skipped_rows == 0


def test_a_key_text_in_place_of_an_id_is_not_logged(new_registry, store, caplog):
    key, text = store.create()
    corrupt(store, key.id, "id", f"'{text}'")
    corrupt(store, text, "expires", "'never'")
    assert new_registry((), store).find(text) is None
    assert "row 1" in caplog.text
    assert text not in caplog.text


def missing(store: KeyStore) -> None:
    store.path.rename(store.path.with_name("aside"))


def open_to_others(store: KeyStore) -> None:
    store.path.chmod(0o644)


def not_a_database(store: KeyStore) -> None:
    store.path.write_bytes(b"no database" * 100)


def without_keys_table(store: KeyStore) -> None:
    with sqlite3.connect(store.path) as db:
        db.execute("DROP TABLE keys")
    db.close()


DAMAGE = [missing, open_to_others, not_a_database, without_keys_table]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda each: each.__name__)
def test_keys_of_an_unreadable_file_are_refused_after_the_limit(new_registry, store, clock, damage, caplog):
    _, text = store.create()
    registry = new_registry(static_keys(("a",), None), store)
    damage(store)
    for _ in range(3):
        clock.now += 200 * 10**9
        sync(registry)
        assert registry.find(text), "until the limit has passed"
    clock.now += 1
    with pytest.raises(Overloaded) as caught:
        registry.find(text)
    assert caught.value.code == "keys_unreadable"
    with pytest.raises(Overloaded):
        registry.account(registry._by_digest[digest(text)].key.id)
    sync(registry)
    assert registry.find("a"), "keys given at the start do not depend on the file"
    assert registry.find("wrong") is None
    assert registry.seconds_since_sync == pytest.approx(600)
    assert [record.levelname for record in caplog.records] == ["WARNING", "ERROR"], "each is logged once"


def test_keys_are_valid_again_when_the_file_can_be_read(new_registry, store, clock):
    key, text = store.create()
    registry = new_registry((), store)
    open_to_others(store)
    clock.now += 601 * 10**9
    sync(registry)
    with pytest.raises(Overloaded):
        registry.find(text)
    store.path.chmod(0o600)
    sync(registry)
    assert registry.find(text)
    store.revoke(key.id)
    sync(registry)
    assert registry.find(text) is None


def test_an_unexpected_error_does_not_stop_synchronization(new_registry, store, monkeypatch, caplog):
    key, text = store.create()
    registry = new_registry((), store)
    monkeypatch.setattr(store, "version", lambda: 1 / 0)
    grant = admit(registry, text)
    grant.reserve(2)
    grant.close(TokenUsage(1, 1), None)
    for _ in range(3):
        sync(registry)
    assert len(caplog.records) == 1
    monkeypatch.undo()
    store.revoke(key.id)
    sync(registry)
    assert registry.find(text) is None
    assert spent(store) == 2


def test_revocations_are_seen_while_the_disk_is_full(new_registry, store, monkeypatch, clock):
    key, text = store.create(allowance=Allowance(quota=100))
    registry = new_registry(static_keys(("a",), None), store)

    def fail(_: UsageUpdate) -> None:
        raise SettingError("The key store cannot be used: database or disk is full.")

    monkeypatch.setattr(store, "sync", fail)
    grant = admit(registry, text)
    grant.reserve(2)
    grant.close(TokenUsage(1, 1), None)
    store.revoke(key.id)
    clock.now += 10**12
    sync(registry)
    assert registry.find(text) is None
    assert registry.seconds_since_sync == 0
    monkeypatch.undo()
    sync(registry)
    assert spent(store) == 2
