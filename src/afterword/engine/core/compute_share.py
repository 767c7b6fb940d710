"""How much of the engine's time each client owes to the others, for which its prompts wait. Pure.

A piece of a prompt has a pass to itself, which may take as long as many passes over running sequences. Without a rule
for time, one client that sends long prompts, or many short ones, would delay all others for as long as it likes.
So the time of each pass is divided among the clients of its rows. A client owes the time that it has had to each other
client that holds sequences, to `MOST_CLIENTS` of them at most, and the time that others have had reduces what it owes.
While it owes more than `ALLOWED_EXCESS` and sequences of other clients run, no piece of its prompts is computed.

So each of two clients gets half of the time, and each of three gets a third. A client among more of them still gets a
third for its prompts: an equal part would leave a long prompt waiting for minutes behind short answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from afterword.engine.core.fair_share import share_group

MOST_CLIENTS = 2
"""Clients that time is owed to, at most."""
ALLOWED_EXCESS = 0.1
"""Seconds that a client may owe: short prompts are rather computed at once than one by one between other passes."""


class ComputeShare:
    """Seconds that clients owe to others. All rows of batches together count as one client, as in `core.shares`."""

    def __init__(self) -> None:
        self._excess: dict[str, float] = {}

    def excess(self, client: str) -> float:
        """Seconds."""
        return self._excess.get(share_group(client), 0.0)

    def spent(self, rows: Sequence[str], seconds: float, holding: Collection[str]) -> None:
        """A pass took so long. `rows` names each row's client, `holding` all clients that hold sequences."""
        others = min(len({share_group(client) for client in holding}) - 1, MOST_CLIENTS)
        counts = Counter(share_group(client) for client in rows)
        owed = {}
        for client in {*counts, *self._excess} if others else ():
            part = counts[client] / len(rows)
            debt = self._excess.get(client, 0.0) + seconds * (part * others - (1 - part))
            if debt > 0:
                owed[client] = debt
        self._excess = owed
