"""Wrong keys: so many a minute from one address."""

from __future__ import annotations

import pytest

from afterword.keys.rate_limiter import MINUTE_NS
from afterword.keys.throttle import WrongKeyThrottle, network

HOME, AWAY = "192.0.2.1", "192.0.2.2"


def worn_out(limit: int = 20) -> WrongKeyThrottle:
    """One that HOME has tried as many wrong keys on as it may."""
    throttle = WrongKeyThrottle(limit)
    assert [throttle.wait(HOME, 0) for _ in range(limit)] == [0] * limit
    return throttle


def test_after_so_many_wrong_keys_an_address_must_wait():
    throttle = worn_out()
    assert throttle.wait(HOME, 0) == MINUTE_NS // 20
    assert throttle.wait(HOME, MINUTE_NS // 20) == 0


def test_other_addresses_are_not_concerned():
    assert worn_out().wait(AWAY, 0) == 0


def test_zero_is_any_number():
    throttle = WrongKeyThrottle(0)
    assert [throttle.wait(HOME, 0) for _ in range(1000)] == [0] * 1000


def test_memory_is_bounded_however_many_addresses_come():
    throttle = WrongKeyThrottle(1)
    for number in range(10_000):
        throttle.wait(f"10.0.{number // 256}.{number % 256}", 0)
    assert len(throttle._buckets) <= 4096


@pytest.mark.parametrize(
    ("peer", "whose"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
        ("2001:db8:1:2::", "2001:db8:1:2::"),
        ("", ""),
        ("unix", ""),
    ],
)
def test_what_one_person_has_of_an_address(peer, whose):
    assert network(peer) == whose
