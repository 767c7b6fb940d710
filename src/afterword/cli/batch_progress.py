"""Shows the progress of a batch on standard error: a bar on a terminal, otherwise a line every 30 s."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from afterword.batch.batch_job import Progress as JobProgress
from afterword.system.tasks import supervised

_REFRESH_SECONDS, _LINE_SECONDS = 0.25, 30.0


@asynccontextmanager
async def show_progress(job: JobProgress) -> AsyncIterator[None]:
    """Show the progress of a job inside the `async with` block."""
    with _BarDisplay(job) if sys.stderr.isatty() else _LineDisplay(job) as refresh:
        showing = supervised(partial(_repeat, refresh), "progress display")
        try:
            yield
        finally:
            showing.cancel()
            await asyncio.gather(showing, return_exceptions=True)
            refresh()


async def _repeat(refresh: Callable[[], None]) -> None:
    while True:
        refresh()
        await asyncio.sleep(_REFRESH_SECONDS)


class _LineDisplay:
    """Prints a line every 30 s, the first one after 30 s."""

    def __init__(self, job: JobProgress) -> None:
        self._job = job
        self._last_line = job.seconds

    def __enter__(self) -> Callable[[], None]:
        return self._refresh

    def __exit__(self, *_: object) -> None:
        pass

    def _refresh(self) -> None:
        if self._job.seconds - self._last_line >= _LINE_SECONDS:
            self._last_line = self._job.seconds
            click.echo(f"{self._job.done.total:,} of {self._job.lines:,} lines, {facts(self._job)}", err=True)


class _BarDisplay:
    """Draws a progress bar."""

    def __init__(self, job: JobProgress) -> None:
        self._job = job
        columns = (BarColumn(), TextColumn("{task.completed:,.0f}/{task.total:,.0f} lines  {task.description}"))
        self._progress = Progress(*columns, console=Console(stderr=True), auto_refresh=False)
        self._task = self._progress.add_task("", total=job.lines, completed=job.done.total)

    def __enter__(self) -> Callable[[], None]:
        self._progress.start()
        return self._refresh

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def _refresh(self) -> None:
        self._progress.update(self._task, completed=self._job.done.total, description=facts(self._job), refresh=True)


def facts(job: JobProgress) -> str:
    """Describe rates, remaining time, errors, and why the job waits if it does."""
    parts = [f"{job.rate:.3g} lines/s", f"{job.token_rate:,.0f} tokens/s"]
    if job.remaining_seconds is not None and job.done.total < job.lines:
        parts.append(f"{timedelta(seconds=round(job.remaining_seconds))} left")
    if job.done.failed:
        parts.append(f"{job.done.failed:,} errors")
    return ", ".join([*parts, *([job.waiting_for] if job.waiting_for else [])])
