"""The API keys of a running server: validation, rate limits, quotas and usage.

One event loop owns all state. A thread reads and writes the key store twice a second, so that no request waits for a
disk. If the store cannot be written, the data stay in memory and are written later; requests are served meanwhile.
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

_SYNC_SECONDS = 0.5  # seconds between two synchronizations with the store
_UNSURE_NS = 2 * 10**9  # a file that changed less than this before a read may change again with the same timestamp
_MAX_USAGE_ROWS = 10_000  # unwritten rows; beyond that, usage is counted without users, so that memory stays bounded
_LIMITS = KeyLimits()
_FINAL_SYNC_SECONDS = 10.0  # seconds for the last synchronization with the store
_SECOND = 10**9  # nanoseconds
_UNREADABLE = "The server cannot read its keys at the moment. Please try again later."
_PAUSE = 30  # seconds after which a client may retry then

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Account:
    """A key and the current use of its limits."""

    key: Key
    limiter: RateLimiter


class KeyRegistry:
    """All keys: those given at the start, which never change, and those of a store.

    `clock` returns nanoseconds and never goes back. `wall` returns Unix seconds.
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
        self._by_digest: dict[bytes, Account] = {}
        self._spent: Counter[str] = Counter()  # tokens by key that are not yet in the store
        self._syncing_spent: Counter[str] = Counter()  # tokens by key that a thread is writing to the store
        self._used: dict[UsageKey, UsageCounts] = {}
        self._store_version: Version | None = None
        self._error_logged = self._stale_logged = False
        self._trusted = int(limits.keys_seconds * _SECOND)
        self._known = clock()  # when the keys were last known to be those of the store
        self._update_keys(() if store is None else store.all())

    def find(self, text: str) -> Account | None:
        """The account of a key's text; None if the key is not valid.

        Raises `Overloaded` if the key is in the store and the store has been unreadable for `keys_seconds`. The lookup
        is by SHA-256 digest: its timing gives an attacker no information about a text that is nearly right.
        """
        return self._if_valid(self._by_digest.get(digest(text)))

    def account(self, key: str) -> Account | None:
        """The account of a key's id; None if the key is not valid. Raises `Overloaded` as `find` does."""
        return self._if_valid(next((account for account in self._by_digest.values() if account.key.id == key), None))

    def _if_valid(self, account: Account | None) -> Account | None:
        if account is None or account.key.state(self._wall()) != "active":
            return None
        if self._stored.get(account.key.id) is account and self._is_stale():
            raise Overloaded(_UNREADABLE, retry_after=_PAUSE, code="keys_unreadable")
        return account

    def record_wrong_key(self, peer: str) -> int:
        """Count a wrong key from an address. Nanoseconds until the address may try another one; 0: at once."""
        return self._throttle.wait(peer, self.clock())

    def admit(self, account: Account) -> Grant | LimitExceeded:
        """Accept a request of an account, or return the limit that refuses it."""
        return account.limiter.acquire(self.clock()) or Grant(self, account)

    def limit_status(self, account: Account) -> tuple[LimitStatus, ...]:
        """The state of an account's per-minute limits."""
        return account.limiter.limit_status(self.clock())

    def pseudonym(self, user: str | None) -> str | None:
        """The name of a user in logs and usage; None without a store, which has the secret for it."""
        return self._store.pseudonym(user) if self._store is not None and user is not None else None

    # ---- usage

    def spent(self, key: Key) -> int:
        """Tokens that count against a key's quota: those used, and those that running requests have reserved."""
        return key.spent + self._syncing_spent[key.id] + self._spent[key.id]

    def spend(self, key: Key, tokens: int) -> None:
        """Count tokens against a quota. A negative number gives tokens back."""
        if self._store is not None and tokens:
            self._spent[key.id] += tokens

    def record(self, key: Key, user: str | None, used: TokenUsage) -> None:
        """Add a finished request to the usage of a key and user."""
        if self._store is not None:
            name = user or "" if len(self._used) < _MAX_USAGE_ROWS else ""
            usage_key = UsageKey(key.id, name, time.strftime("%Y-%m-%d", time.gmtime(self._wall())))
            self._used[usage_key] = self._used.get(usage_key, UsageCounts()).plus(
                UsageCounts(1, used.prompt, used.completion, used.cached)
            )

    # ---- the store

    @asynccontextmanager
    async def syncing(self) -> AsyncIterator[None]:
        """Synchronize with the store periodically while the context is open, and once more at its end."""
        over = asyncio.Event()
        syncing = supervised(partial(self._sync_until, over), "synchronization with the key file")
        try:
            yield
        finally:
            over.set()
            await asyncio.wait({syncing}, timeout=_FINAL_SYNC_SECONDS)
            syncing.cancel()

    @property
    def seconds_since_sync(self) -> float | None:
        """Seconds since the keys were last known to be those of the store; None without a store."""
        return None if self._store is None else (self.clock() - self._known) / _SECOND

    @property
    def skipped_rows(self) -> int | None:
        """Rows of the store that are not valid keys; None without a store."""
        return None if self._store is None else self._store.skipped_rows

    def _is_stale(self) -> bool:
        """Whether the store has been unreadable for so long that its keys may have been revoked. Logged once."""
        stale = self.clock() - self._known > self._trusted
        if stale and not self._stale_logged:
            seconds = self._trusted / _SECOND
            _log.error("The key file could not be read for %g s. Its keys are refused until it can be read.", seconds)
        self._stale_logged = stale
        return stale

    async def _sync_until(self, over: asyncio.Event) -> None:
        last = False
        while not last:
            with suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), _SYNC_SECONDS)
            last = over.is_set()
            await self.sync()

    async def sync(self) -> None:
        """Write usage to the store and read changed keys. An error is logged once, until a synchronization succeeds."""
        if self._store is None:
            return
        batch = UsageUpdate(self._spent, self._used)
        self._syncing_spent, self._spent, self._used = self._spent, Counter(), {}
        try:
            result = await asyncio.to_thread(_sync_store, self._store, batch, self._store_version)
        except Exception as error:  # after any error the keys are read again half a second later
            self._requeue(batch)
            self._log_error(error, "Requests are served meanwhile with the keys that were last read.")
            self._is_stale()
            return
        self._known = self.clock()
        self._is_stale()
        if result.problem is None:
            self._syncing_spent = Counter()
            self._error_logged = False
        else:
            self._requeue(batch)
            self._log_error(result.problem, "Requests are served meanwhile; their usage is written later.")
        if result.keys is not None:
            self._store_version = result.version
            self._update_keys(result.keys)

    def _log_error(self, error: Exception, meanwhile: str) -> None:
        """Log an error once; with its traceback if it is unexpected."""
        if not self._error_logged:
            expected = isinstance(error, AfterwordError)
            message = error.message if isinstance(error, AfterwordError) else "The key store cannot be used."
            _log.warning("%s %s", message, meanwhile, exc_info=None if expected else error)
        self._error_logged = True

    def _requeue(self, batch: UsageUpdate) -> None:
        self._syncing_spent = Counter()
        self._spent.update(batch.spent)
        for usage_key, counts in batch.used.items():
            self._used[usage_key] = self._used.get(usage_key, UsageCounts()).plus(counts)

    def _update_keys(self, keys: Sequence[Key]) -> None:
        """Replace the keys of the store. Requests that have begun keep their account."""
        before, self._stored = self._stored, {}
        for key in keys:
            account = before.get(key.id)
            if account is None or account.key.allowance != key.allowance:
                account = Account(key, RateLimiter(key.allowance, self.clock()))
            account.key = key
            self._stored[key.id] = account
        accounts = (*self._stored.values(), *self._given)
        self._by_digest = {account.key.digest: account for account in accounts}


class Grant:
    """The right of one request to use its key's limits, from its acceptance to its end."""

    def __init__(self, key_registry: KeyRegistry, account: Account) -> None:
        self._key_registry = key_registry
        self._account = account
        self._reserved = 0

    @property
    def key(self) -> str:
        return self._account.key.id

    @property
    def cache_name(self) -> str:
        """See `Key.cache_name`."""
        return self._account.key.cache_name

    def reserve(self, tokens: int) -> LimitExceeded | None:
        """Take the most tokens that the request can use, or return the limit that refuses it."""
        exceeded = self._account.limiter.reserve(
            tokens, self._key_registry.spent(self._account.key), self._key_registry.clock()
        )
        if exceeded is None:
            self._reserved += tokens
            self._key_registry.spend(self._account.key, tokens)
        return exceeded

    def close(self, used: TokenUsage | None, user: str | None) -> None:
        """End the request and give back the tokens that it has not used. `used` is None if nothing was computed.

        Should a request have used more than it has reserved, it is charged for all.
        """
        unused = self._reserved - (used.total if used else 0)
        self._reserved -= unused
        if unused < 0:
            self._account.limiter.charge(-unused, self._key_registry.clock())
        else:
            self._account.limiter.refund(unused, self._key_registry.clock())
        self._account.limiter.release()
        self._key_registry.spend(self._account.key, -unused)
        if used is not None:
            self._key_registry.record(self._account.key, user, used)

    def limit_status(self) -> tuple[LimitStatus, ...]:
        """The state of the key's per-minute limits."""
        return self._account.limiter.limit_status(self._key_registry.clock())


class _SyncResult(NamedTuple):
    """The result of a synchronization.

    `keys`: None if they have not changed. `problem`: why usage could not be written.
    """

    keys: tuple[Key, ...] | None
    version: Version | None
    problem: SettingError | None


def _sync_store(store: KeyStore, batch: UsageUpdate, seen: Version | None) -> _SyncResult:
    """Write `batch` to the store and read its keys. Runs in a thread. Raises `SettingError` if keys cannot be read."""
    version = store.version()
    problem: SettingError | None = None
    keys: tuple[Key, ...] | None = None
    if batch.spent or batch.used:
        try:
            keys = store.sync(batch)
        except SettingError as error:  # on a full disk, for example, keys can still be read
            problem = error
    if keys is None and version != seen:
        keys = store.all()
    return _SyncResult(keys, None if time.time_ns() - version[1] < _UNSURE_NS else version, problem)
