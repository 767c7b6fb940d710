"""How far models are loaded, on a terminal: a bar each, which is gone when they are there. Elsewhere nothing."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import NoReturn

from afterword.system.tasks import supervised

_DELAY_SECONDS = 1.0  # seconds before anything is shown: most small models are loaded by then
_REFRESH_SECONDS = 0.25


@asynccontextmanager
async def show_loading(models: Mapping[str, Callable[[], float]]) -> AsyncIterator[None]:
    """Show the share that is loaded of each, by its name, until the end."""
    if not sys.stderr.isatty():
        yield
        return
    showing = supervised(partial(_show, models), "progress display")
    try:
        yield
    finally:
        showing.cancel()
        await asyncio.gather(showing, return_exceptions=True)


async def _show(models: Mapping[str, Callable[[], float]]) -> NoReturn:
    await asyncio.sleep(_DELAY_SECONDS)
    from rich.console import Console  # whoever need not wait for the model need not wait for it either
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    columns = (TextColumn("Loading {task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as progress:
        tasks = {name: progress.add_task(name, total=1.0) for name in models}
        while True:
            for name, share in models.items():
                progress.update(tasks[name], completed=share())
            await asyncio.sleep(_REFRESH_SECONDS)
