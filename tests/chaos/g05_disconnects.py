"""G5: a client that disconnects at any moment soon frees its sequences, files and threads."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from random import Random
from statistics import median
from typing import Any

import psutil
import pytest

from afterword.engine.parent.supervisor import Supervisor

from .client import ClientConnection, run_concurrently
from .gate import Fault, Gate, Result, Trial
from .server import Server

CLIENTS, LOOKS = 32, 20
IDLE_WITHIN, SOON = 2.0, 0.25  # seconds
LONG = {"max_tokens": 400, "ignore_eos": True}

Held = tuple[int, int, int]


def run(trial: Trial) -> Result:
    with trial.serve("--parallel", "8", "--context", "512") as server:
        before = _held_after_disconnects(server, trial, 2 * CLIENTS)
        idle = _idle(server, IDLE_WITHIN)
        after = _held_after_disconnects(server, trial, trial.size) if idle else before
        waits = [_cancel(server) for _ in range(LOOKS)] if idle else []
        idle = idle and _idle(server, IDLE_WITHIN)
        kept = [now - then for then, now in zip(before, after, strict=True)]
    soon = bool(waits) and median(waits) <= SOON
    figures: dict[str, Any] = {"idle": str(idle), "leaked files, threads, processes": ", ".join(map(str, kept))}
    figures |= (
        {"ms until a cancelled sequence is free": 1000 * median(waits), "at most": 1000 * max(waits)} if waits else {}
    )
    return Result(idle and not any(kept) and soon, figures)


def _held_after_disconnects(server: Server, trial: Trial, size: int) -> Held:
    """Files, threads and processes of the server after `size` disconnects."""
    asyncio.run(
        run_concurrently(server, _abandoned_requests(Random(trial.seed), trial, size), _send_and_disconnect, CLIENTS)
    )
    _idle(server, IDLE_WITHIN)
    time.sleep(0.5)  # the server handles closed connections one after the other
    processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children()]
    return sum(map(_files, processes)), sum(each.num_threads() for each in processes), len(processes)


def _files(process: psutil.Process) -> int:
    """The number of open files; 0 if this process may not read it (the worker's needs root)."""
    try:
        return int(process.num_fds())
    except psutil.AccessDenied:
        return 0


def _abandoned_requests(random: Random, trial: Trial, size: int) -> Iterator[tuple[dict[str, Any], int]]:
    """Requests, and the number of reads after which the client disconnects; 0: before the response begins."""
    for done in range(size):
        trial.say(f"G5 {done}")
        text = f"{random.getrandbits(64):016x} " * random.choice((1, 1, 12))
        body = LONG | {"prompt": [text] * random.choice((1, 1, 3)), "stream": random.random() < 0.7}
        yield body, random.choice((0, 1, 2, random.randint(3, 40))) if body["stream"] else 0


async def _send_and_disconnect(connection: ClientConnection, item: tuple[dict[str, Any], int]) -> None:
    body, after = item
    abandoned = asyncio.create_task(connection.ask_and_disconnect(body, after))
    if after == 0:
        await asyncio.sleep(0.001 * (len(body["prompt"][0]) % 7))
    await abandoned


def _idle(server: Server, seconds: float) -> bool:
    """Whether no sequence runs or waits within this many seconds."""
    end = time.monotonic() + seconds
    while (load := server.load())["running"] or load["waiting"]:
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def _cancel(server: Server) -> float:
    """Seconds from a client's disconnect until its sequence is free."""
    with server.http() as client:
        with client.stream("POST", "/v1/completions", json=LONG | {"prompt": "One day", "stream": True}) as answer:
            next(answer.iter_bytes())
        start = time.monotonic()
        while client.get("/ready").json()["running"] and time.monotonic() < start + IDLE_WITHIN:
            time.sleep(0.005)
        return time.monotonic() - start


def keep_the_slot(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Supervisor, "end", lambda *_: None)


GATE = Gate(
    name="G5",
    goal="a client that disconnects at any moment frees its sequences, files and threads",
    unit="disconnects",
    commit=500,
    nightly=10_000,
    run=run,
    fault=Fault("the supervisor does not cancel the job of a disconnected client", "server", keep_the_slot),
    planted=20,
)
