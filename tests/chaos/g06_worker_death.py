"""G6: the worker is killed, stopped and aborted under load. Every response is whole, and `/ready` reports the state."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest

from afterword.engine.parent.pending_job import PendingJob

from .client import TIMEOUT, ClientConnection, Reply
from .gate import Fault, Gate, Result, Trial
from .server import Server

STREAMS, QUEUED = 16, 8
HANG = 5.0  # seconds without a heartbeat; the default of 15 would make the gate slower
DEATHS = (signal.SIGKILL, signal.SIGSTOP, signal.SIGABRT)
NOTICED, NOTICED_HANG, REPLACED, ENDED = 0.1, HANG + 2.0, 2.0, 5.0  # upper bounds in seconds
LOOK = 0.01  # seconds between two requests for /ready


class Snapshot(NamedTuple):
    """One request for /ready: times in seconds, status and number of running sequences."""

    began: float
    ended: float
    status: int
    running: int


@dataclass
class Seen:
    """The worst figures over all deaths of the worker."""

    hung: int = 0
    failed: int = 0
    wrong: int = 0
    noticed: float = 0.0
    noticed_hang: float = 0.0
    look: float = 0.0
    replaced: float = 0.0
    ended: float = 0.0
    refused: int = 0
    snapshots: list[Snapshot] = field(default_factory=list)


def run(trial: Trial) -> Result:
    shape = ("--parallel", str(STREAMS), "--context", "256", "--limit", f"hang_seconds={HANG}")
    with trial.serve(*shape) as server:
        seen = asyncio.run(_deaths(server, trial))
    good = not (seen.hung or seen.failed or seen.wrong or seen.refused)
    noticed = seen.noticed <= NOTICED + seen.look and seen.noticed_hang <= NOTICED_HANG
    return Result(
        good and noticed and seen.replaced <= REPLACED and seen.ended <= ENDED,
        {
            "hung": seen.hung,
            "incomplete": seen.failed,
            "changed texts": seen.wrong,
            "refused afterwards": seen.refused,
            "ms until /ready reports it": 1000 * seen.noticed,
            "slowest /ready, ms": 1000 * seen.look,
            "s until a hang is reported": seen.noticed_hang,
            "s until the next worker starts": seen.replaced,
            "s until the last response": seen.ended,
        },
    )


async def _deaths(server: Server, trial: Trial) -> Seen:
    random, seen = Random(trial.seed), Seen()
    bodies = [_body(random) for _ in range(STREAMS + QUEUED)]
    connections = [ClientConnection(server) for _ in bodies]
    alone = [_text(await connections[0].ask(body)) for body in bodies]
    watching = asyncio.create_task(_watch(server, seen))
    await _until(lambda: bool(seen.snapshots))
    for number in range(trial.size):
        trial.say(f"G6 {number}")
        how = DEATHS[number % len(DEATHS)]
        asking = [asyncio.create_task(_ask(*pair, seen)) for pair in zip(connections, bodies, strict=True)]
        await _until(lambda: seen.snapshots[-1].running == STREAMS)
        await asyncio.sleep(random.uniform(0, 0.1))
        worker = server.worker()
        gone = asyncio.create_task(_wait_for_exit(worker.pid))
        await asyncio.sleep(0)
        start = time.monotonic()
        worker.send_signal(how)
        if how != signal.SIGSTOP:
            start = await gone
        texts = await asyncio.gather(*asking)
        over = time.monotonic()
        _judge(seen, start, over, _began(server.worker().pid), how)
        seen.wrong += sum(answer is not None and answer != text for answer, text in zip(texts, alone, strict=True))
        seen.refused += (await connections[0].ask({"prompt": "a", "max_tokens": 1})).status != 200
    watching.cancel()
    for connection in connections:
        connection.leave()
    return seen


def _judge(seen: Seen, start: float, over: float, began: float, how: signal.Signals) -> None:
    """Evaluate `/ready` between a death at `start` and the last response. `began`: start time of the next worker."""
    after = [look for look in seen.snapshots if look.ended >= start]
    down = next((look.ended for look in after if look.status != 200), over + TIMEOUT)
    up = next((look.ended for look in after if look.ended > down and look.status == 200), over)
    # The interval ends when the last outdated check begins: the duration of a check depends on the machine.
    wrong = max((look.began - start for look in after if look.ended < down), default=0.0)
    if how == signal.SIGSTOP:
        seen.noticed_hang = max(seen.noticed_hang, wrong)
    elif wrong > seen.noticed:
        seen.noticed = wrong
        seen.look = max(
            look.ended - look.began for look in after if look.ended <= down
        )  # the response time of the server
    seen.replaced = max(seen.replaced, began - down)  # without the loading time, which depends on the machine
    seen.ended = max(seen.ended, over - up)


async def _wait_for_exit(pid: int) -> float:
    """Wait for the end of a process and return its time. On a busy machine it is some time after the signal."""
    file, ended = os.pidfd_open(pid), asyncio.Event()
    asyncio.get_running_loop().add_reader(file, ended.set)
    await ended.wait()
    now = time.monotonic()
    asyncio.get_running_loop().remove_reader(file)
    os.close(file)
    return now


def _began(pid: int) -> float:
    """The start time of a process, on the clock of `time.monotonic`."""
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return ticks / os.sysconf("SC_CLK_TCK") - time.clock_gettime(time.CLOCK_BOOTTIME) + time.monotonic()


async def _watch(server: Server, seen: Seen) -> None:
    """Request `/ready` repeatedly."""
    async with server.async_http() as client:
        while True:
            began = time.monotonic()
            answer = await client.get("/ready")
            seen.snapshots.append(Snapshot(began, time.monotonic(), answer.status_code, answer.json()["running"]))
            await asyncio.sleep(LOOK)


async def _ask(connection: ClientConnection, body: dict[str, Any], seen: Seen) -> str | None:
    """The text of a response; None if it is missing or incomplete."""
    try:
        reply = await connection.ask(body)
    except TimeoutError:
        seen.hung += 1
        return None
    if reply.status != 200 or reply.events()[-1] != "[DONE]":
        seen.failed += 1
        return None
    return _text(reply)


def _text(reply: Reply) -> str:
    assert reply.status == 200, reply.body
    return "".join(event["choices"][0]["text"] for event in reply.events()[:-1])


def _body(random: Random) -> dict[str, Any]:
    text = f"Once upon a time {random.getrandbits(32):08x}"
    return {"prompt": text, "max_tokens": 60, "ignore_eos": True, "seed": random.getrandbits(31), "stream": True}


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT):
        while not condition():
            await asyncio.sleep(0.005)


def repeat_after_a_crash(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PendingJob, "_repeats", lambda *_: False)


GATE = Gate(
    name="G6",
    goal=f"the worker is killed, stopped, aborted under {STREAMS} streams: all end whole, none hangs, /ready says so",
    unit="deaths",
    commit=9,
    nightly=300,
    run=run,
    fault=Fault("a token is repeated after a crash", "server", repeat_after_a_crash),
    planted=1,
)
