"""G26: a server with --cache-dir is killed at random moments, its files are damaged: no wrong answer, no other salt's.

Each life of the server: some files are damaged, the server starts, clients send long prompts that share beginnings, and
SIGKILL ends the server and its worker. The folder is so small that files are evicted all the time. Every response must
have the numbers of a server without --cache-dir.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest

from afterword.engine.core.prefix_store import PART_TOKENS
from afterword.engine.store.part_files import PartFolder

from .client import ClientConnection
from .gate import Fault, Gate, Result, Trial
from .server import Server

_SHAPE = ("--parallel", "4", "--context", "2048")
_CLIENTS = 3
_RESPONSES, _LONGEST_REST = (0, 3, 8), 0.3  # a life: responses, then seconds
_SIZE = "0.012"  # GB: less than all prompts need
_DAMAGED = 1 / 2  # of the files, in each life


def _ids(seed: int, length: int) -> list[int]:
    random = Random(seed)
    return [random.randrange(300, 4000) for _ in range(length)]


_PROMPTS = [_ids(beginning, 560) + _ids(rest, 90 * rest) for beginning in range(3) for rest in range(4)]


@dataclass
class Tally:
    """`counts`: of events by name. `expected`: for each prompt the choices of a server without `--cache-dir`."""

    counts: Counter[str] = field(default_factory=Counter)
    expected: list[str] = field(default_factory=list)

    def add(self, index: int, reply: Any) -> None:
        """Count a whole response."""
        self.counts["responses"] += 1
        self.counts["cached"] += reply["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        self.counts["wrong"] += json.dumps(reply["choices"]) != self.expected[index]


def _body(index: int, salt: str) -> dict[str, Any]:
    return {"prompt": _PROMPTS[index], "max_tokens": 3, "temperature": 0, "logprobs": 2, "cache_salt": salt}


def run(trial: Trial) -> Result:
    tally, random = Tally(), Random(trial.seed)
    with tempfile.TemporaryDirectory() as temporary:
        with trial.serve(*_SHAPE) as server:
            tally.expected = asyncio.run(_all(server))
        folder = Path(temporary, "cache")
        for life in range(trial.size):
            trial.say(f"G26 {life}")
            tally.counts["damaged files"] += _damage(folder, random, _DAMAGED)
            with trial.serve(*_SHAPE, "--cache-dir", str(folder), "--cache-size", _SIZE) as server:
                asyncio.run(_live(server, tally, random, life))
                tally.counts["lines in the log"] += server.stderr_bytes.count(b"is damaged")
        asyncio.run(_damage_and_ask(trial, Path(temporary, "last"), random, tally))
        size = sum(path.stat().st_size for path in folder.iterdir())
    names = ("responses", "wrong", "cached", "cached for a new salt", "refused", "damaged files", "lines in the log")
    figures = {name: tally.counts[name] for name in names} | {"MB in the folder": size / 1e6}
    bad = tally.counts["wrong"] + tally.counts["cached for a new salt"] + tally.counts["refused"]
    return Result(bad == 0 and (trial.size < 3 or tally.counts["cached"] > 0), figures)


async def _all(server: Server) -> list[str]:
    connection = ClientConnection(server)
    replies = [await connection.ask(_body(index, f"cold {index}")) for index in range(len(_PROMPTS))]
    return [json.dumps(reply.json()["choices"]) for reply in replies]


async def _live(server: Server, tally: Tally, random: Random, life: int) -> None:
    """Send prompts to a new server, and kill it at a random moment."""
    fresh = await ClientConnection(server).ask(_body(random.randrange(len(_PROMPTS)), f"life {life}"))
    if fresh.status == 200:
        cached = fresh.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        tally.counts["cached for a new salt"] += cached > 0
    clients = [asyncio.create_task(_ask(server, tally, Random(random.random()))) for _ in range(_CLIENTS)]
    end = tally.counts["responses"] + random.choice(_RESPONSES)
    while tally.counts["responses"] < end and not any(client.done() for client in clients):
        await asyncio.sleep(0.002)
    await asyncio.sleep(random.uniform(0, _LONGEST_REST))
    os.kill(server.pid, signal.SIGKILL)
    await asyncio.gather(*clients)


async def _damage_and_ask(trial: Trial, folder: Path, random: Random, tally: Tally) -> None:
    """Send a prompt, damage its files, and send it to a new server, which therefore certainly reads a damaged file."""
    for _ in range(2):
        tally.counts["damaged files"] += _damage(folder, random, 1, truncated=0)
        with trial.serve(*_SHAPE, "--cache-dir", str(folder)) as server:
            reply = await ClientConnection(server).ask(_body(0, "last"))
            tally.add(0, reply.json())
            while len(list(folder.glob("*.part"))) < len(_PROMPTS[0]) // PART_TOKENS:
                await asyncio.sleep(0.01)
            tally.counts["lines in the log"] += server.stderr_bytes.count(b"is damaged")


async def _ask(server: Server, tally: Tally, random: Random) -> None:
    """Send prompts until the server is dead."""
    connection = ClientConnection(server)
    while True:
        index = random.randrange(len(_PROMPTS))
        reply = await connection.ask(_body(index, random.choice("ab")))
        if reply.status == 0:
            return
        if reply.status == 200:
            tally.add(index, reply.json())
        else:
            tally.counts["refused"] += 1


def _damage(folder: Path, random: Random, share: float, truncated: float = 0.3) -> int:
    """Damage a share of the files. Returns their number.

    `truncated`: the share of these that is cut off. In the others, bits are changed that keep numbers finite.
    """
    files = sorted(folder.glob("*.part")) if folder.exists() else []
    chosen = random.sample(files, int(share * len(files)))
    for path in chosen:
        data = bytearray(path.read_bytes())
        position = random.randrange(len(data))
        if random.random() < truncated:
            del data[position:]
        else:
            bits = random.choice((1, 2, 3))
            data[position:] = bytes(byte ^ bits for byte in data[position:])
        path.write_bytes(data)
    return len(chosen)


def trust_files(patch: pytest.MonkeyPatch) -> None:
    """A file is used without the comparison of its checksum."""
    patch.setattr(PartFolder, "read", lambda folder, name: memoryview(folder._path(name).read_bytes())[40:])


GATE = Gate(
    name="G26",
    goal="a server with --cache-dir is killed at random moments, files are damaged: no wrong number, no other salt's",
    unit="kills",
    commit=4,
    nightly=1000,
    run=run,
    fault=Fault("checksums are not compared", "worker", trust_files),
    planted=10,
)
