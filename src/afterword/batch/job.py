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

from afterword.batch.answers import Answer, Ask, Reply, answered, no_room, too_large
from afterword.batch.journal import Journal, Sums, open_input
from afterword.batch.rows import ENDPOINT, Row, read_lines, read_row

T = TypeVar("T")
WINDOW = 4096  # rows that are looked at together, to do those with a common beginning one after the other
_WINDOW_BYTES = 32 * 2**20
_PAUSE = 0.25  # seconds in which more answers may join a transaction
_MANY = 64  # answers for which no more are waited for
_TRIES = 6  # of a row at which the server fails
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds before another try


@dataclass(slots=True)
class Progress:
    """How far a job is. `before`: what was done when it began. `waits`: why nothing goes on, if nothing does."""

    rows: int
    done: Sums
    began: float = field(default_factory=time.monotonic)
    waits: str = ""
    before: Sums = field(init=False)

    def __post_init__(self) -> None:
        self.before = self.done

    @property
    def seconds(self) -> float:
        """Since it began."""
        return max(time.monotonic() - self.began, 1e-3)

    @property
    def rate(self) -> float:
        """Rows a second since it began."""
        return (self.done.rows - self.before.rows) / self.seconds

    @property
    def token_rate(self) -> float:
        """Generated tokens a second since it began."""
        return (self.done.completion - self.before.completion) / self.seconds

    @property
    def left(self) -> float | None:
        """Seconds until it is done, None if nobody knows."""
        return (self.rows - self.done.rows) / self.rate if self.rate else None

    def add(self, answer: Answer) -> None:
        """One more is done."""
        sums = self.done
        self.done = Sums(
            sums.good + answer.good,
            sums.bad + (not answer.good),
            sums.prompt + answer.prompt,
            sums.completion + answer.completion,
            sums.cached + answer.cached,
        )


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be done: the rows of a file that a journal does not have. `created`: the answers', in Unix seconds.

    `room` is asked for so many bytes; once it has too few for an answer, the rows that are left are not asked.
    """

    source: Path
    journal: Journal
    created: int
    longest: int
    at_once: int
    room: Callable[[int], bool] = lambda _: True

    async def run(
        self,
        ask: Ask,
        progress: Progress,
        chance: Callable[[], float] = random.random,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Do all of it. Raises `Stopped` where it cannot go on, with what is done kept."""
        asking = _Asking(ask, progress, chance, sleep)
        keeper = _Keeper(self.journal, most=2 * self.at_once + _MANY)
        rows: asyncio.Queue[Row | None] = asyncio.Queue(self.at_once)

        async def feed() -> None:
            async for row in self._rows():
                await rows.put(row)
            for _ in range(self.at_once):
                await rows.put(None)

        full = False

        async def work() -> None:
            nonlocal full
            while (row := await rows.get()) is not None:
                answer = None if full else self._answer(row, await asking.ask(row))
                full = full or answer is None
                answer = answer or no_room(row)
                await keeper.take(answer)
                progress.add(answer)

        keeping = asyncio.create_task(keeper.keep())
        workers = [asyncio.create_task(each) for each in (feed(), *(work() for _ in range(self.at_once)))]
        try:
            await _all_of(workers, keeping)
        finally:
            for task in workers:
                task.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            keeper.close()
            await keeping

    def _answer(self, row: Row, reply: Reply) -> Answer | None:
        """What is kept of a reply; None if there is no room for it."""
        most = self.journal.longest
        answer = too_large(row, most) if len(reply.body) > most else answered(row, reply, self.created)
        if len(answer.text) > most:
            answer = too_large(row, most)
        return answer if self.room(len(answer.text) + 1) else None

    async def _rows(self) -> AsyncIterator[Row]:
        """The rows that are still to be done, window by window."""
        windows = self._windows()
        while (window := await in_thread(next, windows, None)) is not None:
            for row in window:
                yield row

    def _windows(self) -> Iterator[list[Row]]:
        with open_input(self.source) as file:
            window: list[Row] = []
            size = 0
            for line in read_lines(file, self.longest):
                row = read_row(line)
                if isinstance(row, Row):
                    window.append(row)
                    size += len(line.text or b"")
                if len(window) == WINDOW or size > _WINDOW_BYTES:
                    yield self._to_do(window)
                    window, size = [], 0
            if window:
                yield self._to_do(window)

    def _to_do(self, window: list[Row]) -> list[Row]:
        """Those without an answer; rows whose prompts begin alike are neighbours."""
        done = self.journal.done(window[0].line, window[-1].line)
        return sorted((row for row in window if row.line not in done), key=lambda row: row.order)


class _Keeper:
    """Has answers written by a thread, those that come together in one transaction. Never cut off while it writes."""

    def __init__(self, journal: Journal, most: int) -> None:
        self._journal = journal
        self._room = asyncio.Semaphore(most)
        self._waiting: list[Answer] = []
        self._some = asyncio.Event()
        self._many = asyncio.Event()
        self._closed = False

    async def take(self, answer: Answer) -> None:
        """Have an answer kept soon; wait if many are waiting for that."""
        await self._room.acquire()
        self._waiting.append(answer)
        self._some.set()
        if len(self._waiting) >= _MANY:
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
            await asyncio.to_thread(self._journal.keep, answers)
            for _ in answers:
                self._room.release()


class _Asking:
    """Asks until there is an answer, or none is to be had."""

    def __init__(
        self,
        ask: Ask,
        progress: Progress,
        chance: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        self._ask = ask
        self._progress = progress
        self._chance = chance
        self._sleep = sleep

    async def ask(self, row: Row) -> Reply:
        """The last that a server says of a row."""
        request = row.request
        failures = waits = 0
        while True:
            reply = await self._ask("POST", ENDPOINT, request)
            failures += reply.tried
            if not reply.again and (not reply.tried or failures == _TRIES):
                self._progress.waits = ""
                return reply
            if reply.again:
                self._progress.waits = "the server takes nothing now" if reply.status else "the server does not answer"
            await self._sleep(self._wait(reply, waits))
            waits += 1

    def _wait(self, reply: Reply, before: int) -> float:
        """Seconds: as the server says, or more each time; and some by chance, so that not all come together."""
        told = 0.0 if isinstance(reply.again, bool) else reply.again
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


async def _all_of(workers: list[asyncio.Task[None]], keeping: asyncio.Task[None]) -> None:
    """Wait for all workers. The first failure ends the waiting, also one in keeping what is done."""
    left = {*workers, keeping}
    while left != {keeping}:
        done, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
