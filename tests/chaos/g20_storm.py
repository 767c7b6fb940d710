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

from .client import Caller, late
from .disturbance import Disturb, disturb, disturbance
from .gate import Fault, Gate, Result, Trial
from .server import Server
from .wild import shout

GOOD, BAD = 20, 8
ROUNDS = 3
"""Calm and noise take turns, so that both meet what else the machine does; of each the median round counts."""
SETTLING = 2.0
"""Seconds until what noise has left behind has been dealt with, deadlines of half a head included: calm is calm."""
_BODY = {"prompt": "Once upon a time", "max_tokens": 24, "stream": True, "ignore_eos": True}


def run(trial: Trial) -> Result:
    with trial.serve("--parallel", "8", "--limit=head_seconds=1", "--limit=body_seconds=1") as server:
        calm, stormy, noises = [], [], 0
        for number in range(ROUNDS):
            trial.say(f"G20 {number}")
            asyncio.run(_stream_well(server, SETTLING))
            calm.append(asyncio.run(_stream_well(server, trial.size / ROUNDS)))
            with disturbance("g20_storm", server, str(number)) as noise:
                stormy.append(asyncio.run(_stream_well(server, trial.size / ROUNDS)))
            noises += noise[0]
        alive = server.alive()
    failed = sum(times.count(None) for times in calm + stormy)
    before, during = (median(late(times) for times in rounds) for rounds in (calm, stormy))
    figures = {
        "answers": sum(len(times) for times in calm + stormy),
        "failed": failed,
        "noises": noises,
        "p99 to first token ms": f"{before * 1000:.0f}, then {during * 1000:.0f}",
    }
    calm_enough = during <= max(2 * before, before + 0.1)  # where tokens come in milliseconds, a burst doubles them
    return Result(not failed and alive and noises > 0 and calm_enough, figures)


async def _stream_well(server: Server, seconds: float) -> list[float | None]:
    """Seconds to the first token of every stream of the good clients; None: it failed."""
    times: list[float | None] = []
    end = time.monotonic() + seconds

    async def listen() -> None:
        caller = Caller(server)
        while time.monotonic() < end:
            reply = await caller.ask(_BODY)
            times.append(reply.first if reply.status == 200 and reply.events()[-1] == "[DONE]" else None)
        caller.leave()

    await asyncio.gather(*(listen() for _ in range(GOOD)))
    return times


def make_noise(port: int, seed: int) -> None:
    """Until a line comes in."""

    def shouter(random: Random) -> Disturb:
        async def make(count: Callable[[], None]) -> None:
            corpus = [case.data for case in cases()]
            random.shuffle(corpus)
            for data in cycle(corpus):
                await shout(port, random.choice((data, random.randbytes(random.randrange(1, 2000)))))
                count()

        return make

    disturb(*(shouter(Random(seed * BAD + each)) for each in range(BAD)))


def dawdle_over_strangers(patch: pytest.MonkeyPatch) -> None:
    refuse = Connection._reject

    def slowly(self: Connection, refusal: ErrorResponse) -> None:
        time.sleep(0.5)
        refuse(self, refusal)

    patch.setattr(Connection, "_reject", slowly)


GATE = Gate(
    name="G20",
    goal=f"noise at the port does not disturb {GOOD} streaming clients: none fails, their first tokens are as fast",
    unit="seconds",
    commit=9,
    nightly=60,
    run=run,
    fault=Fault("the server dawdles over strangers", "server", dawdle_over_strangers),
    planted=6,
)

if __name__ == "__main__":
    make_noise(int(sys.argv[1]), int(sys.argv[2]))
