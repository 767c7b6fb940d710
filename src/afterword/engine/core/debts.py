"""How much of the engine's time each client owes to the others, for which its prompts wait. Pure.

A piece of a prompt has a pass to itself, which may take as long as many passes over running sequences. Without a rule
for time, one client that sends long prompts, or many short ones, would delay all others for as long as it likes.
So the time of each pass is divided among the clients of its rows. A client owes the time that it has had to each other
client that holds sequences, to `MOST_OTHERS` of them at most, and the time that others have had reduces what it owes.
While it owes more than `GRACE` and sequences of other clients run, no piece of its prompts is computed.

So each of two clients gets half of the time, and each of three gets a third. A client among more of them still gets a
third for its prompts: an equal part would leave a long prompt waiting for minutes behind short answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from afterword.engine.core.shares import group

MOST_OTHERS = 2
"""Clients that time is owed to, at most."""
GRACE = 0.1
"""Seconds that a client may owe: short prompts are rather computed at once than one by one between other passes."""


class Debts:
    """Seconds that clients owe to others. All rows of batches together count as one client, as in `core.shares`."""

    def __init__(self) -> None:
        self._owed: dict[str, float] = {}

    def owed(self, client: str) -> float:
        """Seconds."""
        return self._owed.get(group(client), 0.0)

    def spent(self, rows: Sequence[str], seconds: float, holding: Collection[str]) -> None:
        """A pass took so long. `rows` names each row's client, `holding` all clients that hold sequences."""
        others = min(len({group(client) for client in holding}) - 1, MOST_OTHERS)
        counts = Counter(group(client) for client in rows)
        owed = {}
        for client in {*counts, *self._owed} if others else ():
            part = counts[client] / len(rows)
            debt = self._owed.get(client, 0.0) + seconds * (part * others - (1 - part))
            if debt > 0:
                owed[client] = debt
        self._owed = owed
