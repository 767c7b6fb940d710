"""Runs the batches of a server in the background: one batch per API key at a time, the oldest first.

The manager belongs to the server's event loop. Threads read and write files. After a restart the manager continues the
unfinished batches. It must not import `api`: it sends requests through a function that it is given.
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
from afterword.batch.file_store import FileStore
from afterword.batch.input_lines import BatchRequest, read_lines, read_row
from afterword.batch.journal import BatchCounts, Journal, open_input
from afterword.batch.output_lines import SendRequest, failure_line
from afterword.batch.stored_items import FINAL_STATUSES, BatchError, StoredBatch, StoredFile
from afterword.errors import AfterwordError, SettingError, StorageFailed
from afterword.system.tasks import supervised

_MAX_KEYS = 16  # batches that run at the same time, each of another key
_CONCURRENCY = 32  # requests of one batch that are sent at the same time
_MAX_ERRORS = 100  # faulty lines that a failed batch reports
_PAUSE = 30.0  # seconds before another attempt after the disk failed
_EXPIRY_INTERVAL = 60.0  # seconds between deletions of expired files
_EXPIRED = "This request could not be executed before the completion window expired."

_log = logging.getLogger("afterword")


class BatchManager:
    """Owns the file store and the running batches. `clock` returns Unix seconds."""

    def __init__(self, file_store: FileStore, limits: BatchLimits, clock: Callable[[], float] = time.time) -> None:
        self.file_store = file_store
        self.limits = limits
        self.clock = clock
        self._client_for: Callable[[str], SendRequest] | None = None
        self._running: dict[str, asyncio.Task[None]] = {}  # by key
        self._progress: dict[str, Progress] = {}  # by batch
        self._reserved: Counter[str] = Counter()  # by batch: bytes of answers, as long as it runs
        self._tasks: dict[str, asyncio.Task[None]] = {}  # by batch, while its requests are sent
        self._wakeup = asyncio.Event()
        self._logged_reason = ""
        self._task: list[asyncio.Task[None]] = []

    @asynccontextmanager
    async def running(self, client_for: Callable[[str], SendRequest]) -> AsyncIterator[None]:
        """Run batches inside the `async with` block. `client_for(key)` returns the client that sends its requests."""
        self._client_for = client_for
        if self.file_store.exists:
            self._wakeup.set()
        self._task = [
            supervised(self._start_batches, "start of batches", self._wakeup.set),
            supervised(self._expire_files, "expiry of files"),
        ]
        try:
            yield
        finally:
            await self.stop()
            await in_thread(self.file_store.close)

    async def stop(self) -> None:
        """Cancel all running batches. Their journals keep the answers so far."""
        tasks = [*self._task, *self._running.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def notify(self) -> None:
        """Start a batch that was added to the file store, if its key has none running."""
        self._wakeup.set()

    async def cancel(self, key: str, name: str) -> StoredBatch:
        """Cancel a batch; its output has the answers so far. Raises `RequestError` if it does not exist."""
        batch = await in_thread(self.file_store.batch, key, name)
        if batch.status in ("validating", "in_progress"):
            batch = await in_thread(self.file_store.save_batch, batch.with_status("cancelling", self.clock()))
            if (task := self._tasks.get(name)) is not None:
                task.cancel()
        return self.with_progress(batch)

    def with_progress(self, batch: StoredBatch) -> StoredBatch:
        """Return the batch with the current counts of its job."""
        progress = self._progress.get(batch.id)
        return batch if progress is None or batch.status in FINAL_STATUSES else _with_counts(batch, progress.done)

    # ----

    async def _start_batches(self) -> None:
        while True:
            await self._wakeup.wait()
            self._wakeup.clear()
            try:
                unfinished = await in_thread(self.file_store.unfinished_batches)
            except StorageFailed as problem:
                await self._wait(problem.message)
                self._wakeup.set()
                continue
            for batch in unfinished:
                if batch.key not in self._running and len(self._running) < _MAX_KEYS:
                    self._running[batch.key] = asyncio.create_task(self._run_batch(batch))

    async def _expire_files(self) -> None:
        while True:
            await asyncio.sleep(_EXPIRY_INTERVAL)
            if self.file_store.exists:
                with suppress(StorageFailed):  # requests for files get this error
                    await in_thread(self.file_store.expire)

    async def _run_batch(self, batch: StoredBatch) -> None:
        try:
            await self._execute_or_fail(batch)
        except AfterwordError as problem:
            await self._wait(problem.message)
        except Exception:
            _log.exception("A batch failed with an unexpected error and will be tried again")
            await self._wait("unexpected error")
        finally:
            del self._running[batch.key]
            self._progress.pop(batch.id, None)
            self.file_store.quota.release(batch.key, self._reserved.pop(batch.id, 0))
            self._wakeup.set()

    async def _execute_or_fail(self, batch: StoredBatch) -> None:
        try:
            await self._execute(batch)
        except SettingError:  # another program deleted the contents
            error = BatchError("input_file_unreadable", "The file of 'input_file_id' can no longer be read.")
            await self._save(batch.with_status("failed", self.clock(), errors=(error,)))

    async def _execute(self, batch: StoredBatch) -> None:
        journal = await in_thread(self._open_journal, batch)
        with closing(journal):
            if batch.status == "validating":
                errors = await in_thread(self._scan, batch, journal)
                if errors:
                    await in_thread(
                        self._finish, batch.with_status("failed", self.clock(), errors=errors), journal, False
                    )
                    return
                lines = int(journal.facts["rows"])
                batch = await self._save(batch.with_status("in_progress", self.clock(), lines=lines))
            if batch.status == "in_progress":
                batch = await self._run_job(batch, journal)
            await in_thread(self._finish, batch, journal, True)

    async def _run_job(self, batch: StoredBatch, journal: Journal) -> StoredBatch:
        """Send the remaining requests until all are answered, the batch expires or a client cancels it.

        Returns the batch with its new status, `finalizing` or `cancelling`.
        """
        assert self._client_for is not None
        reserve = partial(self._reserve, batch)
        job = BatchJob(
            self.file_store.contents(batch.input_file),
            journal,
            batch.created,
            self.limits.max_line,
            _CONCURRENCY,
            reserve,
        )
        self._reserve_existing(batch, await in_thread(journal.size))
        self._progress[batch.id] = progress = Progress(batch.lines, await in_thread(journal.counts))
        self._tasks[batch.id] = task = asyncio.create_task(job.run(self._client_for(batch.key), progress))
        try:
            known = await in_thread(self.file_store.batch, batch.key, batch.id)
            if known.status == "cancelling":  # cancelled before its task existed
                task.cancel()
            done, _ = await asyncio.wait([task], timeout=max(0.0, batch.expires - self.clock()))
        finally:
            task.cancel()
            await asyncio.wait([task])
            del self._tasks[batch.id]
        if done and not task.cancelled():
            task.result()
            return await self._save(batch.with_status("finalizing", self.clock()))
        if done:
            return await in_thread(self.file_store.batch, batch.key, batch.id)
        await in_thread(self._expire, batch, journal)
        return await self._save(batch.with_status("finalizing", self.clock()))

    def _reserve(self, batch: StoredBatch, size: int) -> bool:
        """Reserve `size` bytes of the key's storage for an answer. Returns False if the limit would be exceeded."""
        if not self.file_store.quota.reserve(batch.key, size, self.limits.max_stored):
            return False
        self._reserved[batch.id] += size
        return True

    def _reserve_existing(self, batch: StoredBatch, size: int) -> None:
        """Reserve storage for the answers that the journal has already, without a limit."""
        self.file_store.quota.reserve(batch.key, size)
        self._reserved[batch.id] += size

    async def _wait(self, reason: str) -> None:
        """Wait before another attempt. The same reason is logged only once."""
        if reason != self._logged_reason:
            _log.warning("Batches wait %d s before another attempt: %s", _PAUSE, reason)
        self._logged_reason = reason
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
        """Read the input into the journal. Returns the errors for which the whole batch fails."""
        source, limit = self.file_store.contents(batch.input_file), self.limits.max_rows
        if not journal.facts:
            journal.scan(source, self.limits.max_line, {}, max_faults=_MAX_ERRORS, max_lines=limit)
        lines = int(journal.facts["rows"])
        if not lines:
            return (BatchError("empty_file", "The input file has no requests."),)
        if lines > limit:
            return (BatchError("too_many_rows", f"The input file has more than {limit} requests."),)
        return tuple(_batch_error(text, line) for line, text in journal.lines(succeeded=False))

    def _expire(self, batch: StoredBatch, journal: Journal) -> None:
        """Write an error for each request without an answer."""
        with open_input(self.file_store.contents(batch.input_file)) as file:
            rows = (
                row
                for line in read_lines(file, self.limits.max_line)
                if isinstance(row := read_row(line), BatchRequest)
            )
            while some := list(islice(rows, 1000)):
                done = journal.done(some[0].line, some[-1].line)
                journal.add([failure_line(row, "batch_expired", _EXPIRED) for row in some if row.line not in done])
        journal.set_facts({"expired": True})

    def _finish(self, batch: StoredBatch, journal: Journal, outputs: bool) -> None:
        """Write the output files and the final status of a batch, and delete its journal."""
        facts: dict[str, Any] = {}
        files = []
        if outputs:
            batch = _with_counts(batch, journal.counts())
            for field, succeeded, count in (
                ("output_file", True, batch.succeeded),
                ("error_file", False, batch.failed),
            ):
                if count:
                    files.append(self._write_output(batch, journal, succeeded))
                    facts[field] = files[-1].id
            expired = "expired" in journal.facts
            last = "cancelled" if batch.status == "cancelling" else "expired" if expired else "completed"
            batch = batch.with_status(last, self.clock(), **facts)  # type: ignore[arg-type]
        self.file_store.save_batch(batch, files)
        journal.remove()

    def _write_output(self, batch: StoredBatch, journal: Journal, succeeded: bool) -> StoredFile:
        """Write an output file. Its id is derived from the batch, so a repeated call replaces the file."""
        label, name = ("output", "output") if succeeded else ("error", "errors")
        digest = hashlib.blake2b(f"{batch.id} {name}".encode(), digest_size=16).hexdigest()
        file = f"file-{digest}"
        size = journal.write(self.file_store.upload(file), succeeded, private=True)
        return StoredFile(file, batch.key, f"{batch.id}_{label}.jsonl", "batch_output", size, int(self.clock()))


def _with_counts(batch: StoredBatch, sums: BatchCounts) -> StoredBatch:
    return msgspec.structs.replace(
        batch,
        succeeded=sums.succeeded,
        failed=sums.failed,
        prompt=sums.prompt,
        completion=sums.completion,
        cached=sums.cached,
    )


def _batch_error(text: bytes, line: int) -> BatchError:
    error = msgspec.json.decode(text)["error"]
    return BatchError(error["code"], error["message"], line)


def default_folder() -> Path:
    """Return the folder of the file store if `--batch-dir` is not set."""
    data = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return Path(data) / "afterword" / "batches"
