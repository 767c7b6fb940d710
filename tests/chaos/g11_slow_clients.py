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

from .client import ClientConnection, p99
from .gate import Fault, Gate, Result, Trial
from .server import Server

GOOD, OF_ONE = 20, 50  # good clients; connections from one bad address
GROWTH, LIMIT = 64, 15.0  # MiB; seconds within which all bad connections must be closed
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
"""Its response has eight megabytes, more than all buffers between server and client hold."""


def run(trial: Trial) -> Result:
    options = ["--parallel", "32", "--context", "256"]
    options += [
        f"--limit={limit}" for limit in ("head_seconds=2", "rest_seconds=1", "stall_seconds=2", "max_per_peer=64")
    ]
    with trial.serve(*options, scripted=True) as server:
        return asyncio.run(_measure_under_attack(server, trial))


async def _measure_under_attack(server: Server, trial: Trial) -> Result:
    """Run `trial.size` clients that send slowly, and a fifth as many that do not read."""
    await _measure_good_clients(server, lambda: False)
    before = await _measure_good_clients(server, lambda: False)
    memory = server.memory
    peers = [_peer(index) for index in range(trial.size)]
    bad = [asyncio.create_task(_send_slowly(server, peer)) for peer in peers]
    bad += [
        asyncio.create_task(_read_nothing(server, peer, PAUSE * i)) for i, peer in enumerate(peers[: trial.size // 5])
    ]
    come = time.monotonic() + PAUSE * (trial.size // 5)

    def attack_continues() -> bool:
        now = time.monotonic()
        return now < come or (now < come + LIMIT and bool(_open_bad_connections(server)))

    await asyncio.sleep(0.5)
    during = await _measure_good_clients(server, attack_continues)
    left = _open_bad_connections(server)
    grown = server.memory - memory
    for task in bad:
        task.cancel()
    await asyncio.gather(*bad, return_exceptions=True)
    failed = during.count(None)
    usual, worst = p99(before), p99(during)
    idle = await _idle(server)
    figures = {
        "slow senders": trial.size,
        "not reading": trial.size // 5,
        "still connected": left,
        "good responses": len(during) - failed,
        "failed": failed,
        "p99 ms": f"{usual * 1000:.0f}, then {worst * 1000:.0f}",
        "MiB grown": round(grown, 1),
        "idle after": "yes" if idle else "no",
    }
    return Result(not left and not failed and idle and grown <= GROWTH and worst <= 5 * usual + 0.5, figures)


async def _measure_good_clients(server: Server, again: Callable[[], bool]) -> list[float | None]:
    """Seconds of short responses of good clients that send ten requests each; None: the request failed."""
    times: list[float | None] = []

    async def ask() -> None:
        connection, asked = ClientConnection(server), 0
        while asked < 10 or again():
            start = time.monotonic()
            reply = await connection.ask(_SHORT)
            times.append(time.monotonic() - start if reply.status == 200 else None)
            asked += 1
            await asyncio.sleep(0.02)
        connection.leave()

    await asyncio.gather(*(ask() for _ in range(GOOD)))
    return times


async def _send_slowly(server: Server, peer: str) -> None:
    """Send a request one byte at a time until the server closes the connection."""
    with suppress(OSError):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, local_addr=(peer, 0))
        writer.write(b"POST /v1/completions HTTP/1.1\r\n")
        ended = asyncio.create_task(reader.read())
        while not ended.done():
            writer.write(b"X")
            await asyncio.wait((ended,), timeout=0.5)
        writer.close()


async def _read_nothing(server: Server, peer: str, wait: float) -> None:
    """After `wait` seconds request a large response and read nothing of it."""
    await asyncio.sleep(wait)
    body = json.dumps(_LONG).encode()
    lines = ("POST /v1/completions HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json")
    head = "\r\n".join((*lines, f"Content-Length: {len(body)}", "", ""))
    with socket.socket() as unread:
        unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        unread.setblocking(False)
        unread.bind((peer, 0))
        with suppress(OSError):
            await asyncio.get_running_loop().sock_connect(unread, ("127.0.0.1", server.port))
            await asyncio.get_running_loop().sock_sendall(unread, head.encode() + body)
            await asyncio.sleep(2 * LIMIT)


def _peer(index: int) -> str:
    return f"127.0.1.{1 + index // OF_ONE}"


def _open_bad_connections(server: Server) -> int:
    """The number of bad connections that are still open."""
    open_ones = psutil.Process(server.pid).net_connections(kind="tcp")
    return sum(bool(each.raddr) and each.raddr.ip.startswith("127.0.1.") for each in open_ones)


async def _idle(server: Server) -> bool:
    for _ in range(100):
        load = await asyncio.to_thread(server.load)
        if load["running"] == load["waiting"] == 0:
            return True
        await asyncio.sleep(0.1)
    return False


def disable_deadlines(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Connection, "check", lambda *_: None)


GATE = Gate(
    name="G11",
    goal="slow senders and slow readers are disconnected, and do not slow down other clients",
    unit="slow senders",
    commit=200,
    nightly=900,
    run=run,
    fault=Fault("the deadlines of connections are not checked", "server", disable_deadlines),
    planted=20,
)
