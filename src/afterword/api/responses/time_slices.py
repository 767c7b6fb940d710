"""Cooperative scheduling of long work on the event loop, such as encoding a large response.

The work runs in slices, and other tasks run after each slice. If there are other tasks, the work then pauses for longer
than its slice took, so that many large responses do not slow down small ones. Without other tasks it does not pause.
"""

from __future__ import annotations

import asyncio
import time

_SLICE_SECONDS = 0.0003  # seconds; if `sleep(0)` returns sooner, the event loop has no other work
_IDLE_FACTOR = 3  # pause, as a multiple of the time of a slice and of the other tasks after it
_MAX_PAUSE_SECONDS = 0.05  # seconds; the longest pause


class TimeSlices:
    """The time slices of one piece of work. `size`: units of work, such as tokens, in a slice."""

    def __init__(self, size: int = 1) -> None:
        self._size = size
        self._done = 0
        self._began = time.perf_counter()

    async def yield_after(self, work: int = 1) -> None:
        """Count `work` units as done. If they complete a slice, let other tasks run."""
        self._done += work
        if self._done < self._size:
            return
        worked = time.perf_counter()
        await asyncio.sleep(0)
        back = time.perf_counter()
        if back - worked > _SLICE_SECONDS:
            await asyncio.sleep(min(_IDLE_FACTOR * (back - self._began), _MAX_PAUSE_SECONDS))
            back = time.perf_counter()
        self._done, self._began = 0, back
