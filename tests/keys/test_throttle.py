"""The limit on wrong keys per address and minute."""

from __future__ import annotations

import pytest

from afterword.keys.rate_limiter import MINUTE_NS
from afterword.keys.throttle import WrongKeyThrottle, network

ADDRESS, OTHER_ADDRESS = "192.0.2.1", "192.0.2.2"


def exhausted(limit: int = 20) -> WrongKeyThrottle:
    """A throttle after ADDRESS has used up its limit."""
    throttle = WrongKeyThrottle(limit)
    assert [throttle.wait(ADDRESS, 0) for _ in range(limit)] == [0] * limit
    return throttle


def test_above_the_limit_an_address_must_wait():
    throttle = exhausted()
    assert throttle.wait(ADDRESS, 0) == MINUTE_NS // 20
    assert throttle.wait(ADDRESS, MINUTE_NS // 20) == 0


def test_other_addresses_do_not_wait():
    assert exhausted().wait(OTHER_ADDRESS, 0) == 0


def test_zero_means_no_limit():
    throttle = WrongKeyThrottle(0)
    assert [throttle.wait(ADDRESS, 0) for _ in range(1000)] == [0] * 1000


def test_memory_is_bounded_for_any_number_of_addresses():
    throttle = WrongKeyThrottle(1)
    for number in range(10_000):
        throttle.wait(f"10.0.{number // 256}.{number % 256}", 0)
    assert len(throttle._buckets) <= 4096


@pytest.mark.parametrize(
    ("peer", "counted"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
        ("2001:db8:1:2::", "2001:db8:1:2::"),
        ("", ""),
        ("unix", ""),
    ],
)
def test_an_ipv6_address_counts_by_its_first_64_bits(peer, counted):
    assert network(peer) == counted
