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

from afterword.batch.batch_job import BatchJob, Progress, in_thread
from afterword.batch.batch_limits import BatchLimits
from afterword.batch.file_store import FINAL_STATUSES, BatchError, FileStore, StoredBatch, StoredFile
from afterword.batch.input_lines import BatchRequest, read_lines, read_row
from afterword.batch.journal import BatchCounts, Journal
from afterword.batch.output_lines import SendRequest, failure_line
from afterword.errors import AfterwordError, SettingError, StorageFailed
from afterword.system.tasks import supervised

_MAX_KEYS = 16  # batches at once, each of another key
_AT_ONCE = 32  # rows of each that are on their way to the models
_MAX_ERRORS = 100  # faulty lines that are told
_PAUSE = 30.0  # seconds before another try where the disk fails
_TIDY = 60.0  # seconds between two looks for files whose time has come
_TOO_LATE = "This request could not be executed before the completion window expired."

_log = logging.getLogger("afterword")


class BatchManager:
    """Owner of the shelf and of the batches under way. `ask_for` a key gives a way to ask on its behalf."""

    def __init__(self, file_store: FileStore, limits: BatchLimits, clock: Callable[[], float] = time.time) -> None:
        self.file_store = file_store
        self.limits = limits
        self.clock = clock
        self._ask_for: Callable[[str], SendRequest] | None = None
        self._running: dict[str, asyncio.Task[None]] = {}  # by key
        self._progress: dict[str, Progress] = {}  # by batch
        self._held: Counter[str] = Counter()  # bytes of answers of batches under way, taken of their keys' room
        self._tasks: dict[str, asyncio.Task[None]] = {}  # by batch, while its rows are asked
        self._wakeup = asyncio.Event()
        self._logged_reasons = ""
        self._task: list[asyncio.Task[None]] = []

    @asynccontextmanager
    async def running(self, ask_for: Callable[[str], SendRequest]) -> AsyncIterator[None]:
        """Carry out batches until this is left."""
        self._ask_for = ask_for
        if self.file_store.exists:
            self._wakeup.set()
        self._task = [
            supervised(self._live, "start of batches", self._wakeup.set),
            supervised(self._expire_files, "expiry of files"),
        ]
        try:
            yield
        finally:
            await self.stop()
            await in_thread(self.file_store.close)

    async def stop(self) -> None:
        """Ask nothing more. What is done is kept."""
        tasks = [*self._task, *self._running.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def notify(self) -> None:
        """There is a new batch."""
        self._wakeup.set()

    async def cancel(self, key: str, name: str) -> StoredBatch:
        """End a batch before its time; what is answered is kept. Raises `RequestError` if there is none."""
        batch = await in_thread(self.file_store.batch, key, name)
        if batch.status in ("validating", "in_progress"):
            batch = await in_thread(self.file_store.save_batch, batch.with_status("cancelling", self.clock()))
            if (work := self._tasks.get(name)) is not None:
                work.cancel()
        return self.with_progress(batch)

    def with_progress(self, batch: StoredBatch) -> StoredBatch:
        """A batch with what has been done of it by now."""
        progress = self._progress.get(batch.id)
        return batch if progress is None or batch.status in FINAL_STATUSES else _with_sums(batch, progress.done)

    # ----

    async def _live(self) -> None:
        while True:
            await self._wakeup.wait()
            self._wakeup.clear()
            try:
                waiting = await in_thread(self.file_store.unfinished_batches)
            except StorageFailed as problem:
                await self._wait(problem.message)
                self._wakeup.set()
                continue
            for batch in waiting:
                if batch.key not in self._running and len(self._running) < _MAX_KEYS:
                    self._running[batch.key] = asyncio.create_task(self._run_batch(batch))

    async def _expire_files(self) -> None:
        while True:
            await asyncio.sleep(_TIDY)
            if self.file_store.exists:
                with suppress(StorageFailed):  # who asks for files is told
                    await in_thread(self.file_store.expire)

    async def _run_batch(self, batch: StoredBatch) -> None:
        try:
            await self._execute_or_fail(batch)
        except AfterwordError as problem:
            await self._wait(problem.message)
        except Exception:
            _log.exception("A batch fails")
            await self._wait("the server has a mistake")
        finally:
            del self._running[batch.key]
            self._progress.pop(batch.id, None)
            self.file_store.quota.release(batch.key, self._held.pop(batch.id, 0))
            self._wakeup.set()

    async def _execute_or_fail(self, batch: StoredBatch) -> None:
        try:
            await self._execute(batch)
        except SettingError:  # the file has been taken away
            wrong = BatchError("input_file_unreadable", "The file of 'input_file_id' can no longer be read.")
            await self._save(batch.with_status("failed", self.clock(), wrong=(wrong,)))

    async def _execute(self, batch: StoredBatch) -> None:
        journal = await in_thread(self._open_journal, batch)
        with closing(journal):
            if batch.status == "validating":
                wrong = await in_thread(self._scan, batch, journal)
                if wrong:
                    await in_thread(self._end, batch.with_status("failed", self.clock(), wrong=wrong), journal, False)
                    return
                rows = int(journal.facts["rows"])
                batch = await self._save(batch.with_status("in_progress", self.clock(), rows=rows))
            if batch.status == "in_progress":
                batch = await self._ask_rows(batch, journal)
            await in_thread(self._end, batch, journal, True)

    async def _ask_rows(self, batch: StoredBatch, journal: Journal) -> StoredBatch:
        """All that is left to be asked, until it is time or cancelled. Returns what is to be written of it."""
        assert self._ask_for is not None
        room = partial(self._reserve, batch)
        job = BatchJob(
            self.file_store.contents(batch.input), journal, batch.created, self.limits.max_line, _AT_ONCE, room
        )
        self._reserve_existing(batch, await in_thread(journal.size))
        self._progress[batch.id] = progress = Progress(batch.rows, await in_thread(journal.counts))
        self._tasks[batch.id] = work = asyncio.create_task(job.run(self._ask_for(batch.key), progress))
        try:
            known = await in_thread(self.file_store.batch, batch.key, batch.id)
            if known.status == "cancelling":  # meanwhile
                work.cancel()
            done, _ = await asyncio.wait([work], timeout=max(0.0, batch.expires - self.clock()))
        finally:
            work.cancel()
            await asyncio.wait([work])
            del self._tasks[batch.id]
        if done and not work.cancelled():
            work.result()
            return await self._save(batch.with_status("finalizing", self.clock()))
        if done:
            return await in_thread(self.file_store.batch, batch.key, batch.id)
        await in_thread(self._expire, batch, journal)
        return await self._save(batch.with_status("finalizing", self.clock()))

    def _reserve(self, batch: StoredBatch, size: int) -> bool:
        """Whether the key of a batch has room for so many bytes of an answer, which are then taken."""
        if not self.file_store.quota.reserve(batch.key, size, self.limits.max_stored):
            return False
        self._held[batch.id] += size
        return True

    def _reserve_existing(self, batch: StoredBatch, size: int) -> None:
        """Take room for the answers that there are already."""
        self.file_store.quota.reserve(batch.key, size)
        self._held[batch.id] += size

    async def _wait(self, why: str) -> None:
        """Wait until another try is worth it. The same reason is told once."""
        if why != self._logged_reasons:
            _log.warning("Batches wait: %s", why)
        self._logged_reasons = why
        await asyncio.sleep(_PAUSE)

    async def _save(self, batch: StoredBatch) -> StoredBatch:
        return await in_thread(self.file_store.save_batch, batch)

    # ---- in threads

    def _open_journal(self, batch: StoredBatch) -> Journal:
        try:
            return Journal(self.file_store.journal(batch.id))
        except SettingError as problem:
            raise StorageFailed(problem.message) from None

    def _scan(self, batch: StoredBatch, journal: Journal) -> tuple[BatchError, ...]:
        """What is wrong with the input as a whole."""
        source, most = self.file_store.contents(batch.input), self.limits.max_rows
        if not journal.facts:
            journal.scan(source, self.limits.max_line, {}, most_faults=_MAX_ERRORS, most_rows=most)
        rows = int(journal.facts["rows"])
        if not rows:
            return (BatchError("empty_file", "The file has no requests."),)
        if rows > most:
            return (BatchError("too_many_rows", f"The file has more than {most} requests."),)
        return tuple(_batch_error(text, line) for line, text in journal.lines(good=False))

    def _expire(self, batch: StoredBatch, journal: Journal) -> None:
        """Give up what has not been answered."""
        with self.file_store.contents(batch.input).open("rb") as file:
            rows = (
                row
                for line in read_lines(file, self.limits.max_line)
                if isinstance(row := read_row(line), BatchRequest)
            )
            while some := list(islice(rows, 1000)):
                done = journal.done(some[0].line, some[-1].line)
                journal.add([failure_line(row, "batch_expired", _TOO_LATE) for row in some if row.line not in done])
        journal.set_facts({"expired": True})

    def _end(self, batch: StoredBatch, journal: Journal, outputs: bool) -> None:
        """Write what there is, and that this is all."""
        facts: dict[str, Any] = {}
        files = []
        if outputs:
            batch = _with_sums(batch, journal.counts())
            for name, good, many in (("output", True, batch.good), ("errors", False, batch.bad)):
                if many:
                    files.append(self._written(batch, journal, name, good))
                    facts[name] = files[-1].id
            expired = "expired" in journal.facts
            last = "cancelled" if batch.status == "cancelling" else "expired" if expired else "completed"
            batch = batch.with_status(last, self.clock(), **facts)  # type: ignore[arg-type]
        self.file_store.save_batch(batch, files)
        journal.remove()

    def _written(self, batch: StoredBatch, journal: Journal, name: str, good: bool) -> StoredFile:
        """A file of answers, the same one however often it is written."""
        label = "output" if good else "error"
        digest = hashlib.blake2b(f"{batch.id} {name}".encode(), digest_size=16).hexdigest()
        file = f"file-{digest}"
        size = journal.write(self.file_store.upload(file), good, private=True)
        return StoredFile(file, batch.key, f"{batch.id}_{label}.jsonl", "batch_output", size, int(self.clock()))


def _with_sums(batch: StoredBatch, sums: BatchCounts) -> StoredBatch:
    return msgspec.structs.replace(
        batch, good=sums.succeeded, bad=sums.failed, prompt=sums.prompt, completion=sums.completion, cached=sums.cached
    )


def _batch_error(text: bytes, line: int) -> BatchError:
    error = msgspec.json.decode(text)["error"]
    return BatchError(error["code"], error["message"], line)


def default_folder() -> Path:
    """Where batches are unless somewhere else is named."""
    data = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return Path(data) / "afterword" / "batches"
