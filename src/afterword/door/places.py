"""How many may be connected: in all, and from one address."""

from __future__ import annotations

import ipaddress
import resource
from collections import Counter

_FOR_OURSELVES = 64  # open files besides connections: the engine, the listener, logs, a database


class Places:
    """The places that are taken. One event loop calls everything.

    `most_of_one` does not hold for `proxies`, behind which many are.
    """

    def __init__(self, most: int, most_of_one: int, proxies: tuple[str, ...] = ()) -> None:
        self._most = most
        self._most_of_one = most_of_one
        self._proxies = frozenset(proxies)
        self._taken: Counter[str] = Counter()
        self._total = 0

    @property
    def taken(self) -> int:
        """How many there are."""
        return self._total

    def take(self, peer: str) -> bool:
        """Whether there was a place for one more."""
        name = _household(peer)
        if self._total >= self._most or (self._taken[name] >= self._most_of_one and peer not in self._proxies):
            return False
        self._taken[name] += 1
        self._total += 1
        return True

    def leave(self, peer: str) -> None:
        """Give a place back."""
        name = _household(peer)
        self._total -= 1
        self._taken[name] -= 1
        if not self._taken[name]:
            del self._taken[name]


def open_files(wanted: int) -> int:
    """Raise this process's limit on open files as far as wanted and allowed. How many connections that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted + _FOR_OURSELVES:
        soft = wanted + _FOR_OURSELVES if hard == resource.RLIM_INFINITY else min(hard, wanted + _FOR_OURSELVES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, soft - _FOR_OURSELVES))


def _household(peer: str) -> str:
    """Who counts as one: an address; of IPv6 the first half, all of which belongs to one customer."""
    if ":" not in peer:
        return peer
    try:
        return str(ipaddress.ip_network((peer.partition("%")[0], 64), strict=False))
    except ValueError:
        return peer
