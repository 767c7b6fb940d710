"""A batch carried out: rows in an order that shares beginnings, some at a time, each kept when it is answered.

It can be stopped at any moment; what is not kept then is done again the next time, and comes out the same.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from afterword.batch.input_lines import ENDPOINT, BatchRequest, read_lines, read_row
from afterword.batch.journal import BatchCounts, Journal, open_input
from afterword.batch.output_lines import (
    OutputLine,
    SendRequest,
    ServerReply,
    no_space_line,
    success_line,
    too_large_line,
)

T = TypeVar("T")
WINDOW = 4096  # rows that are looked at together, to do those with a common beginning one after the other
_WINDOW_BYTES = 32 * 2**20
_PAUSE = 0.25  # seconds in which more answers may join a transaction
_MAX_TRANSACTION_LINES = 64  # answers for which no more are waited for
_MAX_ATTEMPTS = 6  # of a row at which the server fails
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds before another try


@dataclass(slots=True)
class Progress:
    """How far a job is.

    `done_before`: what was done when it began. `waiting_for`: why nothing goes on, if nothing does.
    """

    rows: int
    done: BatchCounts
    began: float = field(default_factory=time.monotonic)
    waiting_for: str = ""
    done_before: BatchCounts = field(init=False)

    def __post_init__(self) -> None:
        self.done_before = self.done

    @property
    def seconds(self) -> float:
        """Since it began."""
        return max(time.monotonic() - self.began, 1e-3)

    @property
    def rate(self) -> float:
        """Rows a second since it began."""
        return (self.done.total - self.done_before.total) / self.seconds

    @property
    def token_rate(self) -> float:
        """Generated tokens a second since it began."""
        return (self.done.completion - self.done_before.completion) / self.seconds

    @property
    def remaining_seconds(self) -> float | None:
        """Seconds until it is done, None if nobody knows."""
        return (self.rows - self.done.total) / self.rate if self.rate else None

    def add(self, answer: OutputLine) -> None:
        """One more is done."""
        sums = self.done
        self.done = BatchCounts(
            sums.succeeded + answer.is_success,
            sums.failed + (not answer.is_success),
            sums.prompt + answer.prompt,
            sums.completion + answer.completion,
            sums.cached + answer.cached,
        )


@dataclass(frozen=True, slots=True)
class BatchJob:
    """What is to be done: the rows of a file that a journal does not have. `created`: the answers', in Unix seconds.

    `reserve` is asked for so many bytes; once it has too few for an answer, the rows that are left are not asked.
    """

    source: Path
    journal: Journal
    created: int
    max_line_bytes: int
    concurrency: int
    reserve: Callable[[int], bool] = lambda _: True

    async def run(
        self,
        ask: SendRequest,
        progress: Progress,
        chance: Callable[[], float] = random.random,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Do all of it. Raises `BatchStopped` where it cannot go on, with what is done kept."""
        asking = _Requester(ask, progress, chance, sleep)
        keeper = _JournalWriter(self.journal, most=2 * self.concurrency + _MAX_TRANSACTION_LINES)
        rows: asyncio.Queue[BatchRequest | None] = asyncio.Queue(self.concurrency)

        async def feed() -> None:
            async for row in self._rows():
                await rows.put(row)
            for _ in range(self.concurrency):
                await rows.put(None)

        full = False

        async def work() -> None:
            nonlocal full
            while (row := await rows.get()) is not None:
                answer = None if full else self._answer(row, await asking.ask(row))
                full = full or answer is None
                answer = answer or no_space_line(row)
                await keeper.take(answer)
                progress.add(answer)

        keeping = asyncio.create_task(keeper.keep())
        workers = [asyncio.create_task(each) for each in (feed(), *(work() for _ in range(self.concurrency)))]
        try:
            await _wait_for_all(workers, keeping)
        finally:
            for task in workers:
                task.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            keeper.close()
            await keeping

    def _answer(self, row: BatchRequest, reply: ServerReply) -> OutputLine | None:
        """What is kept of a reply; None if there is no room for it."""
        most = self.journal.longest
        answer = too_large_line(row, most) if len(reply.body) > most else success_line(row, reply, self.created)
        if len(answer.text) > most:
            answer = too_large_line(row, most)
        return answer if self.reserve(len(answer.text) + 1) else None

    async def _rows(self) -> AsyncIterator[BatchRequest]:
        """The rows that are still to be done, window by window."""
        windows = self._windows()
        while (window := await in_thread(next, windows, None)) is not None:
            for row in window:
                yield row

    def _windows(self) -> Iterator[list[BatchRequest]]:
        with open_input(self.source) as file:
            window: list[BatchRequest] = []
            size = 0
            for line in read_lines(file, self.max_line_bytes):
                row = read_row(line)
                if isinstance(row, BatchRequest):
                    window.append(row)
                    size += len(line.text or b"")
                if len(window) == WINDOW or size > _WINDOW_BYTES:
                    yield self._to_do(window)
                    window, size = [], 0
            if window:
                yield self._to_do(window)

    def _to_do(self, window: list[BatchRequest]) -> list[BatchRequest]:
        """Those without an answer; rows whose prompts begin alike are neighbours."""
        done = self.journal.done(window[0].line, window[-1].line)
        return sorted((row for row in window if row.line not in done), key=lambda row: row.sort_key)


class _JournalWriter:
    """Has answers written by a thread, those that come together in one transaction. Never cut off while it writes."""

    def __init__(self, journal: Journal, most: int) -> None:
        self._journal = journal
        self._room = asyncio.Semaphore(most)
        self._waiting: list[OutputLine] = []
        self._some = asyncio.Event()
        self._many = asyncio.Event()
        self._closed = False

    async def take(self, answer: OutputLine) -> None:
        """Have an answer kept soon; wait if many are waiting for that."""
        await self._room.acquire()
        self._waiting.append(answer)
        self._some.set()
        if len(self._waiting) >= _MAX_TRANSACTION_LINES:
            self._many.set()

    def close(self) -> None:
        """No more answers come."""
        self._closed = True
        self._some.set()
        self._many.set()

    async def keep(self) -> None:
        """Write until it is closed and nothing waits. Raises what the journal raises."""
        while self._waiting or not self._closed:
            await self._some.wait()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._many.wait(), _PAUSE)
            answers, self._waiting = self._waiting, []
            if not self._closed:
                self._some.clear()
                self._many.clear()
            await asyncio.to_thread(self._journal.add, answers)
            for _ in answers:
                self._room.release()


class _Requester:
    """Asks until there is an answer, or none is to be had."""

    def __init__(
        self,
        ask: SendRequest,
        progress: Progress,
        chance: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        self._ask = ask
        self._progress = progress
        self._chance = chance
        self._sleep = sleep

    async def ask(self, row: BatchRequest) -> ServerReply:
        """The last that a server says of a row."""
        request = row.request_body
        failures = waits = 0
        while True:
            reply = await self._ask("POST", ENDPOINT, request)
            failures += reply.attempted
            if not reply.retry and (not reply.attempted or failures == _MAX_ATTEMPTS):
                self._progress.waiting_for = ""
                return reply
            if reply.retry:
                self._progress.waiting_for = (
                    "the server takes nothing now" if reply.status else "the server does not answer"
                )
            await self._sleep(self._wait(reply, waits))
            waits += 1

    def _wait(self, reply: ServerReply, before: int) -> float:
        """Seconds: as the server says, or more each time; and some by chance, so that not all come together."""
        told = 0.0 if isinstance(reply.retry, bool) else reply.retry
        own: float = min(_FIRST_WAIT * 2 ** min(before, 10), _LONGEST_WAIT)
        return max(told, own) * (1 + self._chance() / 4)


async def in_thread(call: Callable[..., T], *arguments: Any) -> T:
    """Like `asyncio.to_thread`, but who is cancelled waits for the thread, which has a journal in its hands."""
    task = asyncio.create_task(asyncio.to_thread(call, *arguments))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.gather(task, return_exceptions=True)
        raise


async def _wait_for_all(workers: list[asyncio.Task[None]], keeping: asyncio.Task[None]) -> None:
    """Wait for all workers. The first failure ends the waiting, also one in keeping what is done."""
    left = {*workers, keeping}
    while left != {keeping}:
        done, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
