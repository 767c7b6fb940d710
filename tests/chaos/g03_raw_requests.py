"""G3: no bytes on a connection crash or block the server, and the next request on a new connection works."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from random import Random

import pytest

from afterword.transport import connection
from malformed_requests import CLOSED, KEY, PROMPT, REFUSED, Case, cases

from .gate import Fault, Gate, Result, Trial
from .raw_socket import send_bytes
from .server import Server

AT_ONCE = 64
LARGEST = 2500  # bytes of a refusal, head and body
ANY = REFUSED | {200, 429}
"""The statuses that are allowed for a mutated request."""
SHORT = [f"--limit={name}=1" for name in ("head_seconds", "body_seconds", "body_grace", "rest_seconds")]


def run(trial: Trial) -> Result:
    with trial.serve("--parallel", "4", "--wrong-keys", "0", *SHORT, scripted=True, key=KEY) as server:
        return asyncio.run(_send_all(server, trial))


async def _send_all(server: Server, trial: Trial) -> Result:
    statuses: Counter[int] = Counter()
    problems: list[str] = []
    waiting = iter(islice(_streams(trial), trial.size))

    async def process_items() -> None:
        for case in waiting:
            outcome = await send_bytes(server.port, case.data)
            first = (*outcome.statuses, CLOSED)[0]
            statuses[first] += 1
            following = await send_bytes(server.port, _version())
            if outcome.hung:
                problems.append(f"{case.name}: no answer")
            elif first not in case.right or (
                case.right is not ANY and (200 in outcome.statuses or outcome.largest > LARGEST)
            ):
                problems.append(f"{case.name}: {outcome.statuses}")
            elif following.statuses != (200,):
                problems.append(f"{case.name}: then {following.statuses}")

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(process_items())
    fives = sum(count for status, count in statuses.items() if status >= 500 and status != 505)
    first = {"first": problems[0][:100]} if problems else {}
    refused = statuses.total() - statuses[200] - statuses[CLOSED]
    figures = {"refused": refused, "closed": statuses[CLOSED], "served": statuses[200], "5xx": fives}
    return Result(not problems and server.alive(), figures | {"wrong": len(problems)} | first)


def _version() -> bytes:
    return f"GET /version HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode()


def _streams(trial: Trial) -> Iterator[Case]:
    """The corpus, then random mutations of it and of valid requests."""
    random = Random(trial.seed)
    corpus = cases()
    yield from corpus
    seeds = [case.data for case in corpus if case.data and len(case.data) < 4000]
    good = _version(), _completion()
    number = 0
    while True:
        number += 1
        trial.say(f"G3 {number}")
        yield Case(f"mutation {number}", _mutated(random.choice((*good, random.choice(seeds))), random), ANY)


def _completion() -> bytes:
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\n"
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(PROMPT)}\r\n\r\n".encode() + PROMPT


def _mutated(data: bytes, random: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 5))):
        at, size = random.randrange(len(changed) + 1), random.choice((1, 1, 2, 8, 40))
        match random.randrange(5):
            case 0:
                changed[at : at + 1] = bytes([random.randrange(256)])
            case 1:
                del changed[at : at + size]
            case 2:
                changed[at:at] = changed[at : at + size]
            case 3:
                changed[at:at] = random.choice(
                    (b"\r\n", b"\n", b"\x00", b" ", b":", b",", b"0", b"\r\n\r\n", b"%", b"\xff")
                )
            case _:
                other = random.randrange(len(changed) + 1)
                changed[at:at] = changed[other : other + size]
    return bytes(changed)


def accept_ambiguous_heads(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(connection, "check_head", lambda *_: None)


GATE = Gate(
    name="G3",
    goal="no bytes on a connection crash or block the server, and the next request works",
    unit="byte streams",
    commit=1_000,
    nightly=200_000,
    run=run,
    fault=Fault("ambiguous request heads are accepted", "server", accept_ambiguous_heads),
    planted=400,
)
