"""G17: no response contains text of another request: concurrent prompts with a shared prefix and one request id."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest

from afterword.engine.core import prefix_cache

from .client import Caller, crowd
from .gate import Fault, Gate, Result, Trial
from .server import Server

CLIENTS, KNOWN = 64, 24
BEGINNING = "Once upon a time there was a little girl who had a secret word, and the word was "
"""Long enough for the prefix cache to share it; what follows is each one's own."""

Body = dict[str, Any]


def run(trial: Trial) -> Result:
    with trial.serve("--parallel", "16", "--context", "256") as server:
        return asyncio.run(_listen(server, trial))


async def _listen(server: Server, trial: Trial) -> Result:
    """Half of the prompts have been asked alone before, so the whole answer is known; the others come once."""
    known = [_body(f"{Random(number).getrandbits(64):016x}") for number in range(KNOWN)]
    alone = Caller(server)
    answers = [_told(await alone.ask(body)) for body in known]
    alone.leave()
    seen = {"foreign words": 0, "other answers": 0, "left": 0}

    async def visit(caller: Caller, item: tuple[int | None, Body, bool]) -> None:
        number, body, leaves = item
        if leaves:
            seen["left"] += 1
            await caller.ask_and_leave(body | {"stream": True}, 1)
            return
        told = _told(await caller.ask(body))
        if not told.startswith(body["prompt"]):
            seen["foreign words"] += 1
        elif number is not None and told != answers[number]:
            seen["other answers"] += 1

    await crowd(server, _visits(known, trial), visit, CLIENTS)
    return Result(not seen["foreign words"] and not seen["other answers"], {"at once": CLIENTS, **seen})


def _visits(known: list[Body], trial: Trial) -> Iterator[tuple[int | None, Body, bool]]:
    random = Random(trial.seed)
    for done in range(trial.size):
        number = random.randrange(KNOWN) if random.random() < 0.5 else None
        body = _body(f"{random.getrandbits(64):016x}") if number is None else known[number]
        trial.say(f"G17 {done}")
        yield number, body, random.random() < 0.1


def _body(word: str) -> Body:
    return {"prompt": f"{BEGINNING}{word}.", "max_tokens": 8, "temperature": 0, "echo": True, "logprobs": 1}


def _told(reply: Any) -> str:
    assert reply.status == 200, reply.body
    (choice,) = reply.json()["choices"]
    return f"{choice['text']}{choice['logprobs']['token_logprobs']}"


def compare_lengths_only(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(prefix_cache, "common_prefix", lambda first, second: min(len(first), len(second)))


GATE = Gate(
    name="G17",
    goal="no response contains anything of another request",
    unit="requests",
    commit=1_000,
    nightly=100_000,
    run=run,
    fault=Fault("the prefix cache compares lengths instead of tokens", "engine", compare_lengths_only),
    planted=100,
)
