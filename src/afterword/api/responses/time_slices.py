"""Turns of the event loop for work that takes long, such as encoding a large answer.

The work is done in slices. After each, other tasks run; while there are any, the work pauses for longer than its slices
take, so that many large answers together do not slow down the small ones. Alone it does not pause.
"""

from __future__ import annotations

import asyncio
import time

_SLICE_SECONDS = 0.0003  # seconds: an event loop that comes back sooner has no other work
_IDLE_FACTOR = 3  # times as long as a slice, and what other tasks did after it, the work pauses
_MAX_PAUSE_SECONDS = 0.05  # seconds of a pause


class TimeSlices:
    """Owner of the time of one piece of work. `size`: so much work is a slice."""

    def __init__(self, size: int = 1) -> None:
        self._size = size
        self._done = 0
        self._began = time.perf_counter()

    async def yield_after(self, work: int = 1) -> None:
        """So much has been worked on: let other tasks run, if that makes a slice."""
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
