"""Runs a trace through replicas, and sums up what became of its requests."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from bench.cluster.replica import Rates, Replica, Served
from bench.cluster.routing import Router
from bench.cluster.trace import Request, percentile


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures of one run. Times are in seconds from a request's arrival: of its first token, and of its end."""

    router: str
    replicas: int
    requests: int
    cached_share: float
    first_token: tuple[float, float]
    end: tuple[float, float]


def simulate(trace: Sequence[Request], replicas: int, rates: Rates, router: Router) -> list[Served]:
    """What happens to each request, in the order in which they end."""
    machines = [Replica(number, rates) for number in range(replicas)]
    loads = dict.fromkeys(range(replicas), 0)
    served: list[Served] = []
    events: list[tuple[float, int, int]] = []  # time, version of the replica's plan, replica
    versions = [0] * replicas

    def plan(number: int) -> None:
        versions[number] += 1
        if (when := machines[number].next_event()) < float("inf"):
            heapq.heappush(events, (when, versions[number], number))

    def work(until: float) -> None:
        while events and events[0][0] <= until:
            when, version, number = heapq.heappop(events)
            if version == versions[number]:
                served.extend(machines[number].advance(when))
                loads[number] = machines[number].load
                plan(number)

    for request in trace:
        work(request.arrival)
        number = router(request, loads)
        machines[number].advance(request.arrival)
        machines[number].add(request)
        loads[number] = machines[number].load
        plan(number)
    work(float("inf"))
    return served


def summary(router: str, replicas: int, served: Sequence[Served]) -> Summary:
    """The figures of a run: the share of all prompt tokens that were cached, and the 50th and 99th percentiles."""
    firsts, ends = [each.first_token for each in served], [each.end for each in served]
    return Summary(
        router=router,
        replicas=replicas,
        requests=len(served),
        cached_share=sum(each.cached for each in served) / sum(each.request.prompt for each in served),
        first_token=(percentile(firsts, 0.5), percentile(firsts, 0.99)),
        end=(percentile(ends, 0.5), percentile(ends, 0.99)),
    )
