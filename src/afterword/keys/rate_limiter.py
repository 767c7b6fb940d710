"""The rate limits of one key. Pure: the current time is an argument, in nanoseconds.

Token buckets count in whole numbers, so that rounding gains or loses nothing. One request or token counts as
`MINUTE_NS`, and each nanosecond adds `limit` to the level. A clock that goes back adds nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from afterword.keys.key import Allowance

MINUTE_NS = 60 * 10**9

Limit = Literal["requests", "tokens", "concurrent", "quota"]


@dataclass(frozen=True, slots=True)
class LimitExceeded:
    """A limit that refuses a request. `wait`: nanoseconds until it would be accepted; None if it never would be."""

    limit: Limit
    allowed: int
    remaining: int
    wanted: int
    wait: int | None


@dataclass(frozen=True, slots=True)
class LimitStatus:
    """The state of a per-minute limit. `time_until_full`: nanoseconds until all of it is available again."""

    limit: Limit
    allowed: int
    remaining: int
    time_until_full: int


class TokenBucket:
    """Allows `limit` units a minute, and at most `limit` at once."""

    def __init__(self, limit: int, now: int) -> None:
        self.limit = limit
        self._level = limit * MINUTE_NS
        self._updated = now

    def wait(self, amount: int, now: int) -> int | None:
        """Nanoseconds until `amount` units are available; None if that is more than the bucket can hold."""
        if amount > self.limit:
            return None
        missing = amount * MINUTE_NS - self._refill(now)
        return max(0, -(-missing // self.limit))

    def take(self, amount: int, now: int) -> None:
        """Take `amount` units, for which `wait` has just returned 0."""
        self._level = self._refill(now) - amount * MINUTE_NS
        assert self._level >= 0

    def refund(self, amount: int, now: int) -> None:
        """Give back unused units. What exceeds the limit is lost."""
        self._level = min(self.limit * MINUTE_NS, self._refill(now) + amount * MINUTE_NS)

    def charge(self, amount: int, now: int) -> None:
        """Take units that were used already. The level can become negative."""
        self._level = self._refill(now) - amount * MINUTE_NS

    def remaining(self, now: int) -> int:
        """Whole units that are available."""
        return max(0, self._refill(now) // MINUTE_NS)

    def time_until_full(self, now: int) -> int:
        """Nanoseconds until the bucket is full."""
        return -(-(self.limit * MINUTE_NS - self._refill(now)) // self.limit)

    def _refill(self, now: int) -> int:
        elapsed = max(0, now - self._updated)
        self._updated += elapsed
        self._level = min(self.limit * MINUTE_NS, self._level + elapsed * self.limit)
        return self._level


class RateLimiter:
    """The limits of one key and their current use.

    A request calls `acquire`, `reserve` for its tokens, `refund` for unused tokens, and `release`.
    """

    def __init__(self, allowance: Allowance, now: int) -> None:
        self.allowance = allowance
        self._requests = None if allowance.requests is None else TokenBucket(allowance.requests, now)
        self._tokens = None if allowance.tokens is None else TokenBucket(allowance.tokens, now)
        self._concurrent = 0

    def acquire(self, now: int) -> LimitExceeded | None:
        """Accept a request, or return the limit that refuses it."""
        maximum = self.allowance.concurrent
        if maximum is not None and self._concurrent >= maximum:
            return LimitExceeded("concurrent", maximum, 0, 1, 10**9)
        if self._requests is not None and (exceeded := _exceeded("requests", self._requests, 1, now)):
            return exceeded
        if self._requests is not None:
            self._requests.take(1, now)
        self._concurrent += 1
        return None

    def release(self) -> None:
        """End a request that was accepted."""
        self._concurrent -= 1

    def reserve(self, tokens: int, spent: int, now: int) -> LimitExceeded | None:
        """Take the most tokens that a request can use, or return the limit that refuses it.

        `spent`: the tokens that already count against the quota.
        """
        quota = self.allowance.quota
        if quota is not None and spent + tokens > quota:
            return LimitExceeded("quota", quota, max(0, quota - spent), tokens, None)
        if self._tokens is not None:
            if exceeded := _exceeded("tokens", self._tokens, tokens, now):
                return exceeded
            self._tokens.take(tokens, now)
        return None

    def refund(self, tokens: int, now: int) -> None:
        """Give back reserved tokens that were not used."""
        if self._tokens is not None:
            self._tokens.refund(tokens, now)

    def charge(self, tokens: int, now: int) -> None:
        """Take tokens that a request has used beyond those that it had reserved."""
        if self._tokens is not None:
            self._tokens.charge(tokens, now)

    def limit_status(self, now: int) -> tuple[LimitStatus, ...]:
        """The state of the per-minute limits."""
        buckets: tuple[tuple[Limit, TokenBucket | None], ...] = (("requests", self._requests), ("tokens", self._tokens))
        return tuple(
            LimitStatus(name, bucket.limit, bucket.remaining(now), bucket.time_until_full(now))
            for name, bucket in buckets
            if bucket
        )


def _exceeded(name: Limit, bucket: TokenBucket, amount: int, now: int) -> LimitExceeded | None:
    wait = bucket.wait(amount, now)
    return None if wait == 0 else LimitExceeded(name, bucket.limit, bucket.remaining(now), amount, wait)
