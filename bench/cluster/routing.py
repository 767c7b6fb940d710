"""How requests are given to replicas: in turn, to the least loaded, or to those that have seen the prompt's prefix."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import count

from bench.cluster.trace import Request

Router = Callable[[Request, Sequence[int]], int]
"""Chooses a replica for a request, from the loads of all replicas."""
MOST_KNOWN = 64
"""Replicas that the prefix router remembers for one part of a prompt."""


def round_robin() -> Router:
    """One replica after the other."""
    turn = count()
    return lambda request, loads: next(turn) % len(loads)


def least_loaded() -> Router:
    """A replica with the fewest requests, and those with equally many in turn, as HAProxy's `leastconn`."""
    turn = count()
    return lambda request, loads: _least(range(len(loads)), loads, next(turn))


def prefix_first(bound: float = 1.25) -> Router:
    """The least loaded of the replicas that were given the longest part of the prompt, unless they have too much work.

    Too much is a load above `bound` times the mean load, counted with this request. Then a shorter part decides, and at
    last the load alone. The router knows what it has sent, and not what replicas have evicted.
    """
    seen: dict[int, OrderedDict[int, None]] = {}
    turn = count()

    def choose(request: Request, loads: Sequence[int]) -> int:
        most = bound * (sum(loads) + 1) / len(loads)
        now, chosen = next(turn), None
        for part in reversed(request.parts):
            free = [replica for replica in seen.get(part.node, ()) if loads[replica] < most]
            if free:
                chosen = _least(free, loads, now)
                break
        if chosen is None:
            chosen = _least(range(len(loads)), loads, now)
        for part in request.parts[:-1]:  # the last part is no other request's
            known = seen.setdefault(part.node, OrderedDict())
            known[chosen] = None
            known.move_to_end(chosen)
            if len(known) > MOST_KNOWN:
                known.popitem(last=False)
        return chosen

    return choose


ROUTERS: dict[str, Callable[[], Router]] = {
    "round robin": round_robin,
    "least loaded": least_loaded,
    "prefix first": prefix_first,
}


def _least(replicas: Sequence[int], loads: Sequence[int], turn: int) -> int:
    return min(replicas, key=lambda replica: (loads[replica], (replica - turn) % len(loads)))
