"""Rate limits, compared with a simple reference that adds up all events again."""

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
class ReferenceBucket:
    """A token bucket in fractions. It computes its level from all events since the beginning."""

    limit: int
    events: list[tuple[int, int]] = field(default_factory=list)  # time, and units taken (negative: given back)

    def level(self, now: int) -> Fraction:
        level, at = Fraction(self.limit), 0
        for when, taken in [*self.events, (now, 0)]:
            level = min(Fraction(self.limit), level + Fraction(self.limit * (when - at), MINUTE_NS)) - taken
            level, at = min(level, Fraction(self.limit)), when
        return level


@given(limits, st.lists(st.tuples(pauses, st.integers(1, 60), st.integers(0, 60))))
def test_a_bucket_equals_the_exact_reference(limit, events):
    bucket, reference, now = TokenBucket(limit, 0), ReferenceBucket(limit), 0
    for pause, amount, refund in events:
        now += pause
        assert bucket.remaining(now) == reference.level(now) // 1
        wait = bucket.wait(amount, now)
        assert (wait == 0) == (reference.level(now) >= amount)
        if wait == 0:
            bucket.take(amount, now)
            bucket.refund(min(amount, refund), now)
            reference.events += [(now, amount), (now, -min(amount, refund))]


@given(limits, st.lists(st.tuples(pauses, st.integers(1, 60), st.integers(0, 60), pauses)))
def test_no_interval_exceeds_the_burst_and_the_rate(limit, events):
    """In any interval, the units taken and not given back are at most one full bucket plus what the rate added."""
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
def test_the_wait_is_exact(limit, amount, now):
    bucket = TokenBucket(limit, 0)
    bucket.take(limit, 0)
    wait = bucket.wait(amount, now)
    if amount > limit:
        assert wait is None
    elif wait:
        assert bucket.wait(amount, now + wait - 1)
        assert bucket.wait(amount, now + wait) == 0


@given(limits, st.integers(0, 50), st.integers(0, MINUTE_NS))
def test_full_is_exact(limit, taken, now):
    bucket = TokenBucket(limit, 0)
    bucket.take(min(taken, limit), 0)
    full = bucket.time_until_full(now)
    assert not full or bucket.wait(limit, now + full - 1)
    assert bucket.wait(limit, now + full) == 0


def test_a_charge_beyond_the_level_is_waited_for():
    bucket = TokenBucket(60, 0)
    bucket.charge(90, 0)
    assert (bucket.remaining(0), bucket.wait(1, 0)) == (0, 31 * SECOND)
    assert bucket.remaining(31 * SECOND) == 1


def test_a_clock_that_goes_back_adds_nothing():
    bucket = TokenBucket(60, 100 * SECOND)
    bucket.take(60, 100 * SECOND)
    assert bucket.remaining(0) == 0
    assert bucket.remaining(101 * SECOND) == 1


# ---- all limits of a key together


def test_concurrent_requests_are_counted_until_their_end():
    limiter = RateLimiter(Allowance(concurrent=2), 0)
    assert limiter.acquire(0) is None
    assert limiter.acquire(0) is None
    assert limiter.acquire(0) == LimitExceeded("concurrent", 2, 0, 1, SECOND)
    limiter.release()
    assert limiter.acquire(0) is None


def test_a_request_above_the_rate_does_not_count_as_concurrent():
    limiter = RateLimiter(Allowance(requests=1, concurrent=1), 0)
    assert limiter.acquire(0) is None
    limiter.release()
    for _ in range(3):
        assert limiter.acquire(0) == LimitExceeded("requests", 1, 0, 1, MINUTE_NS)
    assert limiter.acquire(MINUTE_NS) is None


def test_a_request_above_the_concurrency_limit_takes_nothing_from_the_rate():
    limiter = RateLimiter(Allowance(requests=2, concurrent=1), 0)
    assert limiter.acquire(0) is None
    assert limiter.acquire(0) == LimitExceeded("concurrent", 1, 0, 1, SECOND)
    limiter.release()
    assert limiter.acquire(0) is None


def test_more_tokens_than_the_limit_are_never_accepted():
    limiter = RateLimiter(Allowance(tokens=100), 0)
    assert limiter.reserve(101, 0, 0) == LimitExceeded("tokens", 100, 100, 101, None)
    assert limiter.reserve(100, 0, 0) is None
    assert limiter.reserve(1, 0, 0) == LimitExceeded("tokens", 100, 0, 1, MINUTE_NS // 100)


@pytest.mark.parametrize(("spent", "accepted"), [(0, True), (90, True), (91, False), (1000, False)])
def test_a_request_above_the_quota_takes_nothing_from_the_rate(spent, accepted):
    limiter = RateLimiter(Allowance(tokens=10, quota=100), 0)
    assert (limiter.reserve(10, spent, 0) is None) == accepted
    assert limiter.limit_status(0)[0].remaining == (0 if accepted else 10)


def test_refunded_tokens_can_be_used_again():
    limiter = RateLimiter(Allowance(tokens=100), 0)
    assert limiter.reserve(100, 0, 0) is None
    limiter.refund(60, 0)
    assert limiter.reserve(60, 0, 0) is None
    assert limiter.reserve(1, 0, 0) is not None


def test_only_per_minute_limits_have_a_status():
    assert RateLimiter(Allowance(concurrent=1, quota=1), 0).limit_status(0) == ()
    assert [each.limit for each in RateLimiter(Allowance(requests=1, tokens=1), 0).limit_status(0)] == [
        "requests",
        "tokens",
    ]
