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

from afterword.errors import SettingError
from afterword.keys.key import Key, Used, digest
from afterword.keys.limiter import Limiter, Refusal, Standing
from afterword.keys.store import Batch, Place, Store, Sums, Version
from afterword.keys.throttle import Throttle

_BEAT = 0.5  # seconds between looks at the store
_UNSURE = 2 * 10**9  # a file changed so shortly before it was read may have changed again since, with the same time
_MOST_PLACES = 10_000  # kept while nothing can be written; then users are no longer told apart

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Account:
    """A key, and what is in use of its limits."""

    key: Key
    limiter: Limiter


class Ring:
    """All keys: those given at the start, which never change, and those of a store.

    `wrong_keys`: so many a minute from one address, 0 for any number. `clock` is in nanoseconds and only moves
    forward; `wall` is Unix seconds.
    """

    def __init__(
        self,
        given: Sequence[Key] = (),
        store: Store | None = None,
        wrong_keys: int = 0,
        clock: Callable[[], int] = time.monotonic_ns,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.clock = clock
        self._wall = wall
        self._store = store
        self._throttle = Throttle(wrong_keys)
        self._given = tuple(Account(key, Limiter(key.allowance, clock())) for key in given)
        self._stored: dict[str, Account] = {}
        self._opens: dict[bytes, Account] = {}
        self._spent: Counter[str] = Counter()  # not yet in the store, by key
        self._leaving: Counter[str] = Counter()  # on its way there
        self._used: dict[Place, Sums] = {}
        self._seen: Version | None = None
        self._complained = False
        self._take(() if store is None else store.all())

    def find(self, text: str) -> Account | None:
        """Whose key a text is, if it opens the server.

        Found by its digest: what a dict's lookup takes tells nothing of a SHA-256 that only the right text has.
        """
        account = self._opens.get(digest(text))
        return account if account is not None and account.key.state(self._wall()) == "active" else None

    def account(self, key: str) -> Account | None:
        """Whose key has an id, if it opens the server."""
        found = (account for account in self._opens.values() if account.key.id == key)
        account = next(found, None)
        return account if account is not None and account.key.state(self._wall()) == "active" else None

    def wait(self, peer: str, account: Account | None) -> int:
        """Nanoseconds until this address may show a key again, 0 for now; `account` is whose key it has shown."""
        return self._throttle.wait(peer, account.key.id if account else None, self.clock())

    def enter(self, account: Account) -> Grant | Refusal:
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

    def record(self, key: Key, user: str | None, used: Used) -> None:
        """Keep what a request has used."""
        if self._store is not None:
            named = user or "" if len(self._used) < _MOST_PLACES else ""
            place = Place(key.id, named, time.strftime("%Y-%m-%d", time.gmtime(self._wall())))
            self._used[place] = self._used.get(place, Sums()).plus(Sums(1, used.prompt, used.completion, used.cached))

    # ---- the store

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Exchange news with the store until the end, and a last time then."""
        over = asyncio.Event()
        keeping = asyncio.create_task(self._keep(over))
        try:
            yield
        finally:
            over.set()
            await keeping

    async def _keep(self, over: asyncio.Event) -> None:
        last = False
        while not last:
            with suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), _BEAT)
            last = over.is_set()
            await self.exchange()

    async def exchange(self) -> None:
        """Write what was used and read what has changed. What goes wrong is told once, until it goes right again."""
        if self._store is None:
            return
        batch = Batch(self._spent, self._used)
        self._leaving, self._spent, self._used = self._spent, Counter(), {}
        try:
            news = await asyncio.to_thread(_visit, self._store, batch, self._seen)
        except SettingError as error:
            self._keep_for_later(batch)
            if not self._complained:
                _log.warning("%s Requests are served meanwhile, with the keys as they were.", error.message)
            self._complained = True
            return
        self._complained = False
        if news is not None:
            keys, self._seen = news
            self._leaving = Counter()
            self._take(keys)

    def _keep_for_later(self, batch: Batch) -> None:
        self._leaving = Counter()
        self._spent.update(batch.spent)
        for place, sums in batch.used.items():
            self._used[place] = self._used.get(place, Sums()).plus(sums)

    def _take(self, keys: Sequence[Key]) -> None:
        """Know these keys of the store and no others. Who is inside stays there."""
        before, self._stored = self._stored, {}
        for key in keys:
            account = before.get(key.id)
            if account is None or account.key.allowance != key.allowance:
                account = Account(key, Limiter(key.allowance, self.clock()))
            account.key = key
            self._stored[key.id] = account
        accounts = (*self._stored.values(), *self._given)
        self._opens = {account.key.digest: account for account in accounts}


class Grant:
    """What one request may use, from the door to its end."""

    def __init__(self, ring: Ring, account: Account) -> None:
        self._ring = ring
        self._account = account
        self._reserved = 0

    @property
    def key(self) -> str:
        """The key's id."""
        return self._account.key.id

    def reserve(self, tokens: int) -> Refusal | None:
        """Take the most tokens that the request can use, or say which limit is in the way."""
        refusal = self._account.limiter.reserve(tokens, self._ring.spent(self._account.key), self._ring.clock())
        if refusal is None:
            self._reserved += tokens
            self._ring.spend(self._account.key, tokens)
        return refusal

    def close(self, used: Used | None, user: str | None) -> None:
        """The request is over: give back what it has not used. `used` is None if nothing was to be computed."""
        unused = max(0, self._reserved - (used.total if used else 0))
        self._reserved -= unused
        self._account.limiter.refund(unused, self._ring.clock())
        self._account.limiter.leave()
        self._ring.spend(self._account.key, -unused)
        if used is not None:
            self._ring.record(self._account.key, user, used)

    def standing(self) -> tuple[Standing, ...]:
        """Where the key stands with its limits a minute."""
        return self._account.limiter.standing(self._ring.clock())


def _visit(store: Store, batch: Batch, seen: Version | None) -> tuple[tuple[Key, ...], Version | None] | None:
    """In a thread: give a batch to the store and take its keys; None if there was nothing to give or to take."""
    version = store.version()
    if version == seen and not batch.spent and not batch.used:
        return None
    keys = store.exchange(batch)
    return keys, None if time.time_ns() - version[1] < _UNSURE else version
