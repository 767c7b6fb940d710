"""The rules of routing that are compared. They are those of the server: `afterword.engine.replicas.routing`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from afterword.engine.replicas.routing import LeastLoaded, PrefixFirst, RoundRobin, Rule
from bench.cluster.trace import Request

Router = Callable[[Request, Mapping[int, int]], int]
"""Chooses a replica for a request, from the loads of all replicas."""


def router(rule: Rule[int]) -> Router:
    """A rule sees the parts of a prompt but the last, which no other prompt has."""
    return lambda request, loads: rule.choose([part.node for part in request.parts[:-1]], loads)


ROUTERS: dict[str, Callable[[], Router]] = {
    "round robin": lambda: router(RoundRobin()),
    "least loaded": lambda: router(LeastLoaded()),
    "prefix first": lambda: router(PrefixFirst()),
}
