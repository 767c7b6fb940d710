"""Limits wrong keys per address and minute. Pure: the current time is an argument, in nanoseconds.

Valid keys are never counted and never refused, since several clients may share one address, such as a proxy's.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict

from afterword.keys.rate_limiter import TokenBucket

_MAX_ADDRESSES = 4096  # the latest addresses that are remembered, so that memory stays bounded


class WrongKeyThrottle:
    """Allows `limit` wrong keys per minute from one address; 0 means no limit."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()

    def wait(self, peer: str, now: int) -> int:
        """Count a wrong key from an address. Nanoseconds until the address may try another one; 0: at once."""
        if not self._limit:
            return 0
        address = network(peer)
        bucket = self._buckets.get(address) or TokenBucket(self._limit, now)
        if wait := bucket.wait(1, now):
            return wait
        bucket.take(1, now)
        self._buckets[address] = bucket
        self._buckets.move_to_end(address)
        if len(self._buckets) > _MAX_ADDRESSES:
            self._buckets.popitem(last=False)
        return 0


def network(peer: str) -> str:
    """The address that is counted: an IPv4 address, or the first 64 bits of an IPv6 address.

    An IPv4-mapped IPv6 address counts as IPv4. Text that is not an address gives "".
    """
    try:
        address = ipaddress.ip_address(peer)
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    return str(address.ipv4_mapped or ipaddress.IPv6Address(int(address) >> 64 << 64))
