"""How many may be connected: in all, from one address, and with the file descriptors that the system allows."""

from __future__ import annotations

import ipaddress
import resource
from collections import Counter

_EACH = 2  # file descriptors of a connection: its socket, and a file that is downloaded or uploaded over it
_FOR_OURSELVES = 128
"""File descriptors that connections never take.

About 20 are open from the start (streams, event loop, listener, log, key file). An engine that is replaced needs 8
until it runs, and keeps 2. Each of up to 16 batches has at most 5 (its journal with SQLite's, its input, its output, a
folder).
"""
_LAST = 32
"""Where so few are left (a sixteenth, of less than 512), whatever has taken the others, no connection is accepted."""


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
    """Raise this process's limit on open files as far as wanted and allowed. How many connections that is.

    Where few are allowed, connections get half of them at least.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted * _EACH + _FOR_OURSELVES
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY:
        return wanted
    return max(1, min(wanted, (soft - min(_FOR_OURSELVES, soft // 2)) // _EACH))


def is_last(descriptor: int) -> bool:
    """Whether a descriptor that was just opened shows that few are left: the system gives out the lowest free one."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft != resource.RLIM_INFINITY and descriptor >= soft - min(_LAST, soft // 16)


def _household(peer: str) -> str:
    """Who counts as one: an address; of IPv6 the first half, all of which belongs to one customer."""
    if ":" not in peer:
        return peer
    try:
        return str(ipaddress.ip_network((peer.partition("%")[0], 64), strict=False))
    except ValueError:
        return peer
