"""The keys of a running server: news from the store are seen, what is used gets there, and trouble stops nobody."""

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
    """Nanoseconds and seconds that pass only when a test says so."""

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
def ring_of(clock: Clock) -> Callable[..., KeyRegistry]:
    return lambda given=(), store=None, wrong_keys=0: KeyRegistry(
        given, store, KeyLimits(wrong_keys), clock, clock.wall
    )


def enter(key_registry: KeyRegistry, text: str) -> Grant:
    account = key_registry.find(text)
    assert account is not None
    grant = key_registry.enter(account)
    assert isinstance(grant, Grant)
    return grant


def sync(key_registry: KeyRegistry) -> None:
    asyncio.run(key_registry.sync())


def spent(store: KeyStore) -> int:
    (key,) = store.all()
    return key.spent


# ---- who is let in


def test_given_keys_and_those_of_the_store_open(ring_of, store):
    key, text = store.create()
    ring = ring_of(static_keys(("a", "b"), None), store)
    assert [enter(ring, each).key for each in ("a", "b", text)] == ["given-1", "given-2", key.id]
    for wrong in ("", "c", text[:-1], text + "x", text.upper(), key.id):
        assert ring.find(wrong) is None


def test_a_ring_without_keys_lets_nobody_in(ring_of):
    assert ring_of().find("") is None


def test_keys_that_come_and_go_are_seen(ring_of, store):
    old, old_text = store.create()
    ring = ring_of((), store)
    _, new_text = store.create()
    assert ring.find(new_text) is None
    store.revoke(old.id)
    sync(ring)
    assert (ring.find(old_text), enter(ring, new_text).key != old.id) == (None, True)


def test_a_key_ends_at_its_time_without_any_news(ring_of, store, clock):
    _, text = store.create(expires=NEW_YEAR + 10)
    ring = ring_of((), store)
    clock.now = 9 * 10**9
    assert ring.find(text)
    clock.now += 10**9
    assert ring.find(text) is None


def test_news_do_not_renew_what_is_in_use(ring_of, store):
    _, text = store.create(allowance=Allowance(requests=1, concurrent=5))
    ring = ring_of((), store)
    enter(ring, text)
    store.create()
    sync(ring)
    account = ring.find(text)
    assert isinstance(ring.enter(account), LimitExceeded)


def test_who_is_inside_when_the_key_ends_stays_and_is_counted(ring_of, store):
    key, text = store.create()
    ring = ring_of((), store)
    grant = enter(ring, text)
    assert grant.reserve(100) is None
    store.revoke(key.id)
    sync(ring)
    grant.close(TokenUsage(10, 20), None)
    sync(ring)
    assert spent(store) == 30


# ---- what is used


def test_a_request_pays_for_what_it_used(ring_of, store):
    _, text = store.create(allowance=Allowance(tokens=100))
    ring = ring_of((), store)
    grant = enter(ring, text)
    assert grant.reserve(80) is None
    assert grant.standing()[0].remaining == 20
    grant.close(TokenUsage(10, 5, 3), ring.pseudonym("alice"))
    assert grant.standing()[0].remaining == 85
    sync(ring)
    assert spent(store) == 15
    assert store.usage("user") == ((store.pseudonym("alice"), UsageCounts(1, 10, 5, 3)),)
    assert store.usage("day") == (("2026-01-01", UsageCounts(1, 10, 5, 3)),)


def test_what_never_began_costs_nothing(ring_of, store):
    _, text = store.create(allowance=Allowance(tokens=100, concurrent=1))
    ring = ring_of((), store)
    grant = enter(ring, text)
    grant.reserve(80)
    grant.close(None, None)
    assert enter(ring, text).standing()[0].remaining == 100
    sync(ring)
    assert (spent(store), store.usage("key")) == (0, ())


def test_requests_under_way_count_against_the_quota(ring_of, store):
    _, text = store.create(allowance=Allowance(quota=100))
    ring = ring_of((), store)
    first, second = enter(ring, text), enter(ring, text)
    assert first.reserve(60) is None
    assert second.reserve(60) == LimitExceeded("quota", 100, 40, 60, None)
    first.close(TokenUsage(10, 10), None)
    assert second.reserve(60) is None


def test_a_quota_survives_a_restart_and_a_crash_does_not_forget_what_was_reserved(ring_of, store):
    _, text = store.create(allowance=Allowance(quota=100))
    ring = ring_of((), store)
    enter(ring, text).reserve(60)
    sync(ring)  # and here it is killed
    assert enter(ring_of((), store), text).reserve(60) == LimitExceeded("quota", 100, 40, 60, None)


def test_servers_that_share_a_store_share_the_quota(ring_of, store):
    _, text = store.create(allowance=Allowance(quota=100))
    one, other = ring_of((), store), ring_of((), store)
    enter(one, text).reserve(60)
    sync(one)
    sync(other)
    assert enter(other, text).reserve(60) == LimitExceeded("quota", 100, 40, 60, None)


def test_rates_do_not_survive_a_restart(ring_of, store):
    _, text = store.create(allowance=Allowance(requests=1))
    enter(ring_of((), store), text)
    enter(ring_of((), store), text)


def test_usage_of_given_keys_is_kept_too(ring_of, store):
    ring = ring_of(static_keys(("a",), None), store)
    enter(ring, "a").close(TokenUsage(1, 2), None)
    sync(ring)
    assert store.usage("key") == (("given-1", UsageCounts(1, 1, 2, 0)),)


requests = st.lists(
    st.tuples(st.sampled_from("ABC"), st.integers(0, 40), st.integers(0, 40), st.booleans(), st.integers(0, MINUTE_NS)),
    max_size=30,
)


@given(requests)
@settings(max_examples=50, deadline=None)
def test_whatever_happens_the_sums_are_right(requests):
    """Quota: never exceeded, and in the end exactly what was used; a refund is never more than what was reserved."""
    asyncio.run(live_through(requests))


async def live_through(requests: list[tuple[str, int, int, bool, int]]) -> None:
    clock = Clock()
    store = Memory(tuple(Key(name, digest(name), allowance=Allowance(quota=200, concurrent=3)) for name in "ABC"))
    key_registry = KeyRegistry((), store, KeyLimits(), clock, clock.wall)
    inside: list[tuple[Grant, int]] = []
    used = dict.fromkeys("ABC", 0)
    for name, wanted, needed, ends, pause in requests:
        clock.now += pause
        grant = key_registry.enter(key_registry.find(name))
        if isinstance(grant, Grant):
            if grant.reserve(wanted) is None:
                inside.append((grant, min(wanted, needed)))
            else:
                grant.close(None, None)
        if ends and inside:
            leave(*inside.pop(0), used)
        await key_registry.sync()
        assert all(used[key.id] <= key.spent <= 200 for key in store.known)
    for grant, tokens in inside:
        leave(grant, tokens, used)
    await key_registry.sync()
    assert {key.id: key.spent for key in store.known} == used


def leave(grant: Grant, tokens: int, used: dict[str, int]) -> None:
    grant.close(TokenUsage(0, tokens), None)
    used[grant.key] += tokens


class Memory:
    """A store without a file."""

    def __init__(self, keys: tuple[Key, ...]) -> None:
        self.known = keys

    def all(self) -> tuple[Key, ...]:
        return self.known

    def version(self) -> tuple[int, int, int]:
        return 0, 0, 0

    def exchange(self, batch: UsageUpdate) -> tuple[Key, ...]:
        def after(key: Key) -> Key:
            return Key(key.id, key.digest, allowance=key.allowance, spent=key.spent + batch.spent.get(key.id, 0))

        self.known = tuple(map(after, self.known))
        return self.known


# ---- trouble


@pytest.mark.parametrize("trouble", ["locked", "gone", "open to others"])
def test_while_the_store_cannot_be_used_all_goes_on_and_nothing_is_lost(ring_of, store, trouble, caplog):
    key, text = store.create(allowance=Allowance(quota=100))
    ring = ring_of((), store)
    aside = store.path.with_name("aside")
    blocker = sqlite3.connect(store.path, isolation_level=None)
    if trouble == "locked":
        blocker.execute("BEGIN EXCLUSIVE")
    elif trouble == "gone":
        store.path.rename(aside)
    else:
        store.path.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            grant = enter(ring, text)
            assert grant.reserve(30) is None
            grant.close(TokenUsage(10, 20), "u")
            sync(ring)
    assert isinstance(enter(ring, text).reserve(30), LimitExceeded), "the quota holds all the same"
    assert len(caplog.records) == 1, "told once"
    if trouble == "gone":
        aside.rename(store.path)
    store.path.chmod(0o600)
    blocker.close()
    sync(ring)
    assert spent(store) == 90
    assert store.usage("user") == (("u", UsageCounts(3, 30, 60, 0)),)
    assert store.usage("key") == ((key.id, UsageCounts(3, 30, 60, 0)),)


def test_without_a_place_to_write_memory_stays_bounded(ring_of, store, monkeypatch):
    monkeypatch.setattr("afterword.keys.key_registry._MAX_USAGE_ROWS", 10)
    ring = ring_of(static_keys(("a",), None), store)
    store.path.chmod(0o644)
    for number in range(50):
        enter(ring, "a").close(TokenUsage(1, 1), f"user{number}")
        sync(ring)
    store.path.chmod(0o600)
    sync(ring)
    assert len(store.usage("user")) <= 11
    assert store.usage("key") == (("given-1", UsageCounts(50, 50, 50, 0)),)


def test_what_is_used_is_written_in_the_end(ring_of, store):
    async def live() -> None:
        async with ring.syncing():
            enter(ring, "a").close(TokenUsage(1, 1), None)

    ring = ring_of(static_keys(("a",), None), store)
    asyncio.run(live())
    assert store.usage("key") == (("given-1", UsageCounts(1, 1, 1, 0)),)


def test_wrong_keys_are_counted_by_address(ring_of):
    ring = ring_of(static_keys(("a",), None), None, 2)
    assert [ring.record_wrong_key("192.0.2.1") > 0 for _ in range(3)] == [False, False, True]
    assert ring.record_wrong_key("192.0.2.2") == 0


# ---- a file that is not as expected

BAD = {
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


def spoil(store: KeyStore, key: str, column: str, value: str) -> None:
    with sqlite3.connect(store.path) as db:
        db.execute(f"UPDATE keys SET {column} = {value} WHERE id = ?", (key,))
    db.close()


@pytest.mark.parametrize("column", BAD)
def test_a_row_that_is_no_key_is_left_out_and_the_rest_goes_on(ring_of, store, column, caplog):
    (bad, bad_text), (good, good_text), (_, other_text) = (store.create() for _ in range(3))
    ring = ring_of((), store)
    spoil(store, bad.id, column, BAD[column])
    sync(ring)
    assert ring.find(bad_text) is None
    store.revoke(good.id)
    sync(ring)
    assert ring.find(good_text) is None
    assert ring.find(other_text)
    (told,) = [record.getMessage() for record in caplog.records]
    assert (f"key {bad.id}" if column != "id" else "row 1") in told
    assert bad_text not in told
    assert ring.skipped_rows == 1


def test_a_row_that_is_no_key_at_the_start_is_left_out_too(ring_of, store, caplog):
    (bad, bad_text), (_, text) = store.create(), store.create()
    spoil(store, bad.id, "expires", "'never'")
    ring = ring_of((), store)
    assert (ring.find(bad_text), bool(ring.find(text))) == (None, True)
    spoil(store, bad.id, "expires", "NULL")
    sync(ring)
    assert ring.find(bad_text)
    assert ring.skipped_rows == 0


def test_a_text_in_the_place_of_an_id_is_never_quoted(ring_of, store, caplog):
    key, text = store.create()
    spoil(store, key.id, "id", f"'{text}'")
    spoil(store, text, "expires", "'never'")
    assert ring_of((), store).find(text) is None
    assert "row 1" in caplog.text
    assert text not in caplog.text


def be_gone(store: KeyStore) -> None:
    store.path.rename(store.path.with_name("aside"))


def be_open_to_others(store: KeyStore) -> None:
    store.path.chmod(0o644)


def be_something_else(store: KeyStore) -> None:
    store.path.write_bytes(b"no database" * 100)


def be_without_a_table(store: KeyStore) -> None:
    with sqlite3.connect(store.path) as db:
        db.execute("DROP TABLE keys")
    db.close()


TROUBLE = [be_gone, be_open_to_others, be_something_else, be_without_a_table]


@pytest.mark.parametrize("trouble", TROUBLE, ids=lambda each: each.__name__)
def test_keys_of_a_file_that_cannot_be_read_any_more_open_nothing_after_a_time(ring_of, store, clock, trouble, caplog):
    _, text = store.create()
    ring = ring_of(static_keys(("a",), None), store)
    trouble(store)
    for _ in range(3):
        clock.now += 200 * 10**9
        sync(ring)
        assert ring.find(text), "for as long as the limit says"
    clock.now += 1
    with pytest.raises(Overloaded) as caught:
        ring.find(text)
    assert caught.value.code == "keys_unreadable"
    with pytest.raises(Overloaded):
        ring.account(ring._is_valid[digest(text)].key.id)
    sync(ring)
    assert ring.find("a"), "a key that was given at the start does not depend on the file"
    assert ring.find("wrong") is None
    assert ring.seconds_since_sync == pytest.approx(600)
    assert [record.levelname for record in caplog.records] == ["WARNING", "ERROR"], "each is told once"


def test_keys_open_again_when_the_file_can_be_read(ring_of, store, clock):
    key, text = store.create()
    ring = ring_of((), store)
    be_open_to_others(store)
    clock.now += 601 * 10**9
    sync(ring)
    with pytest.raises(Overloaded):
        ring.find(text)
    store.path.chmod(0o600)
    sync(ring)
    assert ring.find(text)
    store.revoke(key.id)
    sync(ring)
    assert ring.find(text) is None


def test_an_error_that_nothing_expects_does_not_end_the_reading(ring_of, store, monkeypatch, caplog):
    key, text = store.create()
    ring = ring_of((), store)
    monkeypatch.setattr(store, "version", lambda: 1 / 0)
    grant = enter(ring, text)
    grant.reserve(2)
    grant.close(TokenUsage(1, 1), None)
    for _ in range(3):
        sync(ring)
    assert len(caplog.records) == 1
    monkeypatch.undo()
    store.revoke(key.id)
    sync(ring)
    assert ring.find(text) is None
    assert spent(store) == 2


def test_a_disk_that_takes_nothing_more_does_not_hide_what_was_revoked(ring_of, store, monkeypatch, clock):
    key, text = store.create(allowance=Allowance(quota=100))
    ring = ring_of(static_keys(("a",), None), store)

    def full(_: UsageUpdate) -> None:
        raise SettingError("The key store cannot be used: database or disk is full.")

    monkeypatch.setattr(store, "exchange", full)
    grant = enter(ring, text)
    grant.reserve(2)
    grant.close(TokenUsage(1, 1), None)
    store.revoke(key.id)
    clock.now += 10**12
    sync(ring)
    assert ring.find(text) is None
    assert ring.seconds_since_sync == 0
    monkeypatch.undo()
    sync(ring)
    assert spent(store) == 2
