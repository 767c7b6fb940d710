"""G11: clients that send slowly or do not read are disconnected, and do not slow down other clients."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable
from contextlib import suppress

import psutil
import pytest

from afterword.transport.connection import Connection

from .client import Caller, late
from .gate import Fault, Gate, Result, Trial
from .server import Server

GOOD, OF_ONE = 20, 50  # good clients; connections from one bad address
GROWTH, LIMIT = 64, 15.0  # MiB; seconds in which all bad ones must be gone
PAUSE = 0.1  # seconds between clients that do not read: a burst of requests would measure load, not slow readers
_SHORT = {"prompt": "a", "max_tokens": 8, "ignore_eos": True}
_LONG = {
    "prompt": [97] * 240,
    "echo": True,
    "logprobs": 15,
    "n": 32,
    "max_tokens": 4,
    "ignore_eos": True,
    "stream": True,
}
"""Eight megabytes of answer, more than any buffer on the way takes."""


def run(trial: Trial) -> Result:
    options = ["--parallel", "32", "--context", "256"]
    options += [
        f"--limit={limit}" for limit in ("head_seconds=2", "rest_seconds=1", "stall_seconds=2", "max_per_peer=64")
    ]
    with trial.serve(*options, scripted=True) as server:
        return asyncio.run(_besiege(server, trial))


async def _besiege(server: Server, trial: Trial) -> Result:
    """As many drip as the size says, and a fifth as many do not read."""
    await _ask_well(server, lambda: False)
    before = await _ask_well(server, lambda: False)
    memory = server.memory
    crowd = [_peer(index) for index in range(trial.size)]
    bad = [asyncio.create_task(_drip(server, peer)) for peer in crowd]
    bad += [asyncio.create_task(_stare(server, peer, PAUSE * i)) for i, peer in enumerate(crowd[: trial.size // 5])]
    come = time.monotonic() + PAUSE * (trial.size // 5)

    def besieged() -> bool:
        now = time.monotonic()
        return now < come or (now < come + LIMIT and bool(_bad_ones(server)))

    await asyncio.sleep(0.5)
    during = await _ask_well(server, besieged)
    left = _bad_ones(server)
    grown = server.memory - memory
    for task in bad:
        task.cancel()
    await asyncio.gather(*bad, return_exceptions=True)
    failed = during.count(None)
    usual, worst = late(before), late(during)
    idle = await _idle(server)
    figures = {
        "dripping": trial.size,
        "not reading": trial.size // 5,
        "not cut": left,
        "good answers": len(during) - failed,
        "failed": failed,
        "p99 ms": f"{usual * 1000:.0f}, then {worst * 1000:.0f}",
        "MiB grown": round(grown, 1),
        "idle after": "yes" if idle else "no",
    }
    return Result(not left and not failed and idle and grown <= GROWTH and worst <= 5 * usual + 0.5, figures)


async def _ask_well(server: Server, again: Callable[[], bool]) -> list[float | None]:
    """Seconds of short responses of good clients that send ten requests each; None: the request failed."""
    times: list[float | None] = []

    async def ask() -> None:
        caller, asked = Caller(server), 0
        while asked < 10 or again():
            start = time.monotonic()
            reply = await caller.ask(_SHORT)
            times.append(time.monotonic() - start if reply.status == 200 else None)
            asked += 1
            await asyncio.sleep(0.02)
        caller.leave()

    await asyncio.gather(*(ask() for _ in range(GOOD)))
    return times


async def _drip(server: Server, peer: str) -> None:
    """Send a request a byte at a time, until the server has had enough."""
    with suppress(OSError):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, local_addr=(peer, 0))
        writer.write(b"POST /v1/completions HTTP/1.1\r\n")
        ended = asyncio.create_task(reader.read())
        while not ended.done():
            writer.write(b"X")
            await asyncio.wait((ended,), timeout=0.5)
        writer.close()


async def _stare(server: Server, peer: str, wait: float) -> None:
    """Ask for much, after a while, and read nothing of it."""
    await asyncio.sleep(wait)
    body = json.dumps(_LONG).encode()
    lines = ("POST /v1/completions HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json")
    head = "\r\n".join((*lines, f"Content-Length: {len(body)}", "", ""))
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        deaf.setblocking(False)
        deaf.bind((peer, 0))
        with suppress(OSError):
            await asyncio.get_running_loop().sock_connect(deaf, ("127.0.0.1", server.port))
            await asyncio.get_running_loop().sock_sendall(deaf, head.encode() + body)
            await asyncio.sleep(2 * LIMIT)


def _peer(index: int) -> str:
    return f"127.0.1.{1 + index // OF_ONE}"


def _bad_ones(server: Server) -> int:
    """How many of them the server still has."""
    open_ones = psutil.Process(server.pid).net_connections(kind="tcp")
    return sum(bool(each.raddr) and each.raddr.ip.startswith("127.0.1.") for each in open_ones)


async def _idle(server: Server) -> bool:
    for _ in range(100):
        load = await asyncio.to_thread(server.load)
        if load["running"] == load["waiting"] == 0:
            return True
        await asyncio.sleep(0.1)
    return False


def never_look(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Connection, "check", lambda *_: None)


GATE = Gate(
    name="G11",
    goal="slow senders and slow readers are disconnected, and do not slow down other clients",
    unit="slow senders",
    commit=200,
    nightly=900,
    run=run,
    fault=Fault("nobody looks at the clock", "server", never_look),
    planted=20,
)
