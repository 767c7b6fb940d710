"""How much compute time each client has received beyond its share. Pure: the scheduler passes in all durations.

A chunk of a prompt is computed in its own pass, which can take as long as many decode passes. Without a rule for time,
a client that sends long prompts, or many short ones, could delay all other clients without limit. So the time of each
pass is divided among the clients in its batch. A client owes its time to each other client that holds slots, to at
most `MAX_CREDITORS` of them. The time that the others receive reduces the debt. While a client owes more than
`ALLOWED_EXCESS` and sequences of other clients run, the scheduler computes no chunks of its prompts.

So each of two clients gets half of the time, and each of three clients a third. With more clients, a client still gets
a third for its prompts: with an equal part, a long prompt would wait for minutes behind short responses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from afterword.engine.core.fair_share import share_group

MAX_CREDITORS = 2
"""The most other clients to which a client owes time."""
ALLOWED_EXCESS = 0.1
"""Seconds that a client may owe. Short prompts are computed at once rather than one by one between other passes."""


class ComputeShare:
    """The seconds that each client owes. The lines of all batches count as one client, as in `core.fair_share`."""

    def __init__(self) -> None:
        self._excess: dict[str, float] = {}

    def excess(self, client: str) -> float:
        """Seconds that a client has received beyond its share."""
        return self._excess.get(share_group(client), 0.0)

    def charge(self, entries: Sequence[str], seconds: float, active: Collection[str]) -> None:
        """Charge a pass of `seconds`. `entries`: the client of each batch entry; `active`: clients that hold slots."""
        others = min(len({share_group(client) for client in active}) - 1, MAX_CREDITORS)
        counts = Counter(share_group(client) for client in entries)
        owed = {}
        for client in {*counts, *self._excess} if others else ():
            part = counts[client] / len(entries)
            debt = self._excess.get(client, 0.0) + seconds * (part * others - (1 - part))
            if debt > 0:
                owed[client] = debt
        self._excess = owed
