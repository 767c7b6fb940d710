"""The batches of a server, carried out in the background: one of each key at a time, the oldest first.

One event loop owns it; disks are touched in threads. What a server had not finished goes on when it starts again.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from afterword.batch.answers import Ask, given_up
from afterword.batch.job import Job, Progress, in_thread
from afterword.batch.journal import Journal, Sums
from afterword.batch.limits import BatchLimits
from afterword.batch.rows import Row, read_lines, read_row
from afterword.batch.shelf import ENDED, Batch, File, Shelf, Wrong
from afterword.errors import AfterwordError, SettingError, StorageFailed
from afterword.tasks import supervised

_KEYS = 16  # batches at once, each of another key
_AT_ONCE = 32  # rows of each that are on their way to the models
_MOST_WRONG = 100  # faulty lines that are told
_PAUSE = 30.0  # seconds before another try where the disk fails
_TIDY = 60.0  # seconds between two looks for files whose time has come
_TOO_LATE = "This request could not be executed before the completion window expired."

_log = logging.getLogger("afterword")


class Manager:
    """Owner of the shelf and of the batches under way. `ask_for` a key gives a way to ask on its behalf."""

    def __init__(self, shelf: Shelf, limits: BatchLimits, clock: Callable[[], float] = time.time) -> None:
        self.shelf = shelf
        self.limits = limits
        self.clock = clock
        self._ask_for: Callable[[str], Ask] | None = None
        self._running: dict[str, asyncio.Task[None]] = {}  # by key
        self._progress: dict[str, Progress] = {}  # by batch
        self._held: Counter[str] = Counter()  # bytes of answers of batches under way, taken of their keys' room
        self._works: dict[str, asyncio.Task[None]] = {}  # by batch, while its rows are asked
        self._news = asyncio.Event()
        self._told = ""
        self._living: list[asyncio.Task[None]] = []

    @asynccontextmanager
    async def kept(self, ask_for: Callable[[str], Ask]) -> AsyncIterator[None]:
        """Carry out batches until this is left."""
        self._ask_for = ask_for
        if self.shelf.exists:
            self._news.set()
        self._living = [
            supervised(self._live, "start of batches", self._news.set),
            supervised(self._tidy, "expiry of files"),
        ]
        try:
            yield
        finally:
            await self.stop()
            await in_thread(self.shelf.close)

    async def stop(self) -> None:
        """Ask nothing more. What is done is kept."""
        tasks = [*self._living, *self._running.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def begun(self) -> None:
        """There is a new batch."""
        self._news.set()

    async def cancel(self, key: str, name: str) -> Batch:
        """End a batch before its time; what is answered is kept. Raises `RequestError` if there is none."""
        batch = await in_thread(self.shelf.batch, key, name)
        if batch.status in ("validating", "in_progress"):
            batch = await in_thread(self.shelf.put, batch.at("cancelling", self.clock()))
            if (work := self._works.get(name)) is not None:
                work.cancel()
        return self.now(batch)

    def now(self, batch: Batch) -> Batch:
        """A batch with what has been done of it by now."""
        progress = self._progress.get(batch.id)
        return batch if progress is None or batch.status in ENDED else _with_sums(batch, progress.done)

    # ----

    async def _live(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            try:
                waiting = await in_thread(self.shelf.unended)
            except StorageFailed as problem:
                await self._wait(problem.message)
                self._news.set()
                continue
            for batch in waiting:
                if batch.key not in self._running and len(self._running) < _KEYS:
                    self._running[batch.key] = asyncio.create_task(self._see_to(batch))

    async def _tidy(self) -> None:
        while True:
            await asyncio.sleep(_TIDY)
            if self.shelf.exists:
                with suppress(StorageFailed):  # who asks for files is told
                    await in_thread(self.shelf.expire)

    async def _see_to(self, batch: Batch) -> None:
        try:
            await self._carry_out_or_fail(batch)
        except AfterwordError as problem:
            await self._wait(problem.message)
        except Exception:
            _log.exception("A batch fails")
            await self._wait("the server has a mistake")
        finally:
            del self._running[batch.key]
            self._progress.pop(batch.id, None)
            self.shelf.room.give(batch.key, self._held.pop(batch.id, 0))
            self._news.set()

    async def _carry_out_or_fail(self, batch: Batch) -> None:
        try:
            await self._carry_out(batch)
        except SettingError:  # the file has been taken away
            wrong = Wrong("input_file_unreadable", "The file of 'input_file_id' can no longer be read.")
            await self._put(batch.at("failed", self.clock(), wrong=(wrong,)))

    async def _carry_out(self, batch: Batch) -> None:
        journal = await in_thread(self._open_journal, batch)
        with closing(journal):
            if batch.status == "validating":
                wrong = await in_thread(self._scan, batch, journal)
                if wrong:
                    await in_thread(self._end, batch.at("failed", self.clock(), wrong=wrong), journal, False)
                    return
                rows = int(journal.facts["rows"])
                batch = await self._put(batch.at("in_progress", self.clock(), rows=rows))
            if batch.status == "in_progress":
                batch = await self._ask_rows(batch, journal)
            await in_thread(self._end, batch, journal, True)

    async def _ask_rows(self, batch: Batch, journal: Journal) -> Batch:
        """All that is left to be asked, until it is time or cancelled. Returns what is to be written of it."""
        assert self._ask_for is not None
        room = partial(self._take_room, batch)
        job = Job(self.shelf.contents(batch.input), journal, batch.created, self.limits.max_line, _AT_ONCE, room)
        self._hold(batch, await in_thread(journal.size))
        self._progress[batch.id] = progress = Progress(batch.rows, await in_thread(journal.sums))
        self._works[batch.id] = work = asyncio.create_task(job.run(self._ask_for(batch.key), progress))
        try:
            known = await in_thread(self.shelf.batch, batch.key, batch.id)
            if known.status == "cancelling":  # meanwhile
                work.cancel()
            done, _ = await asyncio.wait([work], timeout=max(0.0, batch.expires - self.clock()))
        finally:
            work.cancel()
            await asyncio.wait([work])
            del self._works[batch.id]
        if done and not work.cancelled():
            work.result()
            return await self._put(batch.at("finalizing", self.clock()))
        if done:
            return await in_thread(self.shelf.batch, batch.key, batch.id)
        await in_thread(self._expire, batch, journal)
        return await self._put(batch.at("finalizing", self.clock()))

    def _take_room(self, batch: Batch, size: int) -> bool:
        """Whether the key of a batch has room for so many bytes of an answer, which are then taken."""
        if not self.shelf.room.take(batch.key, size, self.limits.max_stored):
            return False
        self._held[batch.id] += size
        return True

    def _hold(self, batch: Batch, size: int) -> None:
        """Take room for the answers that there are already."""
        self.shelf.room.take(batch.key, size)
        self._held[batch.id] += size

    async def _wait(self, why: str) -> None:
        """Wait until another try is worth it. The same reason is told once."""
        if why != self._told:
            _log.warning("Batches wait: %s", why)
        self._told = why
        await asyncio.sleep(_PAUSE)

    async def _put(self, batch: Batch) -> Batch:
        return await in_thread(self.shelf.put, batch)

    # ---- in threads

    def _open_journal(self, batch: Batch) -> Journal:
        try:
            return Journal(self.shelf.journal(batch.id))
        except SettingError as problem:
            raise StorageFailed(problem.message) from None

    def _scan(self, batch: Batch, journal: Journal) -> tuple[Wrong, ...]:
        """What is wrong with the input as a whole."""
        source, most = self.shelf.contents(batch.input), self.limits.max_rows
        if not journal.facts:
            journal.scan(source, self.limits.max_line, {}, most_faults=_MOST_WRONG, most_rows=most)
        rows = int(journal.facts["rows"])
        if not rows:
            return (Wrong("empty_file", "The file has no requests."),)
        if rows > most:
            return (Wrong("too_many_rows", f"The file has more than {most} requests."),)
        return tuple(_wrong(text, line) for line, text in journal.texts(good=False))

    def _expire(self, batch: Batch, journal: Journal) -> None:
        """Give up what has not been answered."""
        with self.shelf.contents(batch.input).open("rb") as file:
            rows = (row for line in read_lines(file, self.limits.max_line) if isinstance(row := read_row(line), Row))
            while some := list(islice(rows, 1000)):
                done = journal.done(some[0].line, some[-1].line)
                journal.keep([given_up(row, "batch_expired", _TOO_LATE) for row in some if row.line not in done])
        journal.note({"expired": True})

    def _end(self, batch: Batch, journal: Journal, outputs: bool) -> None:
        """Write what there is, and that this is all."""
        facts: dict[str, Any] = {}
        files = []
        if outputs:
            batch = _with_sums(batch, journal.sums())
            for name, good, many in (("output", True, batch.good), ("errors", False, batch.bad)):
                if many:
                    files.append(self._written(batch, journal, name, good))
                    facts[name] = files[-1].id
            expired = "expired" in journal.facts
            last = "cancelled" if batch.status == "cancelling" else "expired" if expired else "completed"
            batch = batch.at(last, self.clock(), **facts)  # type: ignore[arg-type]
        self.shelf.put(batch, files)
        journal.remove()

    def _written(self, batch: Batch, journal: Journal, name: str, good: bool) -> File:
        """A file of answers, the same one however often it is written."""
        label = "output" if good else "error"
        digest = hashlib.blake2b(f"{batch.id} {name}".encode(), digest_size=16).hexdigest()
        file = f"file-{digest}"
        size = journal.write(self.shelf.upload(file), good, private=True)
        return File(file, batch.key, f"{batch.id}_{label}.jsonl", "batch_output", size, int(self.clock()))


def _with_sums(batch: Batch, sums: Sums) -> Batch:
    return msgspec.structs.replace(
        batch, good=sums.good, bad=sums.bad, prompt=sums.prompt, completion=sums.completion, cached=sums.cached
    )


def _wrong(text: bytes, line: int) -> Wrong:
    error = msgspec.json.decode(text)["error"]
    return Wrong(error["code"], error["message"], line)


def default_folder() -> Path:
    """Where batches are unless somewhere else is named."""
    data = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return Path(data) / "afterword" / "batches"
