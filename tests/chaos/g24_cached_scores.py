"""G24: prompts with scores in the prefix cache, all at once while all sequences are busy: cold and warm are equal."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

import pytest

from afterword.engine import messages
from afterword.engine.core.engine_loop import EngineLoop
from afterword.engine.core.step_buffer import StepBuffer

from .client import ClientConnection, run_concurrently
from .gate import Fault, Gate, Result, Trial
from .server import Server

SEQUENCES, TOKENS, LIST = 4, 1200, 16
_PROMPTS = [[(7 * position + index) % 4000 + 1 for position in range(TOKENS)] for index in range(2)]
_SECONDS = 240.0  # for a response: at the large size all of them together have more than 1 GB
_SCORED: dict[str, Any] = {"echo": True, "logprobs": 20, "max_tokens": 0}
_LONG: dict[str, Any] = {"prompt": "Once upon a time", "n": SEQUENCES, "max_tokens": 400, "ignore_eos": True}


@dataclass
class Tally:
    """Counts: whole responses, errors by status, and responses that differ from the first one of their prompt."""

    whole: int = 0
    others: dict[int, int] = field(default_factory=dict)
    differ: int = 0
    first: dict[int, str] = field(default_factory=dict)

    def add(self, status: int, body: bytes, index: int) -> None:
        """Count a response. All choices of all responses to one prompt must have the same numbers."""
        if status != 200:
            self.others[status] = self.others.get(status, 0) + 1
            return
        self.whole += 1
        for choice in json.loads(body)["choices"]:
            scores = json.dumps(choice["logprobs"])
            self.differ += self.first.setdefault(index, scores) != scores


def run(trial: Trial) -> Result:
    with trial.serve("--parallel", str(SEQUENCES), "--context", "2048") as server:
        return asyncio.run(_score(server, trial))


async def _score(server: Server, trial: Trial) -> Result:
    worker, tally = server.worker().pid, Tally()
    for index, prompt in enumerate(_PROMPTS):  # cold
        reply = await ClientConnection(server).ask(_SCORED | {"prompt": prompt})
        tally.add(reply.status, reply.body, index)
    busy = asyncio.create_task(ClientConnection(server).ask(_LONG))
    await asyncio.sleep(0.3)  # all sequences are in use now
    start = time.monotonic()

    async def send_item(connection: ClientConnection, number: int) -> None:
        index = number % len(_PROMPTS)
        body = _SCORED | {"prompt": _PROMPTS[index], "stream": number % 8 == 7}
        reply = await connection.ask(body, timeout=_SECONDS)
        tally.add(*((reply.status, reply.body) if number % 8 != 7 else _streamed(reply.status, reply.body)), index)
        trial.say(f"G24 {tally.whole}")

    await run_concurrently(server, range(trial.size), send_item, trial.size)
    several = await ClientConnection(server).ask(_SCORED | {"prompt": [_PROMPTS[0]] * LIST, "logprobs": 5})
    taken = time.monotonic() - start
    long = await busy
    replaced = server.worker().pid != worker
    good = not tally.others and not tally.differ and several.status == long.status == 200 and not replaced
    figures = {
        "scored": tally.whole,
        "refused or lost": sum(tally.others.values()) + (several.status != 200),
        "differ": tally.differ,
        "engines replaced": int(replaced),
        "seconds": round(taken, 1),
    }
    return Result(good, figures)


def _streamed(status: int, body: bytes) -> tuple[int, bytes]:
    """The first event of a stream, which has the prompt's scores, as if it were a whole response."""
    if status != 200 or not body.endswith(b"data: [DONE]\n\n"):
        return 0 if status == 200 else status, body
    return status, body.split(b"\n\n")[0].removeprefix(b"data: ")


def send_scores_at_once(patch: pytest.MonkeyPatch) -> None:
    """All cached scores are sent in one frame. The limit of a frame is reduced in proportion to this gate's size."""
    pack = messages.pack

    def bounded(message: messages.ServerMessage) -> bytes:
        data = pack(message)
        return (
            data
            if len(data) < messages.MAX_FRAME_BYTES // 64
            else messages.HEADER.pack(messages.MAX_FRAME_BYTES + 1) + data
        )

    patch.setattr(messages, "pack", bounded)
    patch.setattr(StepBuffer, "free_bytes", 2**40)
    patch.setattr(EngineLoop.__init__, "__defaults__", (time.perf_counter, 1, None, 2**40))


GATE = Gate(
    name="G24",
    goal="scores from the cache are sent in pieces: cold and warm requests are equal, no response fails for its size",
    unit="prompts",
    commit=32,
    nightly=700,
    run=run,
    fault=Fault("all cached scores are sent in one frame", "worker", send_scores_at_once),
    planted=32,
)
