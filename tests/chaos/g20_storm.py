"""G20: random bytes and malformed requests at the port do not disturb clients that are served."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from itertools import cycle
from random import Random
from statistics import median

import pytest

from afterword.transport.connection import Connection
from afterword.transport.error_responses import ErrorResponse
from malformed_requests import cases

from .client import ClientConnection, p99
from .disturbance import Disturb, disturb, disturbance
from .gate import Fault, Gate, Result, Trial
from .raw_socket import send_bytes
from .server import Server

GOOD, BAD = 20, 8
ROUNDS = 3
"""Calm and noisy periods alternate, so that other load on the machine affects both. The median of each counts."""
SETTLING = 2.0
"""Seconds after a noisy period until the server has closed all of its connections, deadlines included."""
_BODY = {"prompt": "Once upon a time", "max_tokens": 24, "stream": True, "ignore_eos": True}


def run(trial: Trial) -> Result:
    with trial.serve("--parallel", "8", "--limit=head_seconds=1", "--limit=body_seconds=1") as server:
        calm, noisy, noises = [], [], 0
        for number in range(ROUNDS):
            trial.say(f"G20 {number}")
            asyncio.run(_measure_good_clients(server, SETTLING))
            calm.append(asyncio.run(_measure_good_clients(server, trial.size / ROUNDS)))
            with disturbance("g20_storm", server, str(number)) as noise:
                noisy.append(asyncio.run(_measure_good_clients(server, trial.size / ROUNDS)))
            noises += noise[0]
        alive = server.alive()
    failed = sum(times.count(None) for times in calm + noisy)
    before, during = (median(p99(times) for times in rounds) for rounds in (calm, noisy))
    figures = {
        "answers": sum(len(times) for times in calm + noisy),
        "failed": failed,
        "malformed inputs": noises,
        "p99 to first token ms": f"{before * 1000:.0f}, then {during * 1000:.0f}",
    }
    calm_enough = during <= max(2 * before, before + 0.1)  # where tokens come in milliseconds, a burst doubles them
    return Result(not failed and alive and noises > 0 and calm_enough, figures)


async def _measure_good_clients(server: Server, seconds: float) -> list[float | None]:
    """Seconds to the first token of each stream of well-behaved clients; None: the stream failed."""
    times: list[float | None] = []
    end = time.monotonic() + seconds

    async def stream_repeatedly() -> None:
        connection = ClientConnection(server)
        while time.monotonic() < end:
            reply = await connection.ask(_BODY)
            times.append(reply.first if reply.status == 200 and reply.events()[-1] == "[DONE]" else None)
        connection.leave()

    await asyncio.gather(*(stream_repeatedly() for _ in range(GOOD)))
    return times


def send_noise(port: int, seed: int) -> None:
    """Send noise until a line arrives on stdin."""

    def noise_task(random: Random) -> Disturb:
        async def make(count: Callable[[], None]) -> None:
            corpus = [case.data for case in cases()]
            random.shuffle(corpus)
            for data in cycle(corpus):
                await send_bytes(port, random.choice((data, random.randbytes(random.randrange(1, 2000)))))
                count()

        return make

    disturb(*(noise_task(Random(seed * BAD + each)) for each in range(BAD)))


def block_on_rejection(patch: pytest.MonkeyPatch) -> None:
    refuse = Connection._reject

    def reject_slowly(self: Connection, refusal: ErrorResponse) -> None:
        time.sleep(0.5)
        refuse(self, refusal)

    patch.setattr(Connection, "_reject", reject_slowly)


GATE = Gate(
    name="G20",
    goal=f"noise at the port does not disturb {GOOD} streaming clients: none fails, their first tokens are as fast",
    unit="seconds",
    commit=9,
    nightly=60,
    run=run,
    fault=Fault("a rejected connection blocks the event loop", "server", block_on_rejection),
    planted=6,
)

if __name__ == "__main__":
    send_noise(int(sys.argv[1]), int(sys.argv[2]))
