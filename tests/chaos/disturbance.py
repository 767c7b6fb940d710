"""A process that disturbs a server while good clients are measured: what starts it, and what runs in it."""

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
"""Goes on until it is cancelled, and calls its argument for each request that it has sent."""


@contextmanager
def disturbance(module: str, server: Server, *arguments: str) -> Iterator[list[int]]:
    """A module from here that calls `disturb`, until the end; then how many requests it sent.

    Its process has the lowest priority: it stands for other machines, and their work takes no time from the server's.
    """
    command = ["nice", "-n", "19", sys.executable, "-m", f"tests.chaos.{module}", str(server.port), *arguments]
    sent = [0]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()  # it has begun
        yield sent
        output, _ = process.communicate("stop\n")
        sent[0] = int(output)


def disturb(*tasks: Disturb) -> None:
    """Run tasks until a line comes in. Prints a line when the first request is sent, and how many there were."""
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
