"""The keys of a running server: whom they let in, what they may still do, and what they have used.

One event loop owns everything. The store is only ever touched by a thread, about once a second, so no request waits
for a disk; what cannot be written is kept and tried again, and requests are served meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from afterword.errors import AfterwordError, Overloaded, SettingError
from afterword.keys.key import Key, TokenUsage, digest
from afterword.keys.key_limits import KeyLimits
from afterword.keys.key_store import KeyStore, UsageCounts, UsageKey, UsageUpdate, Version
from afterword.keys.rate_limiter import LimitExceeded, LimitStatus, RateLimiter
from afterword.keys.throttle import WrongKeyThrottle
from afterword.system.tasks import supervised

_SYNC_SECONDS = 0.5  # seconds between looks at the store
_UNSURE_NS = 2 * 10**9  # a file changed so shortly before it was read may have changed again since, with the same time
_MAX_USAGE_ROWS = 10_000  # kept while nothing can be written; then users are no longer told apart
_LIMITS = KeyLimits()
_FINAL_SYNC_SECONDS = 10.0  # seconds for the last exchange with the store
_SECOND = 10**9  # in nanoseconds
_UNREADABLE = "The server cannot read its keys at the moment. Please try again later."
_PAUSE = 30  # seconds after which a client may try again then

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Account:
    """A key, and what is in use of its limits."""

    key: Key
    limiter: RateLimiter


class KeyRegistry:
    """All keys: those given at the start, which never change, and those of a store.

    `clock` is in nanoseconds and only moves forward; `wall` is Unix seconds.
    """

    def __init__(
        self,
        given: Sequence[Key] = (),
        store: KeyStore | None = None,
        limits: KeyLimits = _LIMITS,
        clock: Callable[[], int] = time.monotonic_ns,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.clock = clock
        self._wall = wall
        self._store = store
        self._throttle = WrongKeyThrottle(limits.wrong_keys)
        self._given = tuple(Account(key, RateLimiter(key.allowance, clock())) for key in given)
        self._stored: dict[str, Account] = {}
        self._is_valid: dict[bytes, Account] = {}
        self._spent: Counter[str] = Counter()  # not yet in the store, by key
        self._leaving: Counter[str] = Counter()  # on its way there
        self._used: dict[UsageKey, UsageCounts] = {}
        self._store_version: Version | None = None
        self._complained = self._closed = False
        self._trusted = int(limits.keys_seconds * _SECOND)
        self._known = clock()  # when the keys were last those of the store
        self._update_keys(() if store is None else store.all())

    def find(self, text: str) -> Account | None:
        """Whose key a text is, if it opens the server. Raises `Overloaded` if the store has been unreadable too long.

        Found by its digest: what a dict's lookup takes tells nothing of a SHA-256 that only the right text has.
        """
        return self._if_valid(self._is_valid.get(digest(text)))

    def account(self, key: str) -> Account | None:
        """Whose key has an id, if it opens the server. Raises `Overloaded` as `find` does."""
        return self._if_valid(next((account for account in self._is_valid.values() if account.key.id == key), None))

    def _if_valid(self, account: Account | None) -> Account | None:
        if account is None or account.key.state(self._wall()) != "active":
            return None
        if self._stored.get(account.key.id) is account and self._is_stale():
            raise Overloaded(_UNREADABLE, retry_after=_PAUSE, code="keys_unreadable")
        return account

    def record_wrong_key(self, peer: str) -> int:
        """Count a wrong key of an address. Nanoseconds until it may try another one, 0 for now."""
        return self._throttle.wait(peer, self.clock())

    def enter(self, account: Account) -> Grant | LimitExceeded:
        """Let a request in, or say which limit is in the way."""
        return account.limiter.enter(self.clock()) or Grant(self, account)

    def pseudonym(self, user: str | None) -> str | None:
        """What a user is called in logs and usage; None without a store, which has the secret for it."""
        return self._store.pseudonym(user) if self._store is not None and user is not None else None

    # ---- what was used

    def spent(self, key: Key) -> int:
        """Tokens that count against a quota: what was used, and what requests under way may yet use."""
        return key.spent + self._leaving[key.id] + self._spent[key.id]

    def spend(self, key: Key, tokens: int) -> None:
        """Count tokens against a quota; fewer than none are given back."""
        if self._store is not None and tokens:
            self._spent[key.id] += tokens

    def record(self, key: Key, user: str | None, used: TokenUsage) -> None:
        """Keep what a request has used."""
        if self._store is not None:
            named = user or "" if len(self._used) < _MAX_USAGE_ROWS else ""
            place = UsageKey(key.id, named, time.strftime("%Y-%m-%d", time.gmtime(self._wall())))
            self._used[place] = self._used.get(place, UsageCounts()).plus(
                UsageCounts(1, used.prompt, used.completion, used.cached)
            )

    # ---- the store

    @asynccontextmanager
    async def syncing(self) -> AsyncIterator[None]:
        """Exchange news with the store until the end, and a last time then."""
        over = asyncio.Event()
        keeping = supervised(partial(self._keep, over), "exchange with the key file")
        try:
            yield
        finally:
            over.set()
            await asyncio.wait({keeping}, timeout=_FINAL_SYNC_SECONDS)
            keeping.cancel()

    @property
    def seconds_since_sync(self) -> float | None:
        """Seconds since the keys were last known to be those of the store; None without a store."""
        return None if self._store is None else (self.clock() - self._known) / _SECOND

    @property
    def skipped_rows(self) -> int | None:
        """Rows of the store that are no keys; None without a store."""
        return None if self._store is None else self._store.skipped_rows

    def _is_stale(self) -> bool:
        """Whether the store has been unreadable for so long that keys in it may have been revoked; logged once."""
        closed = self.clock() - self._known > self._trusted
        if closed and not self._closed:
            told = self._trusted / _SECOND
            _log.error("The key file could not be read for %g s. Until it can be read, its keys open nothing.", told)
        self._closed = closed
        return closed

    async def _keep(self, over: asyncio.Event) -> None:
        last = False
        while not last:
            with suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), _SYNC_SECONDS)
            last = over.is_set()
            await self.sync()

    async def sync(self) -> None:
        """Write what was used and read what has changed. What goes wrong is told once, until it goes right again."""
        if self._store is None:
            return
        batch = UsageUpdate(self._spent, self._used)
        self._leaving, self._spent, self._used = self._spent, Counter(), {}
        try:
            news = await asyncio.to_thread(_sync_store, self._store, batch, self._store_version)
        except Exception as error:  # whatever it is, keys are read again in half a second
            self._requeue(batch)
            self._log_error(error, "Requests are served meanwhile, with the keys as they were.")
            self._is_stale()
            return
        self._known = self.clock()
        self._is_stale()
        if news.problem is None:
            self._leaving = Counter()
            self._complained = False
        else:
            self._requeue(batch)
            self._log_error(news.problem, "Requests are served meanwhile; what they use is written later.")
        if news.keys is not None:
            self._store_version = news.version
            self._update_keys(news.keys)

    def _log_error(self, error: Exception, meanwhile: str) -> None:
        """Say once what is wrong; of an error that is not expected, where it comes from."""
        if not self._complained:
            expected = isinstance(error, AfterwordError)
            message = error.message if isinstance(error, AfterwordError) else "The key store cannot be used."
            _log.warning("%s %s", message, meanwhile, exc_info=None if expected else error)
        self._complained = True

    def _requeue(self, batch: UsageUpdate) -> None:
        self._leaving = Counter()
        self._spent.update(batch.spent)
        for place, sums in batch.used.items():
            self._used[place] = self._used.get(place, UsageCounts()).plus(sums)

    def _update_keys(self, keys: Sequence[Key]) -> None:
        """Know these keys of the store and no others. Who is inside stays there."""
        before, self._stored = self._stored, {}
        for key in keys:
            account = before.get(key.id)
            if account is None or account.key.allowance != key.allowance:
                account = Account(key, RateLimiter(key.allowance, self.clock()))
            account.key = key
            self._stored[key.id] = account
        accounts = (*self._stored.values(), *self._given)
        self._is_valid = {account.key.digest: account for account in accounts}


class Grant:
    """What one request may use, from the door to its end."""

    def __init__(self, key_registry: KeyRegistry, account: Account) -> None:
        self._key_registry = key_registry
        self._account = account
        self._reserved = 0

    @property
    def key(self) -> str:
        """The key's id."""
        return self._account.key.id

    def reserve(self, tokens: int) -> LimitExceeded | None:
        """Take the most tokens that the request can use, or say which limit is in the way."""
        refusal = self._account.limiter.reserve(
            tokens, self._key_registry.spent(self._account.key), self._key_registry.clock()
        )
        if refusal is None:
            self._reserved += tokens
            self._key_registry.spend(self._account.key, tokens)
        return refusal

    def close(self, used: TokenUsage | None, user: str | None) -> None:
        """The request is over: give back what it has not used. `used` is None if nothing was to be computed."""
        unused = max(0, self._reserved - (used.total if used else 0))
        self._reserved -= unused
        self._account.limiter.refund(unused, self._key_registry.clock())
        self._account.limiter.exit()
        self._key_registry.spend(self._account.key, -unused)
        if used is not None:
            self._key_registry.record(self._account.key, user, used)

    def standing(self) -> tuple[LimitStatus, ...]:
        """Where the key stands with its limits a minute."""
        return self._account.limiter.standing(self._key_registry.clock())


class _SyncResult(NamedTuple):
    """What an exchange has brought. `keys`: None if nothing has changed. `problem`: why nothing could be written."""

    keys: tuple[Key, ...] | None
    version: Version | None
    problem: SettingError | None


def _sync_store(store: KeyStore, batch: UsageUpdate, seen: Version | None) -> _SyncResult:
    """In a thread: give a batch to the store and take its keys. Raises `SettingError` if they cannot be read."""
    version = store.version()
    problem: SettingError | None = None
    keys: tuple[Key, ...] | None = None
    if batch.spent or batch.used:
        try:
            keys = store.sync(batch)
        except SettingError as error:  # a full disk, say: keys can be read all the same
            problem = error
    if keys is None and version != seen:
        keys = store.all()
    return _SyncResult(keys, None if time.time_ns() - version[1] < _UNSURE_NS else version, problem)
