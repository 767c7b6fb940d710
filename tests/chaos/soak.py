"""Many requests, and what they leave behind: memory that is the processes' own, files, threads, children.

Requests are counted, not hours: what leaks, leaks by the request.
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

from .client import Caller, crowd
from .gate import Result, Trial
from .server import Server

SAMPLES, MOST_GROWTH = 200, 16 * 2**20  # looks at the memory, bytes that the last half may add
LEAST_FOR_SLOPE = 2_000
"""Requests below which a slope says nothing: a heap grows by steps of some hundred KiB."""

Body = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Look:
    """What the server's processes hold after so many requests."""

    requests: int
    seconds: float
    memory: int  # bytes
    handles: tuple[int, int, int]  # files, threads, processes


@dataclass(frozen=True, slots=True)
class Soak:
    """A way to soak a server. `slope`: how much its memory may grow, in bytes a request; `leaves`: share of aborts."""

    name: str
    body: Callable[[Random], Body]
    leaves: float
    slope: float
    at_once: int = 32


def soak(server: Server, plan: Soak, trial: Trial) -> Result:
    """Ask `trial.size` times, look at the server now and then, and judge."""
    looks = asyncio.run(_ask(server, plan, trial))
    if trial.folder:
        trial.folder.mkdir(parents=True, exist_ok=True)
        (trial.folder / f"{plan.name}.svg").write_text(picture(looks, f"{plan.name}, {trial.size:,} requests"))
    half = looks[len(looks) // 2 :]
    growth = median(look.memory for look in half[-5:]) - median(look.memory for look in half[:5])
    slope, upper = theil_sen([(look.requests, look.memory) for look in half])
    kept = [after - before for before, after in zip(looks[0].handles, looks[-1].handles, strict=True)]
    figures = {
        "MiB": looks[-1].memory / 2**20,
        "last half MiB": growth / 2**20,
        "bytes a request": slope,
        "at most": upper,
        "files, threads, processes kept": ", ".join(map(str, kept)),
        "requests/s": trial.size / looks[-1].seconds,
    }
    level = upper <= plan.slope or trial.size < LEAST_FOR_SLOPE
    return Result(growth <= MOST_GROWTH and level and not any(kept) and server.alive(), figures)


async def _ask(server: Server, plan: Soak, trial: Trial) -> list[Look]:
    start, every = time.monotonic(), max(1, trial.size // SAMPLES)
    first = await _still(server, plan, trial)
    looks = [_look(server, 0, 0)]

    async def visit(caller: Caller, item: tuple[int, Body, int | None]) -> None:
        number, body, leaving = item
        if leaving is not None:
            await caller.ask_and_leave(body, leaving)
        else:
            reply = await caller.ask(body)
            assert reply.status in (200, 400), reply.body
        if number % every == 0:
            looks.append(_look(server, number, time.monotonic() - start))
            trial.say(f"{plan.name} {number}, {looks[-1].memory / 2**20:.1f} MiB")

    await crowd(server, _bodies(plan, trial.size, Random(trial.seed)), visit, plan.at_once)
    last = await _still(server, plan, trial)
    looks[0] = Look(0, 0, looks[0].memory, first)
    return [*looks, Look(trial.size, time.monotonic() - start, looks[-1].memory, last)]


def _bodies(plan: Soak, size: int, random: Random) -> Iterator[tuple[int, Body, int | None]]:
    for number in range(1, size + 1):
        leaving = random.randrange(4) if random.random() < plan.leaves else None
        yield number, plan.body(random), leaving


async def _still(server: Server, plan: Soak, trial: Trial) -> tuple[int, int, int]:
    """The handles once nothing runs and every connection is gone; before the soak, after as much of it as opens all."""
    if trial.size > plan.at_once:
        few = _bodies(plan, plan.at_once, Random(0))
        await crowd(server, few, lambda caller, item: caller.ask(item[1]), plan.at_once)
    seen: list[tuple[int, int, int]] = []
    for _ in range(100):
        await asyncio.sleep(0.1)
        seen.append(_look(server, 0, 0).handles)
        if len(seen) > 5 and len(set(seen[-5:])) == 1:
            break
    return seen[-1]


def _look(server: Server, requests: int, seconds: float) -> Look:
    processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    memory = sum(_own_memory(process.pid) for process in processes)
    handles = sum(map(_files, processes)), sum(each.num_threads() for each in processes), len(processes)
    return Look(requests, seconds, memory, handles)


def _files(process: psutil.Process) -> int:
    """Open files; of the engine's process only root may know."""
    try:
        return int(process.num_fds())
    except psutil.AccessDenied:
        return 0


def _own_memory(pid: int) -> int:
    """Memory that is the process's own, swapped out or not; files that it maps come and go as they are read."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "VmSwap"))


def theil_sen(points: list[tuple[int, int]]) -> tuple[float, float]:
    """The median slope between all pairs of points, and its upper bound with 97.5 % confidence."""
    slopes = sorted((y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in combinations(points, 2) if x1 != x2)
    spread = 1.96 * sqrt(len(points) * (len(points) - 1) * (2 * len(points) + 5) / 18)
    return median(slopes), slopes[min(len(slopes) - 1, int((len(slopes) + spread) / 2))]


def picture(looks: list[Look], title: str) -> str:
    """Memory over requests, as SVG."""
    width, height, left, top = 720, 240, 60, 30
    most = max(look.memory for look in looks) * 1.1
    across = [left + look.requests / looks[-1].requests * (width - left - 20) for look in looks]
    down = [top + (1 - look.memory / most) * (height - 2 * top) for look in looks]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, down, strict=True))
    bottom = height - top
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">
<rect width="100%" height="100%" fill="white"/>
<text font-size="12" x="{left}" y="18">{title}: MiB of the server's own memory</text>
<path d="M{left} {top}V{bottom}H{width - 20}" fill="none" stroke="gray"/>
<text font-size="12" x="{left - 8}" y="{bottom}" text-anchor="end">0</text>
<text font-size="12" x="{left - 8}" y="{top + 8}" text-anchor="end">{most / 2**20:.0f}</text>
<text font-size="12" x="{width - 20}" y="{height - 12}" text-anchor="end">{looks[-1].requests:,} requests</text>
<polyline points="{line}" fill="none" stroke="black"/>
</svg>
"""
