"""How many may be connected: in all, from one address, and with the file descriptors that the system allows."""

from __future__ import annotations

import ipaddress
import resource
from collections import Counter

# file descriptors of a connection: its socket, and a file that is downloaded or uploaded over it
_DESCRIPTORS_PER_CONNECTION = 2
_RESERVED_DESCRIPTORS = 128
"""File descriptors that connections never take.

About 20 are open from the start (streams, event loop, listener, log, key file). An engine that is replaced needs 8
until it runs, and keeps 2. Each of up to 16 batches has at most 5 (its journal with SQLite's, its input, its output, a
folder).
"""
_SCARCE_DESCRIPTORS = 32
"""Where so few are left (a sixteenth, of less than 512), whatever has taken the others, no connection is accepted."""


class ConnectionLimiter:
    """The places that are taken. One event loop calls everything.

    `most_of_one` does not hold for `proxies`, behind which many are.
    """

    def __init__(self, most: int, most_of_one: int, proxies: tuple[str, ...] = ()) -> None:
        self._max_connections = most
        self._max_per_client = most_of_one
        self._proxies = frozenset(proxies)
        self._by_client: Counter[str] = Counter()
        self._total = 0

    @property
    def open_connections(self) -> int:
        """How many there are."""
        return self._total

    def acquire(self, peer: str) -> bool:
        """Whether there was a place for one more."""
        name = _client_network(peer)
        if self._total >= self._max_connections or (
            self._by_client[name] >= self._max_per_client and peer not in self._proxies
        ):
            return False
        self._by_client[name] += 1
        self._total += 1
        return True

    def release(self, peer: str) -> None:
        """Give a place back."""
        name = _client_network(peer)
        self._total -= 1
        self._by_client[name] -= 1
        if not self._by_client[name]:
            del self._by_client[name]


def raise_file_limit(wanted: int) -> int:
    """Raise this process's limit on open files as far as wanted and allowed. How many connections that is.

    Where few are allowed, connections get half of them at least.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted * _DESCRIPTORS_PER_CONNECTION + _RESERVED_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY:
        return wanted
    return max(1, min(wanted, (soft - min(_RESERVED_DESCRIPTORS, soft // 2)) // _DESCRIPTORS_PER_CONNECTION))


def is_scarce_descriptor(descriptor: int) -> bool:
    """Whether a descriptor that was just opened shows that few are left: the system gives out the lowest free one."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft != resource.RLIM_INFINITY and descriptor >= soft - min(_SCARCE_DESCRIPTORS, soft // 16)


def _client_network(peer: str) -> str:
    """Who counts as one: an address; of IPv6 the first half, all of which belongs to one customer."""
    if ":" not in peer:
        return peer
    try:
        return str(ipaddress.ip_network((peer.partition("%")[0], 64), strict=False))
    except ValueError:
        return peer
