"""Runs a batch: sends its requests, several at a time, and writes each answer to the journal.

Requests with a common prefix are sent one after the other, so that the prefix cache is used. A job can be
cancelled at any time. The next run sends the requests again whose answers were not written. Everything here belongs to
one event loop; threads read the input file and write the journal.
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
WINDOW = 4096  # requests that are sorted together by their prompts
_WINDOW_BYTES = 32 * 2**20
_PAUSE = 0.25  # seconds that the journal writer waits for more answers before it starts a transaction
_MAX_TRANSACTION_LINES = 64  # with so many answers the transaction starts at once
_MAX_UNWRITTEN_BYTES = 64 * 2**20  # of answers that wait for the journal; one more may exceed this
_LARGE_REPLY = 2**20  # bytes; the line of a larger reply is made in a thread, since that takes milliseconds
_MAX_ATTEMPTS = 6  # attempts of a request with which the server fails (`ServerReply.attempted`)
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds before another attempt


@dataclass(slots=True)
class Progress:
    """The progress of a job.

    `lines`: lines of the input. `done_before`: the counts at the start of this run. `waiting_for`: why the server
    answers no requests at the moment; empty if it does.
    """

    lines: int
    done: BatchCounts
    began: float = field(default_factory=time.monotonic)
    waiting_for: str = ""
    done_before: BatchCounts = field(init=False)

    def __post_init__(self) -> None:
        self.done_before = self.done

    @property
    def seconds(self) -> float:
        """Seconds since the start of this run, at least 0.001."""
        return max(time.monotonic() - self.began, 1e-3)

    @property
    def rate(self) -> float:
        """Lines per second since the start of this run."""
        return (self.done.total - self.done_before.total) / self.seconds

    @property
    def token_rate(self) -> float:
        """Generated tokens per second since the start of this run."""
        return (self.done.completion - self.done_before.completion) / self.seconds

    @property
    def remaining_seconds(self) -> float | None:
        """Estimated seconds until the end, None before the first answer."""
        return (self.lines - self.done.total) / self.rate if self.rate else None

    def add(self, answer: OutputLine) -> None:
        """Count one more answer."""
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
    """The requests of an input file that have no answer in a journal.

    `created`: the time in every answer, in Unix seconds. `max_line_bytes`: longest line of the input. `concurrency`:
    requests sent at the same time. `reserve` is called with the size of an output line in bytes, and returns whether
    there is space for it. After it has returned False, the remaining requests are not sent and get an error line.
    """

    source: Path
    journal: Journal
    created: int
    max_line_bytes: int
    concurrency: int
    reserve: Callable[[int], bool] = lambda _: True

    async def run(
        self,
        send: SendRequest,
        progress: Progress,
        random_number: Callable[[], float] = random.random,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Answer every request. `random_number` returns numbers in [0, 1); `sleep` takes seconds.

        Raises `BatchStopped` if the batch cannot continue now, and `SettingError` if the input cannot be read. The
        journal then has all answers received so far.
        """
        requester = _Requester(send, progress, random_number, sleep)
        writer = _JournalWriter(self.journal, max_pending=2 * self.concurrency + _MAX_TRANSACTION_LINES)
        rows: asyncio.Queue[BatchRequest | None] = asyncio.Queue(self.concurrency)

        async def feed() -> None:
            async for row in self._rows():
                await rows.put(row)
            for _ in range(self.concurrency):
                await rows.put(None)

        no_space = False
        one_large_reply = asyncio.Lock()  # several at once would need several times the memory

        async def answer_to(row: BatchRequest) -> OutputLine:
            reply = await requester.send(row)
            if len(reply.body) <= _LARGE_REPLY:
                return self._make_line(row, reply)
            async with one_large_reply:
                return await in_thread(self._make_line, row, reply)

        async def work() -> None:
            nonlocal no_space
            while (row := await rows.get()) is not None:
                answer = None if no_space else await answer_to(row)
                if answer is not None and not self.reserve(len(answer.text) + 1):
                    answer = None
                no_space = no_space or answer is None
                answer = answer or no_space_line(row)
                await writer.put(answer)
                progress.add(answer)

        writing = asyncio.create_task(writer.run())
        workers = [asyncio.create_task(each) for each in (feed(), *(work() for _ in range(self.concurrency)))]
        try:
            await _wait_for_all(workers, writing)
        finally:
            for task in workers:
                task.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            writer.close()
            await writing

    def _make_line(self, row: BatchRequest, reply: ServerReply) -> OutputLine:
        """Make the output line from a reply."""
        max_bytes = self.journal.max_answer_bytes
        is_larger = len(reply.body) > max_bytes
        answer = too_large_line(row, max_bytes) if is_larger else success_line(row, reply, self.created)
        return too_large_line(row, max_bytes) if len(answer.text) > max_bytes else answer

    async def _rows(self) -> AsyncIterator[BatchRequest]:
        """Yield the requests that have no answer yet, window by window. A thread reads and sorts each window."""
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
                    yield self._unanswered(window)
                    window, size = [], 0
            if window:
                yield self._unanswered(window)

    def _unanswered(self, window: list[BatchRequest]) -> list[BatchRequest]:
        """Return the requests without an answer, sorted by their prompts."""
        done = self.journal.done(window[0].line, window[-1].line)
        return sorted((row for row in window if row.line not in done), key=lambda row: row.sort_key)


class _JournalWriter:
    """Writes answers to the journal in a thread. Answers that arrive close together share one transaction.

    `run` must not be cancelled: it holds answers that it has not written yet. `close` ends it.
    """

    def __init__(self, journal: Journal, max_pending: int) -> None:
        self._journal = journal
        self._max_pending = max_pending
        self._unwritten = self._unwritten_bytes = 0  # answers that are queued or being written
        self._written = asyncio.Condition()
        self._pending: list[OutputLine] = []
        self._has_pending = asyncio.Event()
        self._is_full = asyncio.Event()  # enough pending answers for a transaction
        self._closed = False

    async def put(self, answer: OutputLine) -> None:
        """Queue an answer to be written. Waits while `max_pending` answers, or very large ones, are not written."""
        async with self._written:
            await self._written.wait_for(self._has_room)
            self._unwritten += 1
            self._unwritten_bytes += len(answer.text)
        self._pending.append(answer)
        self._has_pending.set()
        if len(self._pending) >= _MAX_TRANSACTION_LINES or not self._has_room():
            self._is_full.set()

    def _has_room(self) -> bool:
        return self._unwritten < self._max_pending and self._unwritten_bytes <= _MAX_UNWRITTEN_BYTES

    def close(self) -> None:
        """Let `run` write the queued answers and return. `put` must not be called afterwards."""
        self._closed = True
        self._has_pending.set()
        self._is_full.set()

    async def run(self) -> None:
        """Write queued answers until `close` is called and the queue is empty. Raises the journal's errors."""
        while self._pending or not self._closed:
            await self._has_pending.wait()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._is_full.wait(), _PAUSE)
            answers, self._pending = self._pending, []
            if not self._closed:
                self._has_pending.clear()
                self._is_full.clear()
            await asyncio.to_thread(self._journal.add, answers)
            async with self._written:
                self._unwritten -= len(answers)
                self._unwritten_bytes -= sum(len(answer.text) for answer in answers)
                self._written.notify_all()


class _Requester:
    """Sends a request until the server answers it, or the number of attempts is used up."""

    def __init__(
        self,
        send: SendRequest,
        progress: Progress,
        random_number: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        self._send = send
        self._progress = progress
        self._random_number = random_number
        self._sleep = sleep

    async def send(self, row: BatchRequest) -> ServerReply:
        """Return the server's last reply to a request."""
        request = row.request_body
        failures = waits = 0
        while True:
            reply = await self._send("POST", ENDPOINT, request)
            failures += reply.attempted
            if not reply.retry and (not reply.attempted or failures == _MAX_ATTEMPTS):
                self._progress.waiting_for = ""
                return reply
            if reply.retry:
                self._progress.waiting_for = (
                    "the server accepts no requests now" if reply.status else "the server does not respond"
                )
            await self._sleep(self._wait(reply, waits))
            waits += 1

    def _wait(self, reply: ServerReply, before: int) -> float:
        """Return the seconds until the next attempt. `before`: how often this request has waited already.

        The wait doubles with each attempt and is at least the server's `Retry-After`. Up to a quarter is added at
        random, so that requests that failed together are not sent again together.
        """
        retry_after = 0.0 if isinstance(reply.retry, bool) else reply.retry
        backoff: float = min(_FIRST_WAIT * 2 ** min(before, 10), _LONGEST_WAIT)
        return max(retry_after, backoff) * (1 + self._random_number() / 4)


async def in_thread(call: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a thread. A caller that is cancelled still waits until the thread has ended.

    `asyncio.to_thread` does not wait, so the journal could be closed while the thread uses it.
    """
    task = asyncio.create_task(asyncio.to_thread(call, *arguments))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.gather(task, return_exceptions=True)
        raise


async def _wait_for_all(workers: list[asyncio.Task[None]], writing: asyncio.Task[None]) -> None:
    """Wait until all workers have ended. Raises the first error of a worker or of the journal writer."""
    left = {*workers, writing}
    while left != {writing}:
        done, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
