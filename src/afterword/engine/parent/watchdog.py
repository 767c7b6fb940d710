"""Decides whether a worker hangs.

Pure: callers pass in the time; this module reads no clock and starts no process. The watchdog detects three cases:

1. No message arrives. The worker sends a heartbeat every second, also while it computes, unless it is stopped.
2. Heartbeats arrive and there are jobs, but no forward pass ends. The limit depends on the passes measured so far,
   because one pass of a large model on a small machine may take minutes.
3. A tokenizer thread finishes no part of its text for longer than any part of a text of that length takes.

Each tick counts as at most two tick intervals, however late it comes. Otherwise a server process that was stopped or
starved would take its own pause for the worker's silence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from afterword.engine import messages

TICK_SECONDS = 0.5
"""Seconds between two checks."""

_MAX_SLOWDOWN = 5.0  # a pass may take this many times as long as the longest pass so far
_FIRST_PASS = 600.0  # limit in seconds before any pass is measured: the weights may still be read from a slow disk
# A part of a text may take _TEXT_FACTOR times the silence limit, and the same again for each _TEXT_UNIT characters.
_TEXT_FACTOR = 4.0
_TEXT_UNIT = 2**18


@dataclass(slots=True)
class Watchdog:
    """Tracks the messages of one worker after the other. A worker hangs after `limit` seconds without a message.

    `largest` (tokens) and `slowest` (seconds) describe the passes measured so far. They survive a restart, because the
    next worker computes the same model on the same machine.
    """

    limit: float
    largest: int = 0
    slowest: float = 0.0
    _size: int = 0  # tokens of the current pass; 0: none
    _passes: int = 0
    _silent: float = 0.0  # seconds since the last message
    _stuck: float = 0.0  # seconds with jobs and without a finished pass
    _parts: tuple[int, ...] = (0, 0)  # parts of short and long texts tokenized so far
    _silent_texts: list[float] = field(default_factory=lambda: [0.0, 0.0])  # seconds without progress: short, long

    def reset(self) -> None:
        """Prepare for a new worker."""
        self._size = self._passes = 0
        self._silent = self._stuck = 0.0
        self._parts, self._silent_texts = (0, 0), [0.0, 0.0]

    def record_message(self, message: messages.ServerMessage) -> None:
        self._silent = 0.0
        match message:
            case messages.Heartbeat():
                self.largest, self.slowest = max(self.largest, message.largest), max(self.slowest, message.slowest)
                self._size = message.tokens
                if message.passes != self._passes:
                    self._passes, self._stuck = message.passes, 0.0
                for queue, (before, parts) in enumerate(zip(self._parts, message.parts, strict=True)):
                    if parts != before:
                        self._silent_texts[queue] = 0.0
                self._parts = message.parts
            case messages.PassDone() | messages.ModelReady():
                self._stuck = 0.0
            case messages.TextTokens():
                self._silent_texts[message.long] = 0.0

    def is_hanging(self, seconds: float, jobs: bool, texts: Sequence[int] = (0, 0)) -> bool:
        """Advance the time by `seconds` since the last call and return whether the worker hangs.

        `jobs`: whether the worker had jobs to compute. `texts`: characters of the short and of the long text that it
        is tokenizing, 0 for none.
        """
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
                spent > self.limit * _TEXT_FACTOR * (1 + size / _TEXT_UNIT)
                for spent, size in zip(self._silent_texts, texts, strict=True)
            )
        )

    def _longest(self) -> float:
        """Seconds that the current pass may take: proportionally more if it is larger than the largest so far."""
        if not self._size:
            return 0.0
        if not self.largest:
            return _FIRST_PASS
        return _MAX_SLOWDOWN * self.slowest * max(1.0, self._size / self.largest)
