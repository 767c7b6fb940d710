"""Sends many requests and measures leaks: private memory of the processes, open files, threads and child processes.

The size is a number of requests, not hours, because leaks grow with requests.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from math import sqrt
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import psutil

from .client import ClientConnection, run_concurrently
from .gate import Result, Trial
from .server import Server

SAMPLES, MOST_GROWTH = 200, 16 * 2**20  # measurements; bytes that the last half may add
LEAST_FOR_SLOPE = 2_000
"""With fewer requests the slope is not checked, because a heap grows in steps of some hundred KiB."""

Body = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Memory and handles of the server's processes after a number of requests."""

    requests: int
    seconds: float
    memory: int  # bytes
    handles: tuple[int, int, int]  # files, threads, processes


@dataclass(frozen=True, slots=True)
class Soak:
    """A kind of load. `slope`: allowed growth of memory in bytes per request; `leaves`: share of aborted requests."""

    name: str
    body: Callable[[Random], Body]
    leaves: float
    slope: float
    at_once: int = 32


def soak(server: Server, plan: Soak, trial: Trial) -> Result:
    """Send `trial.size` requests, measure the server at intervals, and evaluate the growth."""
    snapshots = asyncio.run(_ask(server, plan, trial))
    if trial.folder:
        trial.folder.mkdir(parents=True, exist_ok=True)
        (trial.folder / f"{plan.name}.svg").write_text(picture(snapshots, f"{plan.name}, {trial.size:,} requests"))
    half = snapshots[len(snapshots) // 2 :]
    growth = median(look.memory for look in half[-5:]) - median(look.memory for look in half[:5])
    slope, upper = theil_sen([(look.requests, look.memory) for look in half])
    kept = [after - before for before, after in zip(snapshots[0].handles, snapshots[-1].handles, strict=True)]
    figures = {
        "MiB": snapshots[-1].memory / 2**20,
        "last half MiB": growth / 2**20,
        "bytes per request": slope,
        "at most": upper,
        "leaked files, threads, processes": ", ".join(map(str, kept)),
        "requests/s": trial.size / snapshots[-1].seconds,
    }
    level = upper <= plan.slope or trial.size < LEAST_FOR_SLOPE
    return Result(growth <= MOST_GROWTH and level and not any(kept) and server.alive(), figures)


async def _ask(server: Server, plan: Soak, trial: Trial) -> list[Snapshot]:
    start, every = time.monotonic(), max(1, trial.size // SAMPLES)
    first = await _wait_for_stable_handles(server, plan, trial)
    snapshots = [_take_snapshot(server, 0, 0)]

    async def send_item(connection: ClientConnection, item: tuple[int, Body, int | None]) -> None:
        number, body, abandoned = item
        if abandoned is not None:
            await connection.ask_and_disconnect(body, abandoned)
        else:
            reply = await connection.ask(body)
            assert reply.status in (200, 400), reply.body
        if number % every == 0:
            snapshots.append(_take_snapshot(server, number, time.monotonic() - start))
            trial.say(f"{plan.name} {number}, {snapshots[-1].memory / 2**20:.1f} MiB")

    await run_concurrently(server, _bodies(plan, trial.size, Random(trial.seed)), send_item, plan.at_once)
    last = await _wait_for_stable_handles(server, plan, trial)
    snapshots[0] = Snapshot(0, 0, snapshots[0].memory, first)
    return [*snapshots, Snapshot(trial.size, time.monotonic() - start, snapshots[-1].memory, last)]


def _bodies(plan: Soak, size: int, random: Random) -> Iterator[tuple[int, Body, int | None]]:
    for number in range(1, size + 1):
        abandoned = random.randrange(4) if random.random() < plan.leaves else None
        yield number, plan.body(random), abandoned


async def _wait_for_stable_handles(server: Server, plan: Soak, trial: Trial) -> tuple[int, int, int]:
    """Wait until nothing runs and connections are closed. Returns the handles. First opens lazy ones."""
    if trial.size > plan.at_once:
        few = _bodies(plan, plan.at_once, Random(0))
        await run_concurrently(server, few, lambda connection, item: connection.ask(item[1]), plan.at_once)
    seen: list[tuple[int, int, int]] = []
    for _ in range(100):
        await asyncio.sleep(0.1)
        seen.append(_take_snapshot(server, 0, 0).handles)
        if len(seen) > 5 and len(set(seen[-5:])) == 1:
            break
    return seen[-1]


def _take_snapshot(server: Server, requests: int, seconds: float) -> Snapshot:
    processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    memory = sum(_own_memory(process.pid) for process in processes)
    handles = sum(map(_files, processes)), sum(each.num_threads() for each in processes), len(processes)
    return Snapshot(requests, seconds, memory, handles)


def _files(process: psutil.Process) -> int:
    """The number of open files; 0 if this process may not read it (the worker's needs root)."""
    try:
        return int(process.num_fds())
    except psutil.AccessDenied:
        return 0


def _own_memory(pid: int) -> int:
    """Private memory of a process, swapped out or not. Excludes mapped files, whose pages come and go."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "VmSwap"))


def theil_sen(points: list[tuple[int, int]]) -> tuple[float, float]:
    """The median slope between all pairs of points, and its upper bound with 97.5 % confidence."""
    slopes = sorted((y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in combinations(points, 2) if x1 != x2)
    spread = 1.96 * sqrt(len(points) * (len(points) - 1) * (2 * len(points) + 5) / 18)
    return median(slopes), slopes[min(len(slopes) - 1, int((len(slopes) + spread) / 2))]


def picture(snapshots: list[Snapshot], title: str) -> str:
    """Memory over requests, as SVG."""
    width, height, left, top = 720, 240, 60, 30
    most = max(look.memory for look in snapshots) * 1.1
    across = [left + look.requests / snapshots[-1].requests * (width - left - 20) for look in snapshots]
    down = [top + (1 - look.memory / most) * (height - 2 * top) for look in snapshots]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, down, strict=True))
    bottom = height - top
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">
<rect width="100%" height="100%" fill="white"/>
<text font-size="12" x="{left}" y="18">{title}: MiB of the server's own memory</text>
<path d="M{left} {top}V{bottom}H{width - 20}" fill="none" stroke="gray"/>
<text font-size="12" x="{left - 8}" y="{bottom}" text-anchor="end">0</text>
<text font-size="12" x="{left - 8}" y="{top + 8}" text-anchor="end">{most / 2**20:.0f}</text>
<text font-size="12" x="{width - 20}" y="{height - 12}" text-anchor="end">{snapshots[-1].requests:,} requests</text>
<polyline points="{line}" fill="none" stroke="black"/>
</svg>
"""
