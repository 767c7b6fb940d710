"""A process that disturbs a server while a gate measures well-behaved clients.

`disturbance` starts the process; `disturb` runs in it.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from . import ROOT
from .server import Server

Disturb = Callable[[Callable[[], None]], Coroutine[Any, Any, None]]
"""A task that runs until it is cancelled and calls its argument once for each request that it has sent."""


@contextmanager
def disturbance(module: str, server: Server, *arguments: str) -> Iterator[list[int]]:
    """Run a module of this package that calls `disturb`. At the end the yielded list holds the number of requests sent.

    The process has the lowest priority: it represents other machines, which take no CPU time from the server.
    """
    command = ["nice", "-n", "19", sys.executable, "-m", f"tests.chaos.{module}", str(server.port), *arguments]
    sent = [0]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()  # the first request was sent
        yield sent
        output, _ = process.communicate("stop\n")
        sent[0] = int(output)


def disturb(*tasks: Disturb) -> None:
    """Run tasks until a line arrives on stdin. Prints a line after the first request, then the number of requests."""
    asyncio.run(_disturb(tasks))


async def _disturb(tasks: tuple[Disturb, ...]) -> None:
    sent, begun = 0, asyncio.Event()

    def count() -> None:
        nonlocal sent
        sent += 1
        begun.set()

    running = [asyncio.create_task(task(count)) for task in tasks]
    await begun.wait()
    print("begun", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    print(sent)
