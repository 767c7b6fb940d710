"""Which client gets the next sequence, and which client holds more than its share. Pure: it counts, and decides.

All rows of batches together count as one client here, their group, and hold at most half of the sequences while a
request waits that is not of a batch. Otherwise a client waits only while no other holds two sequences more than it
does. So a client that waits holds at least its share: the sequences divided by the clients that run or wait, rounded
down. A client that holds nothing and finds nothing to be shared (there are more clients than sequences) waits for
`TURN_PASSES` passes, and then one of the other clients has to give way to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, KeysView

from afterword.engine.protocol import BATCH_CLIENT

TURN_PASSES = 128
"""While there are more clients than sequences: passes that a client waits for its turn, and tokens it then gets."""


class FairShare:
    """How many sequences each client holds, and since which pass those that want more have waited for their turn."""

    def __init__(self, sequences: int) -> None:
        self._half = max(1, sequences // 2)
        self._held: Counter[str] = Counter()  # by client
        self._held_by_group: Counter[str] = Counter()
        self._waiting_since: dict[str, int] = {}  # by client, in order of their turns

    def acquire(self, client: str) -> None:
        """A client got a sequence."""
        self._held[client] += 1
        self._held_by_group[share_group(client)] += 1

    def release(self, client: str) -> None:
        """A client left a sequence."""
        for counts, name in ((self._held, client), (self._held_by_group, share_group(client))):
            counts[name] -= 1
            if not counts[name]:
                del counts[name]

    def want(self, clients: Iterable[str], now: int) -> None:
        """These clients want more, and no others. `now` counts passes."""
        wanting = dict.fromkeys(clients)
        since = {client: at for client, at in self._waiting_since.items() if client in wanting}
        self._waiting_since = since | {client: now for client in wanting if client not in since}

    def served(self, client: str) -> None:
        """A client has had its turn: if it wants more, it waits anew, behind all others."""
        self._waiting_since.pop(client, None)

    @property
    def holding(self) -> KeysView[str]:
        """The clients that hold sequences."""
        return self._held.keys()

    def load(self, client: str) -> tuple[int, int]:
        """The sequences that a client's group holds, and those that it holds itself."""
        return self._held_by_group[share_group(client)], self._held[client]

    def order(self, room: bool) -> list[str]:
        """Clients that want more: first those that hold least, and of equals the one whose turn was longest ago.

        `room`: a sequence is unused. Else one is taken from a client that exceeds its share; so a batch that waits can
        get one of another batch when batches hold their half, but no unused one.
        """
        clients: Iterable[str] = self._waiting_since
        if self._held_by_group[BATCH_CLIENT] >= self._half and any(
            share_group(client) != BATCH_CLIENT for client in clients
        ):
            clients = [
                client
                for client in clients
                if share_group(client) != BATCH_CLIENT or not (room or self._is_even(client))
            ]
        return sorted(clients, key=self.load)

    def _is_even(self, client: str) -> bool:
        """Whether no client of the same group exceeds its share beside this one."""
        return not any(self.exceeds(other, client) for other in self._held if share_group(other) == share_group(client))

    @property
    def is_uneven(self) -> bool:
        """Whether a client may hold more than its share: quick to tell, for each pass."""
        if not self._waiting_since or self._held.keys() == self._waiting_since.keys() == {
            next(iter(self._waiting_since))
        }:
            return False
        return max(self._held_by_group.values(), default=0) >= 2

    def has_overdue(self, now: int) -> bool:
        """Whether any client has waited for a turn, or for more, as long as for a turn."""
        return bool(self._waiting_since) and now - next(iter(self._waiting_since.values())) >= TURN_PASSES

    def standing(self, client: str) -> tuple[int, int, bool]:
        """Clients with the same standing exceed the same others; the one that has waited longest is overdue first."""
        return *self.load(client), client.endswith(BATCH_CLIENT)

    def exceeds(self, holder: str, client: str) -> bool:
        """Whether a client holds more than its share, compared with one that waits."""
        ours, theirs = share_group(holder), share_group(client)
        if ours == theirs:
            return self._held[holder] >= self._held[client] + 2
        above_half = ours == BATCH_CLIENT and self._held_by_group[BATCH_CLIENT] > self._half
        return above_half or self._held_by_group[ours] >= self._held_by_group[theirs] + 2

    def overdue(self, client: str, now: int) -> bool:
        """Whether a client that holds nothing has waited for so long that another one has to give way."""
        return not self.load(client)[0] and now - self._waiting_since[client] >= TURN_PASSES

    def should_yield_slot(self, client: str) -> bool:
        """Whether a sequence that a client is done with goes to another client. The last one does in turns."""
        return any(other != client and self._comes_first(other, client) for other in self._waiting_since)

    def _comes_first(self, other: str, client: str) -> bool:
        if share_group(other) == share_group(client):
            return self._held[other] < max(self._held[client] - 1, 1)
        left = self._held_by_group[share_group(client)] - 1
        return self._held_by_group[share_group(other)] < max(left, 1) or (
            share_group(client) == BATCH_CLIENT and left >= self._half
        )


def share_group(client: str) -> str:
    """What a client's sequences are counted under: its own name, or one name for all batches."""
    return BATCH_CLIENT if client.endswith(BATCH_CLIENT) else client
