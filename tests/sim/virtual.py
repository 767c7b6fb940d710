"""An event loop whose time passes only when nothing is left to do, and then at once. No sockets, no threads."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


class StuckError(Exception):
    """Nobody will ever do anything again."""


class VirtualLoop(asyncio.BaseEventLoop):
    """Its clock begins at 0; it is the selector that it waits with."""

    def __init__(self) -> None:
        super().__init__()
        self._clock_resolution = 1e-9
        self._selector = self
        self._now = 0.0

    def time(self) -> float:
        return self._now

    def leap(self, seconds: float) -> None:
        """Time passes in which nothing here could run, as when a machine sleeps."""
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
    """Run a coroutine to its end in virtual time. What it leaves behind is cancelled."""
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
