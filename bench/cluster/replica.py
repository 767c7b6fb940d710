"""One replica: slots, a queue, a prefix cache, and how long its work takes. Times are in seconds."""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from dataclasses import dataclass

from bench.cluster.trace import Part, Request


@dataclass(frozen=True, slots=True)
class Rates:
    """What a replica can do.

    - `slots`: sequences that run together; later requests wait in their order of arrival.
    - `cache`: tokens of prefixes that stay in memory; the prefix that was unused for the longest time is evicted. 0:
      the slots are the cache, see `SlotCache`.
    - `prefill`: tokens of prompts a second.
    - `step`, `step_each`: seconds of a decode step: a constant part, and a part for each sequence.
    """

    slots: int = 16
    cache: int = 32_000
    prefill: float = 8000.0
    step: float = 0.020
    step_each: float = 0.0005


@dataclass(frozen=True, slots=True)
class Served:
    """What happened to one request: its replica, and the times from its arrival."""

    request: Request
    replica: int
    cached: int
    first_token: float
    end: float


class PrefixCache:
    """The prefixes of one replica, the least recently used first. A part is cached only with all parts before it."""

    def __init__(self, capacity: int) -> None:
        self._capacity, self._parts, self._held = capacity, OrderedDict[int, int](), 0

    @property
    def held(self) -> int:
        """Tokens of all cached parts."""
        return self._held

    def use(self, request: Request) -> int:
        """The cached tokens of a prompt, all of whose parts are cached from now on as far as they fit."""
        parts, cached = request.parts, 0
        for part in parts:
            if part.node not in self._parts:
                break
            cached += part.tokens
        for part in reversed(parts):  # so that a part is evicted before the parts in front of it
            self._held += part.tokens if part.node not in self._parts else 0
            self._parts[part.node] = part.tokens
            self._parts.move_to_end(part.node)
        while self._held > self._capacity:
            _, tokens = self._parts.popitem(last=False)
            self._held -= tokens
        return cached

    def end(self, request: Request) -> None:
        """Nothing: what is cached does not depend on the ends of requests."""


@dataclass(slots=True, eq=False)
class _Slot:
    parts: tuple[Part, ...] = ()
    tokens: int = 0
    used: int = 0
    busy: bool = False


class SlotCache:
    """The slots of `afterword.engine.core.prefix_cache`, with what ended sequences have left in them.

    A prompt continues in the slot that has its prefix if that is free and less than `LOST` tokens are deleted.
    Otherwise the prefix is copied to the free slot that was unused for the longest time, whose content is lost.
    """

    LOST = 16

    def __init__(self, slots: int) -> None:
        self._slots, self._clock = [_Slot() for _ in range(slots)], 0

    def use(self, request: Request) -> int:
        """The cached tokens of a prompt, which has a slot from now on."""
        self._clock += 1
        cached, source = max(
            ((_shared(slot.parts, request.parts), slot) for slot in self._slots), key=lambda one: one[0]
        )
        oldest = min((slot for slot in self._slots if not slot.busy), key=lambda slot: (slot.used, slot.tokens))
        in_place = cached and not source.busy and source.tokens - cached < self.LOST
        target = source if in_place else oldest
        source.used = self._clock if cached else source.used
        target.parts, target.tokens = request.parts, request.prompt
        target.used, target.busy = self._clock, True
        return cached

    def end(self, request: Request) -> None:
        """The sequence has ended; its slot keeps it."""
        self._clock += 1
        slot = next(slot for slot in self._slots if slot.parts == request.parts)
        slot.tokens, slot.used, slot.busy = request.prompt + request.output - 1, self._clock, False


def _shared(held: tuple[Part, ...], wanted: tuple[Part, ...]) -> int:
    tokens = 0
    for one, other in zip(held, wanted, strict=False):
        if one.node != other.node:
            break
        tokens += one.tokens
    return tokens


class Replica:
    """The work of one replica. One prompt is computed at a time; while sequences decode, each gets half of the time."""

    def __init__(self, number: int, rates: Rates) -> None:
        self._number, self._rates = number, rates
        self._cache = PrefixCache(rates.cache) if rates.cache else SlotCache(rates.slots)
        self._waiting: deque[Request] = deque()
        self._prefilling: deque[list[float | Request]] = deque()  # tokens left, request, cached tokens
        self._decoding: list[tuple[float, int, Request, int, float]] = []  # the heap of ends, in decoded tokens
        self._decoded = 0.0  # tokens that a sequence has got which has decoded from the start
        self._now, self._order = 0.0, 0
        self.load = 0  # requests that are here: waiting or running

    def add(self, request: Request) -> None:
        """Take a request at the current time, which must be that of its arrival."""
        self.load += 1
        self._waiting.append(request)
        self._fill()

    def next_event(self) -> float:
        """When something changes next; infinite if the replica has nothing to do."""
        times = []
        if self._prefilling:
            times.append(float(self._prefilling[0][0]) / self._prefill_rate())  # type: ignore[arg-type]
        if self._decoding:
            times.append(max(0.0, self._decoding[0][0] - self._decoded) / self._decode_rate())
        return self._now + min(times) if times else float("inf")

    def advance(self, now: float) -> list[Served]:
        """Work until a time that is not after the next event. Returns the requests that have ended then."""
        passed, due = now - self._now, now >= self.next_event()
        prefilled, decoded = passed * self._prefill_rate(), passed * self._decode_rate()
        self._now = now
        if self._prefilling:
            self._prefilling[0][0] -= prefilled  # type: ignore[operator]
        if self._decoding:
            self._decoded += decoded
        return self._finish() if due else []

    def _finish(self) -> list[Served]:
        """End what is due. Less than a millionth of a token that is left is an error of rounding."""
        ended = []
        if self._prefilling and self._prefilling[0][0] <= 1e-6:  # type: ignore[operator]
            _, request, cached = self._prefilling.popleft()
            assert isinstance(request, Request)
            self._order += 1
            end = self._decoded + request.output
            heapq.heappush(self._decoding, (end, self._order, request, int(cached), self._now))  # type: ignore[arg-type]
        while self._decoding and self._decoding[0][0] <= self._decoded + 1e-6:
            _, _, request, cached, first = heapq.heappop(self._decoding)
            self.load -= 1
            self._cache.end(request)
            ended.append(Served(request, self._number, cached, first - request.arrival, self._now - request.arrival))
        self._fill()
        return ended

    def _fill(self) -> None:
        while self._waiting and len(self._prefilling) + len(self._decoding) < self._rates.slots:
            request = self._waiting.popleft()
            cached = self._cache.use(request)
            self._prefilling.append([max(1.0, request.prompt - cached), request, cached])

    def _prefill_rate(self) -> float:
        return self._rates.prefill * (0.5 if self._decoding else 1.0)

    def _decode_rate(self) -> float:
        step = self._rates.step + self._rates.step_each * len(self._decoding)
        return (0.5 if self._prefilling else 1.0) / step
