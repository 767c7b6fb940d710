"""How far a batch is, for a person: a bar on a terminal, else a line now and then. Both on standard error."""

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

from afterword.batch.batch_job import Progress as Done
from afterword.system.tasks import supervised

_LOOK, _LINE = 0.25, 30.0  # seconds


@asynccontextmanager
async def show_progress(done: Done) -> AsyncIterator[None]:
    """Show how far a job is until this is left."""
    with _BarDisplay(done) if sys.stderr.isatty() else _LineDisplay(done) as look:
        showing = supervised(partial(_repeat, look), "progress display")
        try:
            yield
        finally:
            showing.cancel()
            await asyncio.gather(showing, return_exceptions=True)
            look()


async def _repeat(look: Callable[[], None]) -> None:
    while True:
        look()
        await asyncio.sleep(_LOOK)


class _LineDisplay:
    """A line every half a minute, the first after that time."""

    def __init__(self, done: Done) -> None:
        self._done = done
        self._said = done.seconds

    def __enter__(self) -> Callable[[], None]:
        return self._look

    def __exit__(self, *_: object) -> None:
        """Nothing is left to do."""

    def _look(self) -> None:
        if self._done.seconds - self._said >= _LINE:
            self._said = self._done.seconds
            click.echo(f"{self._done.done.total:,} of {self._done.rows:,} rows, {facts(self._done)}", err=True)


class _BarDisplay:
    """A bar that is drawn again and again."""

    def __init__(self, done: Done) -> None:
        self._done = done
        columns = (BarColumn(), TextColumn("{task.completed:,.0f}/{task.total:,.0f} rows  {task.description}"))
        self._progress = Progress(*columns, console=Console(stderr=True), auto_refresh=False)
        self._task = self._progress.add_task("", total=done.rows, completed=done.done.total)

    def __enter__(self) -> Callable[[], None]:
        self._progress.start()
        return self._look

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def _look(self) -> None:
        self._progress.update(self._task, completed=self._done.done.total, description=facts(self._done), refresh=True)


def facts(done: Done) -> str:
    """Rates, what is left, errors, and why nothing goes on if nothing does."""
    told = [f"{done.rate:.3g} rows/s", f"{done.token_rate:,.0f} tokens/s"]
    if done.remaining_seconds is not None and done.done.total < done.rows:
        told.append(f"{timedelta(seconds=round(done.remaining_seconds))} left")
    if done.done.failed:
        told.append(f"{done.done.failed:,} errors")
    return ", ".join([*told, *([done.waiting_for] if done.waiting_for else [])])
