"""G10: three times as many requests as the queue holds: throughput stays, the excess is refused quickly."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest

from afterword.engine.parent.supervisor import Supervisor

from .client import ClientConnection, run_concurrently
from .gate import Fault, Gate, Result, Trial
from .server import Server

SEQUENCES, QUEUE = 8, 16
OVERLOADED = 503
CAPACITY = SEQUENCES + QUEUE
SLOWEST, GROWTH = 1.0, 32  # seconds for a refusal (99th percentile); MiB
_BODY: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 24, "ignore_eos": True}


@dataclass
class Tally:
    """Counts of responses. `refusals` are times in seconds; `wrong` counts all other errors."""

    answers: int = 0
    refusals: list[float] = field(default_factory=list)
    wrong: int = 0
    longest: int = 0  # of the queue


def run(trial: Trial) -> Result:
    with trial.serve("--parallel", str(SEQUENCES), "--context", "256", "--max-queue", str(QUEUE)) as server:
        return asyncio.run(_measure(server, trial))


async def _measure(server: Server, trial: Trial) -> Result:
    usual, crowded, after = Tally(), Tally(), Tally()
    peak = await _rate(server, usual, trial, CAPACITY)
    before = server.memory
    rate = await _rate(server, crowded, trial, 3 * CAPACITY)
    grown = server.memory - before
    await _rate(server, after, Trial(CAPACITY, trial.seed), SEQUENCES)
    refusals = sorted(crowded.refusals) or [0.0]
    p99 = refusals[int(len(refusals) * 0.99)]
    good = (
        not (usual.wrong + crowded.wrong + after.wrong)
        and crowded.longest <= CAPACITY
        and rate >= peak / 2
        and p99 <= SLOWEST
        and grown <= GROWTH
        and not after.refusals
    )
    figures = {
        "responses/s": f"{peak:.0f}, then {rate:.0f}",
        "refused": len(crowded.refusals),
        "refusals, ms": f"median {refusals[len(refusals) // 2] * 1000:.0f}, p99 {p99 * 1000:.0f}",
        "longest queue": crowded.longest,
        "MiB grown": round(grown, 1),
        "wrong": usual.wrong + crowded.wrong + after.wrong,
    }
    return Result(good, figures)


async def _rate(server: Server, tally: Tally, trial: Trial, connections: int) -> float:
    """Responses per second while so many clients send until each has its response; a refused client retries."""
    random, start = Random(trial.seed), time.monotonic()
    watching = asyncio.create_task(_watch(server, tally))

    async def send_item(connection: ClientConnection, _: int) -> None:
        while (status := await _ask(connection, tally)) == OVERLOADED:
            await asyncio.sleep(random.uniform(0.1, 0.5))
        tally.answers += status == 200
        tally.wrong += status != 200
        trial.say(f"G10 {tally.answers}")

    await run_concurrently(server, range(trial.size), send_item, connections)
    rate = tally.answers / (time.monotonic() - start)
    watching.cancel()
    return rate


async def _ask(connection: ClientConnection, tally: Tally) -> int:
    start = time.monotonic()
    reply = await connection.ask(_BODY)
    if reply.status == OVERLOADED:
        tally.refusals.append(time.monotonic() - start)
        tally.wrong += reply.json()["error"]["code"] != "server_is_overloaded"
    return reply.status


async def _watch(server: Server, tally: Tally) -> None:
    async with server.async_http() as client:
        while True:
            tally.longest = max(tally.longest, (await client.get("/ready")).json()["waiting"])
            await asyncio.sleep(0.05)


def disable_queue_limit(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Supervisor, "_check_capacity", lambda *_: None)


GATE = Gate(
    name="G10",
    goal="three times too many requests: throughput stays, the excess is refused quickly",
    unit="requests",
    commit=300,
    nightly=20_000,
    run=run,
    fault=Fault("the queue has no limit", "server", disable_queue_limit),
    planted=150,
)
