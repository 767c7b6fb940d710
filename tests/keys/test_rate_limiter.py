"""The limits of a key, against the shortest reference there is: everything that ever happened, added up anew."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afterword.keys.key import Allowance
from afterword.keys.rate_limiter import MINUTE_NS, LimitExceeded, RateLimiter, TokenBucket

SECOND = 10**9
limits = st.integers(1, 50)
pauses = st.one_of(st.integers(0, 100), st.integers(0, 2 * MINUTE_NS))


@dataclass
class Naive:
    """A bucket as fractions: how much is there is worked out from all that happened since the beginning."""

    limit: int
    events: list[tuple[int, int]] = field(default_factory=list)  # when, and what was taken (or given, below 0)

    def level(self, now: int) -> Fraction:
        level, at = Fraction(self.limit), 0
        for when, taken in [*self.events, (now, 0)]:
            level = min(Fraction(self.limit), level + Fraction(self.limit * (when - at), MINUTE_NS)) - taken
            level, at = min(level, Fraction(self.limit)), when
        return level


@given(limits, st.lists(st.tuples(pauses, st.integers(1, 60), st.integers(0, 60))))
def test_a_bucket_is_what_it_would_be_in_theory(limit, events):
    bucket, naive, now = TokenBucket(limit, 0), Naive(limit), 0
    for pause, amount, refund in events:
        now += pause
        assert bucket.remaining(now) == naive.level(now) // 1
        wait = bucket.wait(amount, now)
        assert (wait == 0) == (naive.level(now) >= amount)
        if wait == 0:
            bucket.take(amount, now)
            bucket.refund(min(amount, refund), now)
            naive.events += [(now, amount), (now, -min(amount, refund))]


@given(limits, st.lists(st.tuples(pauses, st.integers(1, 60), st.integers(0, 60), pauses)))
def test_never_more_is_let_in_than_the_burst_and_the_rate(limit, events):
    """In any window: what was taken and not given back is at most a bucketful and what flowed in."""
    bucket, now, log = TokenBucket(limit, 0), 0, [(0, 0)]
    for pause, amount, refund, length in events:
        now += pause
        if bucket.wait(amount, now) == 0:
            bucket.take(amount, now)
            log.append((now, amount))
            now += length
            bucket.refund(min(amount, refund), now)
            log.append((now, -min(amount, refund)))
    for first, (start, _) in enumerate(log):
        net = 0
        for when, amount in log[first:]:
            net += amount
            assert net * MINUTE_NS <= limit * MINUTE_NS + limit * (when - start)


@given(limits, st.integers(1, 60), st.integers(0, MINUTE_NS))
def test_after_the_wait_it_is_there_and_not_before(limit, amount, now):
    bucket = TokenBucket(limit, 0)
    bucket.take(limit, 0)
    wait = bucket.wait(amount, now)
    if amount > limit:
        assert wait is None
    elif wait:
        assert bucket.wait(amount, now + wait - 1)
        assert bucket.wait(amount, now + wait) == 0


@given(limits, st.integers(0, 50), st.integers(0, MINUTE_NS))
def test_full_says_when_it_is_full(limit, taken, now):
    bucket = TokenBucket(limit, 0)
    bucket.take(min(taken, limit), 0)
    full = bucket.full(now)
    assert not full or bucket.wait(limit, now + full - 1)
    assert bucket.wait(limit, now + full) == 0


def test_a_clock_that_goes_back_brings_nothing():
    bucket = TokenBucket(60, 100 * SECOND)
    bucket.take(60, 100 * SECOND)
    assert bucket.remaining(0) == 0
    assert bucket.remaining(101 * SECOND) == 1


# ---- all limits of a key together


def test_requests_at_once_are_counted_from_door_to_end():
    limiter = RateLimiter(Allowance(concurrent=2), 0)
    assert limiter.enter(0) is None
    assert limiter.enter(0) is None
    assert limiter.enter(0) == LimitExceeded("concurrent", 2, 0, 1, SECOND)
    limiter.exit()
    assert limiter.enter(0) is None


def test_whom_the_rate_keeps_out_takes_no_place():
    limiter = RateLimiter(Allowance(requests=1, concurrent=1), 0)
    assert limiter.enter(0) is None
    limiter.exit()
    for _ in range(3):
        assert limiter.enter(0) == LimitExceeded("requests", 1, 0, 1, MINUTE_NS)
    assert limiter.enter(MINUTE_NS) is None


def test_who_is_kept_out_by_the_places_takes_nothing_of_the_rate():
    limiter = RateLimiter(Allowance(requests=2, concurrent=1), 0)
    assert limiter.enter(0) is None
    assert limiter.enter(0) == LimitExceeded("concurrent", 1, 0, 1, SECOND)
    limiter.exit()
    assert limiter.enter(0) is None


def test_more_than_a_minutes_tokens_never_go():
    limiter = RateLimiter(Allowance(tokens=100), 0)
    assert limiter.reserve(101, 0, 0) == LimitExceeded("tokens", 100, 100, 101, None)
    assert limiter.reserve(100, 0, 0) is None
    assert limiter.reserve(1, 0, 0) == LimitExceeded("tokens", 100, 0, 1, MINUTE_NS // 100)


@pytest.mark.parametrize(("spent", "goes"), [(0, True), (90, True), (91, False), (1000, False)])
def test_a_quota_is_never_exceeded_and_takes_nothing_of_the_rate(spent, goes):
    limiter = RateLimiter(Allowance(tokens=10, quota=100), 0)
    assert (limiter.reserve(10, spent, 0) is None) == goes
    assert limiter.standing(0)[0].remaining == (0 if goes else 10)


def test_what_was_not_used_can_be_used_by_the_next():
    limiter = RateLimiter(Allowance(tokens=100), 0)
    assert limiter.reserve(100, 0, 0) is None
    limiter.refund(60, 0)
    assert limiter.reserve(60, 0, 0) is None
    assert limiter.reserve(1, 0, 0) is not None


def test_only_limits_a_minute_that_exist_have_a_standing():
    assert RateLimiter(Allowance(concurrent=1, quota=1), 0).standing(0) == ()
    assert [each.limit for each in RateLimiter(Allowance(requests=1, tokens=1), 0).standing(0)] == [
        "requests",
        "tokens",
    ]
