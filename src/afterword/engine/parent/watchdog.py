"""Whether an engine makes progress, and when one that died is started again. Pure: time is what it is told.

A hung engine shows in one of three ways. It is silent: its process pulses every second, computing or not, unless it is
stopped. Or it pulses, there is work, and no pass ends: then it is given as long as its passes are known to take, since
a big model on a small machine may take minutes for one. Or nothing is done of a text, short or long, for longer than
any part of a text of that length takes.

Only time in which it could be heard counts: a tick counts as a short one however late it comes, so that this process,
stopped or starved, does not take its own silence for the engine's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from afterword.engine import messages

TICK_SECONDS = 0.5
"""Seconds between two looks."""

_MAX_SLOWDOWN = 5.0  # times as long as the longest pass so far is still no hang
_FIRST_PASS = 600.0  # seconds, where no pass has been measured yet: the weights may still come from a slow disk
_TEXTS = 4.0  # times the limit for silence are given to a part of a text, and as many again for each _MORE characters
_MORE = 2**18

_CRASHES, _WINDOW = 5, 300.0  # so many crashes in so many seconds, and it is not the moment's fault
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds before another attempt to start


@dataclass(slots=True)
class Watchdog:
    """What one engine after the other was heard to do. `limit`: seconds of silence that are a hang.

    `largest` and `slowest` outlive an engine: the next one computes the same model on the same machine.
    """

    limit: float
    largest: int = 0
    slowest: float = 0.0
    _size: int = 0  # tokens of the pass under way
    _passes: int = 0
    _silent: float = 0.0
    _stuck: float = 0.0
    _parts: tuple[int, ...] = (0, 0)
    _silent_texts: list[float] = field(default_factory=lambda: [0.0, 0.0])  # short texts, long texts

    def reset(self) -> None:
        """Another engine is being started."""
        self._size = self._passes = 0
        self._silent = self._stuck = 0.0
        self._parts, self._silent_texts = (0, 0), [0.0, 0.0]

    def record_message(self, message: messages.ServerMessage) -> None:
        """Something came from the engine."""
        self._silent = 0.0
        match message:
            case messages.Heartbeat():
                self.largest, self.slowest = max(self.largest, message.largest), max(self.slowest, message.slowest)
                self._size = message.tokens
                if message.passes != self._passes:
                    self._passes, self._stuck = message.passes, 0.0
                for lane, (before, parts) in enumerate(zip(self._parts, message.parts, strict=True)):
                    if parts != before:
                        self._silent_texts[lane] = 0.0
                self._parts = message.parts
            case messages.PassDone() | messages.ModelReady():
                self._stuck = 0.0
            case messages.TextTokens():
                self._silent_texts[message.long] = 0.0

    def is_hanging(self, seconds: float, jobs: bool, texts: Sequence[int] = (0, 0)) -> bool:
        """Whether it hangs, `seconds` after the last look; whether there were jobs to work on, and how many characters
        the short text and the long one have that it is working on (0: there is none)."""
        seconds = min(seconds, 2 * TICK_SECONDS)
        self._silent += seconds
        self._stuck = self._stuck + seconds if jobs else 0.0
        self._silent_texts = [
            spent + seconds if size else 0.0 for spent, size in zip(self._silent_texts, texts, strict=True)
        ]
        return (
            self._silent > self.limit
            or self._stuck > max(self.limit, self._longest())
            or any(
                spent > self.limit * _TEXTS * (1 + size / _MORE)
                for spent, size in zip(self._silent_texts, texts, strict=True)
            )
        )

    def _longest(self) -> float:
        """How long the pass under way may take: at most linearly longer than the longest, where it is larger."""
        if not self._size:
            return 0.0
        if not self.largest:
            return _FIRST_PASS
        return _MAX_SLOWDOWN * self.slowest * max(1.0, self._size / self.largest)


class RestartPolicy:
    """When to start an engine again. The first time at once: a pause helps only against dying in a circle."""

    def __init__(self) -> None:
        self._crashes: deque[float] = deque(maxlen=16)

    def next_delay(self, now: float) -> float:
        """An engine has died, or could not be started: seconds to wait before the next attempt."""
        self._crashes.append(now)
        self._forget(now)
        again = len(self._crashes) - 1
        return min(_FIRST_PAUSE * 2.0 ** (again - 1), _LONGEST_PAUSE) if again else 0.0

    def record_success(self) -> None:
        """It has finished a job: it can do its work, whatever kills it now and then."""
        self._crashes.clear()

    def is_failing(self, now: float) -> bool:
        """Whether it has died too often to hope for the next time."""
        self._forget(now)
        return len(self._crashes) >= _CRASHES

    def _forget(self, now: float) -> None:
        while self._crashes and now - self._crashes[0] > _WINDOW:
            self._crashes.popleft()
