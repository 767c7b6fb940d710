"""Shows a progress bar for each model while it is loaded. Without a terminal on standard error it shows nothing."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import NoReturn

from afterword.system.tasks import supervised

_DELAY_SECONDS = 1.0  # before a bar is shown: most small models are loaded by then
_REFRESH_SECONDS = 0.25


@asynccontextmanager
async def show_loading(models: Mapping[str, Callable[[], float]]) -> AsyncIterator[None]:
    """Show progress bars inside the `async with` block. `models`: by name, functions for the loaded share (0 to 1)."""
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
    from rich.console import Console  # imported late: it is not needed if models load fast
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    columns = (TextColumn("Loading {task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as progress:
        tasks = {name: progress.add_task(name, total=1.0) for name in models}
        while True:
            for name, share in models.items():
                progress.update(tasks[name], completed=share())
            await asyncio.sleep(_REFRESH_SECONDS)
