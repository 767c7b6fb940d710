"""The signals that end a server: the first asks for it, the second insists."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Self

_ENDS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class ShutdownSignals:
    """Hears them while it is open. `first` and `second` happen; `interactive`: the first came from a keyboard."""

    def __init__(self, on_first: Callable[[], None]) -> None:
        self._on_first = on_first
        self._count = [number for number in _ENDS if signal.getsignal(number) != signal.SIG_IGN]  # as nohup has it
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        self.interactive = False

    def __enter__(self) -> Self:
        for number in self._count:
            asyncio.get_running_loop().add_signal_handler(number, self.receive, number)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in self._count:
            asyncio.get_running_loop().remove_signal_handler(number)

    def receive(self, number: signal.Signals) -> None:
        """A signal comes."""
        if self.first.is_set():
            self.second.set()
            return
        self.interactive = number == signal.SIGINT
        self._on_first()
        self.first.set()

    async def run_until_signal(self, work: Coroutine[Any, Any, None]) -> bool:
        """Do some work, unless a signal comes; whether it was done."""
        doing, told = asyncio.create_task(work), asyncio.create_task(self.first.wait())
        try:
            await asyncio.wait((doing, told), return_when=asyncio.FIRST_COMPLETED)
        finally:
            told.cancel()
            if not doing.done():
                doing.cancel()
            await asyncio.gather(doing, told, return_exceptions=True)
        if doing.cancelled():
            return False
        doing.result()
        return True
