"""Who tries wrong keys: so many a minute from one address, then its keys are not looked at. Pure; see `limiter`.

A key that has opened from an address before is let in all the same: one stranger behind a proxy, where all have one
address, cannot lock out those who were there.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from typing import TypeVar

from afterword.keys.limiter import Bucket

Name = TypeVar("Name")
Thing = TypeVar("Thing")

_MOST = 4096  # addresses and guests that are remembered, the latest ones: strangers cannot fill the memory


class Throttle:
    """`limit` wrong keys a minute from one address; 0 is any number."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._tries: OrderedDict[str, Bucket] = OrderedDict()
        self._guests: OrderedDict[tuple[str, str], None] = OrderedDict()

    def wait(self, peer: str, key: str | None, now: int) -> int:
        """Nanoseconds until this address may try again; 0: now. `key` is the id of the right key that it shows.

        A wrong key, None, counts as a try; a right one is remembered.
        """
        if not self._limit:
            return 0
        address = network(peer)
        if key is not None and (address, key) in self._guests:
            self._guests.move_to_end((address, key))
            return 0
        bucket = self._tries.get(address)
        if bucket is not None and (wait := bucket.wait(1, now)):
            return wait
        if key is not None:
            _remember(self._guests, (address, key), None)
        else:
            bucket = bucket or Bucket(self._limit, now)
            bucket.take(1, now)
            _remember(self._tries, address, bucket)
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


def _remember(known: OrderedDict[Name, Thing], name: Name, thing: Thing) -> None:
    known[name] = thing
    known.move_to_end(name)
    if len(known) > _MOST:
        known.popitem(last=False)
