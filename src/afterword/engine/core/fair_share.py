"""Which client gets the next slot, and which client holds more than its share. Pure: it counts and decides.

The lines of all batches count as one client, their share group. Together they hold at most half of the slots while a
request that is not of a batch waits. Apart from that, a client waits only while no other client holds at least two
slots more. So a waiting client holds at least its share: the number of slots divided by the number of clients that run
or wait, rounded down. If there are more clients than slots, a share can be 0 slots. A client that holds no slot then
waits for `TURN_PASSES` forward passes; after that the scheduler preempts a sequence of another client for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, KeysView

from afterword.engine.protocol import BATCH_CLIENT

TURN_PASSES = 128
"""If there are more clients than slots: forward passes that a client waits for its turn, and tokens of one turn."""


class FairShare:
    """How many slots each client holds, and since which pass each client waits for more."""

    def __init__(self, slots: int) -> None:
        self._half = max(1, slots // 2)
        self._held: Counter[str] = Counter()  # by client
        self._held_by_group: Counter[str] = Counter()
        self._waiting_since: dict[str, int] = {}  # by client, in order of their turns

    def acquire(self, client: str) -> None:
        """Count a slot that a client got."""
        self._held[client] += 1
        self._held_by_group[share_group(client)] += 1

    def release(self, client: str) -> None:
        """Count a slot that a client gave back."""
        for counts, name in ((self._held, client), (self._held_by_group, share_group(client))):
            counts[name] -= 1
            if not counts[name]:
                del counts[name]

    def set_waiting(self, clients: Iterable[str], now: int) -> None:
        """Set the clients that want more slots; no others do. `now`: the number of forward passes so far."""
        waiting = dict.fromkeys(clients)
        since = {client: at for client, at in self._waiting_since.items() if client in waiting}
        self._waiting_since = since | {client: now for client in waiting if client not in since}

    def served(self, client: str) -> None:
        """Note that a client has had its turn. If it wants more slots, it waits anew, behind all others."""
        self._waiting_since.pop(client, None)

    @property
    def holding(self) -> KeysView[str]:
        """The clients that hold slots."""
        return self._held.keys()

    def load(self, client: str) -> tuple[int, int]:
        """The number of slots that a client's group holds, and the number that the client itself holds."""
        return self._held_by_group[share_group(client)], self._held[client]

    def order(self, has_free_slot: bool) -> list[str]:
        """The waiting clients: first those that hold fewest slots; of equals, the one served longest ago.

        Without a free slot, a slot is taken from a client that exceeds its share. So when the batches hold their half,
        a waiting batch can get a slot of another batch, but no free slot.
        """
        clients: Iterable[str] = self._waiting_since
        if self._held_by_group[BATCH_CLIENT] >= self._half and any(
            share_group(client) != BATCH_CLIENT for client in clients
        ):
            clients = [
                client
                for client in clients
                if share_group(client) != BATCH_CLIENT or not (has_free_slot or self._is_even(client))
            ]
        return sorted(clients, key=self.load)

    def _is_even(self, client: str) -> bool:
        """Whether no client of the same group exceeds its share compared with this one."""
        return not any(self.exceeds(other, client) for other in self._held if share_group(other) == share_group(client))

    @property
    def is_uneven(self) -> bool:
        """Whether any client may hold more than its share. A quick check, made before each pass."""
        if not self._waiting_since or self._held.keys() == self._waiting_since.keys() == {
            next(iter(self._waiting_since))
        }:
            return False
        return max(self._held_by_group.values(), default=0) >= 2

    def has_overdue(self, now: int) -> bool:
        """Whether any client has waited for at least `TURN_PASSES` passes."""
        return bool(self._waiting_since) and now - next(iter(self._waiting_since.values())) >= TURN_PASSES

    def comparison_key(self, client: str) -> tuple[int, int, bool]:
        """A key for comparing clients. The same holders exceed their share compared with all clients of equal keys.

        Of clients with equal keys, the one that has waited longest is overdue first.
        """
        return *self.load(client), client.endswith(BATCH_CLIENT)

    def exceeds(self, holder: str, client: str) -> bool:
        """Whether `holder` holds more than its share, compared with the waiting `client`."""
        holder_group, client_group = share_group(holder), share_group(client)
        if holder_group == client_group:
            return self._held[holder] >= self._held[client] + 2
        above_half = holder_group == BATCH_CLIENT and self._held_by_group[BATCH_CLIENT] > self._half
        return above_half or self._held_by_group[holder_group] >= self._held_by_group[client_group] + 2

    def overdue(self, client: str, now: int) -> bool:
        """Whether a client holds nothing and has waited so long that another client's sequence is preempted."""
        return not self.load(client)[0] and now - self._waiting_since[client] >= TURN_PASSES

    def should_yield_slot(self, client: str) -> bool:
        """Whether a slot that a client's sequence leaves goes to another client.

        If the slot is the client's last one, clients take turns.
        """
        return any(other != client and self._comes_first(other, client) for other in self._waiting_since)

    def _comes_first(self, other: str, client: str) -> bool:
        if share_group(other) == share_group(client):
            return self._held[other] < max(self._held[client] - 1, 1)
        left = self._held_by_group[share_group(client)] - 1
        return self._held_by_group[share_group(other)] < max(left, 1) or (
            share_group(client) == BATCH_CLIENT and left >= self._half
        )


def share_group(client: str) -> str:
    """The name under which a client's slots are counted: its own, or one common name for the lines of all batches."""
    return BATCH_CLIENT if client.endswith(BATCH_CLIENT) else client
