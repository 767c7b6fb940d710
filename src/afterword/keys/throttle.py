"""Wrong keys: so many a minute from one address, then each further one is told to wait. Pure; see `limiter`.

Right keys are never counted and never wait: several clients may share one address, such as that of a proxy.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict

from afterword.keys.rate_limiter import TokenBucket

_MAX_ADDRESSES = 4096  # addresses that are remembered, the latest ones, so that the memory stays bounded


class WrongKeyThrottle:
    """`limit` wrong keys a minute from one address; 0 is any number."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()

    def wait(self, peer: str, now: int) -> int:
        """Count a wrong key of this address. Nanoseconds until it may try another one; 0: it may now."""
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
    """What one person has of an address: all of IPv4, the first half of IPv6; nothing of what is no address."""
    try:
        address = ipaddress.ip_address(peer)
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    return str(address.ipv4_mapped or ipaddress.IPv6Address(int(address) >> 64 << 64))
