"""How much one key may do now. Pure: the clock is an argument, in nanoseconds, and only ever moves forward.

Whole numbers throughout, so that nothing is gained or lost by rounding: a unit is worth `MINUTE_NS`, and every
nanosecond brings a bucket its limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from afterword.keys.key import Allowance

MINUTE_NS = 60 * 10**9

Limit = Literal["requests", "tokens", "concurrent", "quota"]


@dataclass(frozen=True, slots=True)
class LimitExceeded:
    """Which limit is in the way. `wait` is in nanoseconds, None if no wait would help."""

    limit: Limit
    allowed: int
    remaining: int
    wanted: int
    wait: int | None


@dataclass(frozen=True, slots=True)
class LimitStatus:
    """Where a key stands with a limit a minute. `full` is when all of it can be used again, in nanoseconds."""

    limit: Limit
    allowed: int
    remaining: int
    full: int


class TokenBucket:
    """`limit` units a minute and at most `limit` at once."""

    def __init__(self, limit: int, now: int) -> None:
        self.limit = limit
        self._level = limit * MINUTE_NS
        self._at = now

    def wait(self, amount: int, now: int) -> int | None:
        """Nanoseconds until so much is there, None for never."""
        if amount > self.limit:
            return None
        missing = amount * MINUTE_NS - self._refill(now)
        return max(0, -(-missing // self.limit))

    def take(self, amount: int, now: int) -> None:
        """Take what `wait` said is there."""
        self._level = self._refill(now) - amount * MINUTE_NS
        assert self._level >= 0

    def refund(self, amount: int, now: int) -> None:
        """Give back what was taken and not used; beyond the limit it is lost."""
        self._level = min(self.limit * MINUTE_NS, self._refill(now) + amount * MINUTE_NS)

    def remaining(self, now: int) -> int:
        """Whole units that are there."""
        return self._refill(now) // MINUTE_NS

    def full(self, now: int) -> int:
        """Nanoseconds until it is full."""
        return -(-(self.limit * MINUTE_NS - self._refill(now)) // self.limit)

    def _refill(self, now: int) -> int:
        passed = max(0, now - self._at)
        self._at += passed
        self._level = min(self.limit * MINUTE_NS, self._level + passed * self.limit)
        return self._level


class RateLimiter:
    """The limits of one key and what is in use of them. Requests `enter`, `reserve` tokens, `refund` some, `exit`."""

    def __init__(self, allowance: Allowance, now: int) -> None:
        self.allowance = allowance
        self._requests = None if allowance.requests is None else TokenBucket(allowance.requests, now)
        self._tokens = None if allowance.tokens is None else TokenBucket(allowance.tokens, now)
        self._concurrent = 0

    def enter(self, now: int) -> LimitExceeded | None:
        """Let a request in, or say why not."""
        most = self.allowance.concurrent
        if most is not None and self._concurrent >= most:
            return LimitExceeded("concurrent", most, 0, 1, 10**9)
        if self._requests is not None and (refusal := _refusal("requests", self._requests, 1, now)):
            return refusal
        if self._requests is not None:
            self._requests.take(1, now)
        self._concurrent += 1
        return None

    def exit(self) -> None:
        """A request that had entered is over."""
        self._concurrent -= 1

    def reserve(self, tokens: int, spent: int, now: int) -> LimitExceeded | None:
        """Take the most that a request can use, or say why not. `spent` is what counts against the quota already."""
        quota = self.allowance.quota
        if quota is not None and spent + tokens > quota:
            return LimitExceeded("quota", quota, max(0, quota - spent), tokens, None)
        if self._tokens is not None:
            if refusal := _refusal("tokens", self._tokens, tokens, now):
                return refusal
            self._tokens.take(tokens, now)
        return None

    def refund(self, tokens: int, now: int) -> None:
        """Give back what was reserved and not used."""
        if self._tokens is not None:
            self._tokens.refund(tokens, now)

    def standing(self, now: int) -> tuple[LimitStatus, ...]:
        """Where the limits a minute stand."""
        buckets: tuple[tuple[Limit, TokenBucket | None], ...] = (("requests", self._requests), ("tokens", self._tokens))
        return tuple(
            LimitStatus(name, bucket.limit, bucket.remaining(now), bucket.full(now))
            for name, bucket in buckets
            if bucket
        )


def _refusal(name: Limit, bucket: TokenBucket, amount: int, now: int) -> LimitExceeded | None:
    wait = bucket.wait(amount, now)
    return None if wait == 0 else LimitExceeded(name, bucket.limit, bucket.remaining(now), amount, wait)
