"""How much one key may do now. Pure: the clock is an argument, in nanoseconds, and only ever moves forward.

Whole numbers throughout, so that nothing is gained or lost by rounding: a unit is worth `MINUTE`, and every nanosecond
brings a bucket its limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from afterword.keys.key import Allowance

MINUTE = 60 * 10**9

Limit = Literal["requests", "tokens", "concurrent", "quota"]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Which limit is in the way. `wait` is in nanoseconds, None if no wait would help."""

    limit: Limit
    allowed: int
    left: int
    wanted: int
    wait: int | None


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a key stands with a limit a minute. `full` is when all of it can be used again, in nanoseconds."""

    limit: Limit
    allowed: int
    left: int
    full: int


class Bucket:
    """`limit` units a minute and at most `limit` at once."""

    def __init__(self, limit: int, now: int) -> None:
        self.limit = limit
        self._level = limit * MINUTE
        self._at = now

    def wait(self, amount: int, now: int) -> int | None:
        """Nanoseconds until so much is there, None for never."""
        if amount > self.limit:
            return None
        missing = amount * MINUTE - self._refill(now)
        return max(0, -(-missing // self.limit))

    def take(self, amount: int, now: int) -> None:
        """Take what `wait` said is there."""
        self._level = self._refill(now) - amount * MINUTE
        assert self._level >= 0

    def give(self, amount: int, now: int) -> None:
        """Give back what was taken and not used; beyond the limit it is lost."""
        self._level = min(self.limit * MINUTE, self._refill(now) + amount * MINUTE)

    def left(self, now: int) -> int:
        """Whole units that are there."""
        return self._refill(now) // MINUTE

    def full(self, now: int) -> int:
        """Nanoseconds until it is full."""
        return -(-(self.limit * MINUTE - self._refill(now)) // self.limit)

    def _refill(self, now: int) -> int:
        passed = max(0, now - self._at)
        self._at += passed
        self._level = min(self.limit * MINUTE, self._level + passed * self.limit)
        return self._level


class Limiter:
    """The limits of one key and what is in use of them. Requests `enter`, `reserve` tokens, `refund` some, `leave`."""

    def __init__(self, allowance: Allowance, now: int) -> None:
        self.allowance = allowance
        self._requests = None if allowance.requests is None else Bucket(allowance.requests, now)
        self._tokens = None if allowance.tokens is None else Bucket(allowance.tokens, now)
        self._inside = 0

    def enter(self, now: int) -> Refusal | None:
        """Let a request in, or say why not."""
        most = self.allowance.concurrent
        if most is not None and self._inside >= most:
            return Refusal("concurrent", most, 0, 1, 10**9)
        if self._requests is not None and (refusal := _refusal("requests", self._requests, 1, now)):
            return refusal
        if self._requests is not None:
            self._requests.take(1, now)
        self._inside += 1
        return None

    def leave(self) -> None:
        """A request that had entered is over."""
        self._inside -= 1

    def reserve(self, tokens: int, spent: int, now: int) -> Refusal | None:
        """Take the most that a request can use, or say why not. `spent` is what counts against the quota already."""
        quota = self.allowance.quota
        if quota is not None and spent + tokens > quota:
            return Refusal("quota", quota, max(0, quota - spent), tokens, None)
        if self._tokens is not None:
            if refusal := _refusal("tokens", self._tokens, tokens, now):
                return refusal
            self._tokens.take(tokens, now)
        return None

    def refund(self, tokens: int, now: int) -> None:
        """Give back what was reserved and not used."""
        if self._tokens is not None:
            self._tokens.give(tokens, now)

    def standing(self, now: int) -> tuple[Standing, ...]:
        """Where the limits a minute stand."""
        buckets: tuple[tuple[Limit, Bucket | None], ...] = (("requests", self._requests), ("tokens", self._tokens))
        return tuple(
            Standing(name, bucket.limit, bucket.left(now), bucket.full(now)) for name, bucket in buckets if bucket
        )


def _refusal(name: Limit, bucket: Bucket, amount: int, now: int) -> Refusal | None:
    wait = bucket.wait(amount, now)
    return None if wait == 0 else Refusal(name, bucket.limit, bucket.left(now), amount, wait)
