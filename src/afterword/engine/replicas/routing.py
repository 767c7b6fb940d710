"""The rules by which jobs are given to engine replicas. `bench/cluster` simulates these same rules.

A rule sees what a prompt shares with others as a list of keys, from the beginning of the prompt: equal keys mean equal
prompts up to that place. It is deterministic, and knows only what it has decided before and the loads that it is given.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from hashlib import blake2b
from typing import Generic, Protocol, TypeVar

R = TypeVar("R", bound=Hashable)

BLOCK = 32
"""Tokens of a block. A shorter rest of a prompt is no block, so it is not compared."""
MOST_BLOCKS = 4096
"""Blocks of a prompt that are compared: the first 131,072 tokens."""
BOUND = 1.25
"""A replica gets no job while its load is at least this many times the mean load, counted with this job."""
MOST_KEYS = 2**17
"""Keys that the prefix rule remembers. The one that was unused for the longest time is forgotten."""
MOST_KNOWN = 64
"""Replicas that the prefix rule remembers for one key."""


class Rule(Protocol[R]):
    """Chooses a replica for each job. `loads`: the load of each replica that may be chosen; there is at least one."""

    def choose(self, keys: Sequence[Hashable], loads: Mapping[R, int]) -> R:
        """The replica for a prompt with these keys."""
        ...

    def forget(self, replica: R) -> None:
        """The replica has ended, and its caches with it."""
        ...


class _InTurn(Generic[R]):
    """Prefers the replica that was chosen the longest time ago; of new ones the first."""

    def __init__(self) -> None:
        self._turns: dict[R, int] = {}
        self._turn = 0

    def take(self, replicas: Sequence[R], loads: Mapping[R, int] | None = None) -> R:
        """One of the replicas with the lowest load; without `loads` one of all."""
        chosen = min(replicas, key=lambda each: (loads[each] if loads else 0, self._turns.get(each, 0)))
        self._turn += 1
        self._turns[chosen] = self._turn
        return chosen

    def forget(self, replica: R) -> None:
        self._turns.pop(replica, None)


class RoundRobin(Generic[R]):
    """One replica after the other."""

    def __init__(self) -> None:
        self._in_turn = _InTurn[R]()

    def choose(self, keys: Sequence[Hashable], loads: Mapping[R, int]) -> R:
        """See `Rule.choose`."""
        return self._in_turn.take(list(loads))

    def forget(self, replica: R) -> None:
        """See `Rule.forget`."""
        self._in_turn.forget(replica)


class LeastLoaded(Generic[R]):
    """A replica with the lowest load, and those with equal loads in turn, as HAProxy's `leastconn`."""

    def __init__(self) -> None:
        self._in_turn = _InTurn[R]()

    def choose(self, keys: Sequence[Hashable], loads: Mapping[R, int]) -> R:
        """See `Rule.choose`."""
        return self._in_turn.take(list(loads), loads)

    def forget(self, replica: R) -> None:
        """See `Rule.forget`."""
        self._in_turn.forget(replica)


class PrefixFirst(Generic[R]):
    """The least loaded of the replicas that were given the longest part of the prompt, unless they have too much work.

    Too much is `bound`, see `BOUND`. Then a shorter part decides, and at last the load alone. The rule knows what it
    has sent, and not what replicas have evicted.
    """

    def __init__(self, bound: float = BOUND, most_keys: int = MOST_KEYS) -> None:
        self._bound, self._most_keys = bound, most_keys
        self._known: OrderedDict[Hashable, OrderedDict[R, None]] = OrderedDict()
        self._in_turn = _InTurn[R]()

    def __len__(self) -> int:
        return len(self._known)

    def choose(self, keys: Sequence[Hashable], loads: Mapping[R, int]) -> R:
        """See `Rule.choose`."""
        most = self._bound * (sum(loads.values()) + 1) / len(loads)
        chosen = self._in_turn.take(self._with_prefix(keys, loads, most) or list(loads), loads)
        for key in reversed(keys):  # so that a key is forgotten before those in front of it
            known = self._known.setdefault(key, OrderedDict())
            known[chosen] = None
            known.move_to_end(chosen)
            self._known.move_to_end(key)
            if len(known) > MOST_KNOWN:
                known.popitem(last=False)
        while len(self._known) > self._most_keys:
            self._known.popitem(last=False)
        return chosen

    def forget(self, replica: R) -> None:
        """See `Rule.forget`."""
        self._in_turn.forget(replica)
        for key, known in list(self._known.items()):
            known.pop(replica, None)
            if not known:
                del self._known[key]

    def _with_prefix(self, keys: Sequence[Hashable], loads: Mapping[R, int], most: float) -> list[R]:
        """The replicas below `most` that have the longest part of the prompt which any of them has."""
        for key in reversed(keys):
            free = [each for each in self._known.get(key, ()) if each in loads and loads[each] < most]
            if free:
                return free
        return []


RULES: dict[str, Callable[[], Rule[str]]] = {"prefix": PrefixFirst, "round-robin": RoundRobin}
"""The rules that `afterword deploy` offers, by the value of `routing`."""


def block_keys(namespace: str, prompt: Sequence[int]) -> list[bytes]:
    """A key for each whole block of a prompt: a hash of the namespace and of all tokens up to the block's end."""
    data = array("i", prompt[: BLOCK * MOST_BLOCKS])
    size = BLOCK * data.itemsize
    view = memoryview(data.tobytes())
    found, before = [], namespace.encode("utf-8", "surrogatepass")
    for end in range(size, len(view) + 1, size):
        before = blake2b(before + view[end - size : end], digest_size=16).digest()
        found.append(before)
    return found
