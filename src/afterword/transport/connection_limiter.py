"""How many connections may be open: in total, per client address, and within the system's limit on open files.

`ConnectionLimiter` owns the counts; it runs on the event loop. `raise_file_limit` changes the process's file limit.
"""

from __future__ import annotations

import ipaddress
import resource
from collections import Counter

# file descriptors per connection: its socket, and a file that is downloaded or uploaded over it
_DESCRIPTORS_PER_CONNECTION = 2
_RESERVED_DESCRIPTORS = 128
"""File descriptors that are reserved for everything but connections.

About 20 are open from the start (standard streams, event loop, listener, log, key file). Replacing a worker needs 8
until the new worker runs, which keeps 2. Each of up to 16 batches needs at most 5: its journal with SQLite's files, its
input, its output, a folder.
"""
_SCARCE_DESCRIPTORS = 32
"""The server accepts no connection while fewer file descriptors than this are free.

If the limit on open files is below 512, the number is a sixteenth of that limit.
"""


class ConnectionLimiter:
    """Counts open connections. It is used from one event loop.

    `max_connections` bounds all connections together. `max_per_client` bounds those of one address, except for the
    addresses in `proxies`, over which many clients connect.
    """

    def __init__(self, max_connections: int, max_per_client: int, proxies: tuple[str, ...] = ()) -> None:
        self._max_connections = max_connections
        self._max_per_client = max_per_client
        self._proxies = frozenset(proxies)
        self._by_client: Counter[str] = Counter()
        self._total = 0

    @property
    def open_connections(self) -> int:
        return self._total

    def acquire(self, peer: str) -> bool:
        """Count one more connection from the address `peer`. False if a limit is reached; then nothing is counted."""
        name = _client_network(peer)
        if self._total >= self._max_connections or (
            self._by_client[name] >= self._max_per_client and peer not in self._proxies
        ):
            return False
        self._by_client[name] += 1
        self._total += 1
        return True

    def release(self, peer: str) -> None:
        name = _client_network(peer)
        self._total -= 1
        self._by_client[name] -= 1
        if not self._by_client[name]:
            del self._by_client[name]


def raise_file_limit(wanted: int) -> int:
    """Raise this process's limit on open files as far as `wanted` connections need and the system allows.

    Returns how many connections the new limit allows: at most `wanted`, at least 1. At least half of the files are for
    connections where the limit is low.
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
    """Whether the number of a newly opened descriptor shows that few are free: the system assigns the lowest one."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft != resource.RLIM_INFINITY and descriptor >= soft - min(_SCARCE_DESCRIPTORS, soft // 16)


def _client_network(peer: str) -> str:
    """The address that limits apply to: an IPv4 address, or the first 64 bits of an IPv6 address.

    A provider assigns at least a /64 to one customer.
    """
    if ":" not in peer:
        return peer
    try:
        return str(ipaddress.ip_network((peer.partition("%")[0], 64), strict=False))
    except ValueError:
        return peer
