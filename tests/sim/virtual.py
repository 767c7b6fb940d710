"""An event loop with a virtual clock, without sockets and threads.

Time advances only when no task can run; then it advances at once to the next timer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


class StuckError(Exception):
    """No task can run and there is no timer."""


class VirtualLoop(asyncio.BaseEventLoop):
    """The loop is its own selector: waiting advances the clock, which starts at 0 seconds."""

    def __init__(self) -> None:
        super().__init__()
        self._clock_resolution = 1e-9
        self._selector = self
        self._now = 0.0

    def time(self) -> float:
        return self._now

    def jump(self, seconds: float) -> None:
        """Advance the clock without running anything, as when a machine is suspended."""
        self._now += seconds

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise StuckError
        self._now += timeout
        return []

    def _process_events(self, event_list: list[Any]) -> None:
        pass

    def _write_to_self(self) -> None:
        pass


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine to its end in virtual time. Then cancel all remaining tasks."""
    loop = VirtualLoop()
    asyncio.set_event_loop(loop)
    try:
        loop.run_until_complete(main)
    finally:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
        asyncio.set_event_loop(None)
        loop.close()
