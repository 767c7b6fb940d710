"""G17: no response contains text of another request: concurrent prompts with a shared prefix and one request id."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest

from afterword.engine.core import prefix_cache

from .client import ClientConnection, run_concurrently
from .gate import Fault, Gate, Result, Trial
from .server import Server

CLIENTS, KNOWN = 64, 24
BEGINNING = "Once upon a time there was a little girl who had a secret word, and the word was "
"""Long enough for the prefix cache to share it. A unique word follows it in each prompt."""

Body = dict[str, Any]


def run(trial: Trial) -> Result:
    with trial.serve("--parallel", "16", "--context", "256") as server:
        return asyncio.run(_check_all(server, trial))


async def _check_all(server: Server, trial: Trial) -> Result:
    """Half of the prompts were sent alone before, so their responses are known. The other prompts are sent once."""
    known = [_body(f"{Random(number).getrandbits(64):016x}") for number in range(KNOWN)]
    alone = ClientConnection(server)
    answers = [_content(await alone.ask(body)) for body in known]
    alone.leave()
    seen = {"foreign text": 0, "changed responses": 0, "disconnected": 0}

    async def send_item(connection: ClientConnection, item: tuple[int | None, Body, bool]) -> None:
        number, body, leaves = item
        if leaves:
            seen["disconnected"] += 1
            await connection.ask_and_disconnect(body | {"stream": True}, 1)
            return
        content = _content(await connection.ask(body))
        if not content.startswith(body["prompt"]):
            seen["foreign text"] += 1
        elif number is not None and content != answers[number]:
            seen["changed responses"] += 1

    await run_concurrently(server, _items(known, trial), send_item, CLIENTS)
    return Result(not seen["foreign text"] and not seen["changed responses"], {"at once": CLIENTS, **seen})


def _items(known: list[Body], trial: Trial) -> Iterator[tuple[int | None, Body, bool]]:
    random = Random(trial.seed)
    for done in range(trial.size):
        number = random.randrange(KNOWN) if random.random() < 0.5 else None
        body = _body(f"{random.getrandbits(64):016x}") if number is None else known[number]
        trial.say(f"G17 {done}")
        yield number, body, random.random() < 0.1


def _body(word: str) -> Body:
    return {"prompt": f"{BEGINNING}{word}.", "max_tokens": 8, "temperature": 0, "echo": True, "logprobs": 1}


def _content(reply: Any) -> str:
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
    fault=Fault("the prefix cache compares lengths instead of tokens", "worker", compare_lengths_only),
    planted=100,
)
