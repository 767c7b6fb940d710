"""The steps of a request between its jobs and its reader. The engine is paused while too many of them wait.

A client that reads too slowly ends its request, since the steps that wait for it take memory. Only the time for which
the server waits for the client counts: encoding a large response can take longer on a busy machine. Everything runs on
the event loop's thread.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from afterword.engine.protocol import JobHandle, Step
from afterword.errors import ReaderTooSlow

MAX_UNREAD_BYTES = 16 * 2**20
"""Bytes of steps that may wait for the reader of a response. Above it, the engine is paused for that request. Steps
that the worker has already sent (some megabytes at most) still arrive."""

READER_SECONDS = 60.0
"""Seconds of waiting for the client in which a reader that keeps the engine paused must take `READ_BYTES`."""

READ_BYTES = 4 * 2**20
"""Bytes of the response: 70 KB in a second. 16 MiB of steps with a whole vocabulary are 40 MiB."""


class Reader:
    """How much of a response its client has taken, and how long the server has waited for that. The sender owns it.

    `needs_no_more`: whether it needs no more of the choice with this index. It is called for each choice that had a
    delta. `sent`: bytes of the response.
    """

    __slots__ = ("_clock", "_since", "_waited", "needs_no_more", "sent")

    def __init__(self, needs_no_more: Callable[[int], bool] = lambda _: False) -> None:
        self.needs_no_more = needs_no_more
        self._clock = asyncio.get_running_loop().time
        self._waited = 0.0
        self._since: float | None = None  # set while a part of the response is sent
        self.sent = 0

    @property
    def waited(self) -> float:
        """Seconds for which sending has waited for the client so far."""
        return self._waited + (0.0 if self._since is None else self._clock() - self._since)

    @contextmanager
    def sending(self, size: int) -> Iterator[None]:
        """A part of the response of `size` bytes is sent in this context, which ends when it can be written."""
        self._since = self._clock()
        try:
            yield
            self.sent += size
        finally:
            self._waited, self._since = self.waited, None


class StepQueue:
    """The steps of all jobs of a request that its reader has not taken, in order of arrival.

    The engine is paused while they take too much memory. A reader that keeps the engine paused and takes less than
    `READ_BYTES` in `READER_SECONDS` of waiting for it gets the steps in the queue and then `ReaderTooSlow`.

    `count` has a function for each job, which is called with each step when it arrives.
    """

    def __init__(self, handles: Sequence[JobHandle], count: Sequence[Callable[[Step], None]], reader: Reader) -> None:
        self._handles = handles
        self._count = count
        self._reader = reader
        self._running = len(handles)
        self._items: deque[tuple[int, Step, int] | Exception | None] = deque()  # index of the job, step, its size
        self._arrival: asyncio.Future[None] | None = None  # set while the reader waits
        self._size = 0
        self._timer: asyncio.TimerHandle | None = None  # set while the engine is paused
        self._waited = 0.0  # `waited` and `sent` of the reader when its time began
        self._sent = 0
        for index, handle in enumerate(handles):
            handle.deliver_to(partial(self._receive, index))

    def _receive(self, index: int, item: Step | Exception | None) -> None:
        """Take a step of a job, its error, or None at its end."""
        if not isinstance(item, Step):
            self._append(item)
            return
        self._count[index](item)
        size = item.size
        self._append((index, item, size))
        self._size += size
        if self._size > MAX_UNREAD_BYTES and self._timer is None:
            self._begin_time()
            for handle in self._handles:
                handle.pause()

    def _append(self, item: tuple[int, Step, int] | Exception | None) -> None:
        self._items.append(item)
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    async def next(self) -> tuple[int, Step] | None:
        """The next step with the index of its job; None when all jobs have ended. Raises the first error of a job."""
        while self._running:
            while not self._items:
                self._arrival = asyncio.get_running_loop().create_future()
                await self._arrival
            item = self._items.popleft()
            if isinstance(item, Exception):
                raise item
            if item is not None:
                index, step, size = item
                self._size -= size
                if self._timer is not None and self._size <= MAX_UNREAD_BYTES // 2:
                    self.close()
                    for handle in self._handles:
                        handle.resume()
                return index, step
            self._running -= 1
        return None

    def close(self) -> None:
        """Cancel the timer for a slow reader."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _begin_time(self) -> None:
        self._waited, self._sent = self._reader.waited, self._reader.sent
        self._check_in(READER_SECONDS)

    def _check_in(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._check_reader)

    def _check_reader(self) -> None:
        left = READER_SECONDS - (self._reader.waited - self._waited)
        if left > 0:
            self._check_in(left)
        elif self._reader.sent - self._sent >= READ_BYTES:
            self._begin_time()
        else:
            self._append(ReaderTooSlow())  # before the ends of the jobs
            for handle in self._handles:
                handle.close()
