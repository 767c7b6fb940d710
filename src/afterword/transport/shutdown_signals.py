"""The signals SIGTERM, SIGINT and SIGHUP: the first starts a graceful shutdown, the second ends it at once.

`ShutdownSignals` owns the process's handlers for them while it is entered. It runs on the event loop.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class ShutdownSignals:
    """Handles the signals as a context manager. `on_first` is called at the first signal.

    The events `first` and `second` are set at the first and the second signal. `interactive`: the first signal was
    SIGINT, as Ctrl+C sends it.
    """

    def __init__(self, on_first: Callable[[], None]) -> None:
        self._on_first = on_first
        # a signal that was ignored at the start stays ignored, such as SIGHUP under nohup
        self._handled = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        self.interactive = False

    def __enter__(self) -> Self:
        for number in self._handled:
            asyncio.get_running_loop().add_signal_handler(number, self.receive, number)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in self._handled:
            asyncio.get_running_loop().remove_signal_handler(number)

    def receive(self, number: signal.Signals) -> None:
        if self.first.is_set():
            self.second.set()
            return
        self.interactive = number == signal.SIGINT
        self._on_first()
        self.first.set()

    async def run_until_signal(self, work: Coroutine[Any, Any, None]) -> bool:
        """Run `work` until it ends or a signal comes; a signal cancels it. Returns whether `work` has ended by itself.

        Raises what `work` raises.
        """
        working, signalled = asyncio.create_task(work), asyncio.create_task(self.first.wait())
        try:
            await asyncio.wait((working, signalled), return_when=asyncio.FIRST_COMPLETED)
        finally:
            signalled.cancel()
            if not working.done():
                working.cancel()
            await asyncio.gather(working, signalled, return_exceptions=True)
        if working.cancelled():
            return False
        working.result()
        return True
