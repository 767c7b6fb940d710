"""G25: one hostile client sends large texts, scores, responses and samples in turn; 20 others stream and score."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count, cycle
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from afterword.api.responses.time_slices import TimeSlices
from oracle.tiny import write_tiny

from .client import ClientConnection, Reply, p99
from .disturbance import Disturb, disturb, disturbance
from .gate import Fault, Gate, Result, Trial
from .server import Server

GOOD, KEYS, HOSTILE = 20, ("good-0123456789", "well-0123456789"), "hostile-0123456789"
ROUNDS = 3
"""Quiet and hostile periods alternate, so that other load on the machine affects both. The median of each counts."""
MOST = 4
"""Allowed ratio of the times to first token in hostile and quiet periods. Over 60 seconds the ratio is at most 2; the
periods here last some seconds, so the burst at the beginning has more weight."""
SETTLING = 2.0  # seconds before a quiet period, in which the hostile client's last requests end
CONTEXT = 512  # the second model's longest
_STREAM: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 16, "stream": True, "ignore_eos": True}
_SCORE: dict[str, Any] = {"prompt": "Once upon a time there was a fox", "echo": True, "logprobs": 5, "max_tokens": 0}
_IDS = [(7 * i) % 200 + 1 for i in range(CONTEXT - 24)]


def hostile_requests() -> Iterator[tuple[str, Any]]:
    """Paths and bodies, of each of the four kinds in turn."""
    texts = ["<|endoftext|>" * 190_000, "<" * 700_000, " " * 1_300_000, "ab" * 500_000]
    for number in count():
        text = texts[number % len(texts)]
        yield "/tokenize", {"prompt": text}
        yield "/v1/completions", {"prompt": text, "max_tokens": 1}
        listed = [[*_IDS[: -(number % 7) - 1], index] for index in range(16)]
        yield "/v1/completions", {"prompt": listed, "echo": True, "logprobs": 5, "max_tokens": 0}
        yield "/v1/completions", {"prompt": _IDS, "n": 64, "prompt_logprobs": 20, "max_tokens": 1}
        yield "/v1/completions", b'{"prompt": [' + b"[1]," * 2_000_000 + b"[1]]}"
        yield "/detokenize", {"tokens": [1] * 2_000_000}
        yield "/v1/completions", {"prompt": "So", "n": 16, "max_tokens": CONTEXT - 24, "ignore_eos": True}


def run(trial: Trial) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        second = write_tiny(Path(folder) / "second.gguf", vocabulary="spm")
        results = {name: _run_with_model(trial, model) for name, model in (("built-in", []), ("second", [str(second)]))}
    figures: dict[str, int | float | str] = {}
    for name, result in results.items():
        figures |= {f"{name}: {each}": value for each, value in result.figures.items()}
    return Result(all(result.passed for result in results.values()), figures)


def _run_with_model(trial: Trial, model: list[str]) -> Result:
    keys = [word for key in (*KEYS, HOSTILE) for word in ("--api-key", key)]
    size = trial.size / 2 / ROUNDS  # seconds of each period, for each of two models
    with trial.serve(*model, "--parallel", "8", "--context", str(CONTEXT), *keys) as server:
        worker, quiet, hostile, requests = server.worker().pid, [], [], 0
        for number in range(ROUNDS):
            trial.say(f"G25 {number}")
            asyncio.run(_measure_good_clients(server, SETTLING))
            quiet.append(asyncio.run(_measure_good_clients(server, size)))
            with disturbance("g25_hostile_client", server) as sent:
                hostile.append(asyncio.run(_measure_good_clients(server, size)))
            requests += sent[0]
        replaced = server.worker().pid != worker
    failed = sum(times.count(None) for times in quiet + hostile)
    before, during = (median(p99(times) for times in periods) for periods in (quiet, hostile))
    figures = {
        "answers": sum(len(times) for times in quiet + hostile),
        "failed": failed,
        "hostile requests": requests,
        "engines replaced": int(replaced),
        "p99 to first token ms": f"{before * 1000:.0f}, then {during * 1000:.0f}",
    }
    soon = during <= max(MOST * before, before + 0.1)  # where tokens come in milliseconds, a burst doubles them
    return Result(not failed and not replaced and requests > 0 and soon, figures)


async def _measure_good_clients(server: Server, seconds: float) -> list[float | None]:
    """Seconds to the first token of each response to good clients, streamed and scored in turn; None: it failed."""
    times: list[float | None] = []
    end = time.monotonic() + seconds

    async def ask(number: int) -> None:
        connection = ClientConnection(server.with_key(KEYS[number % len(KEYS)]))
        for body in cycle((_STREAM, _SCORE)):
            if time.monotonic() >= end:
                break
            reply = await connection.ask(body)
            times.append(reply.first if _whole(reply, body) else None)
        connection.leave()

    await asyncio.gather(*(ask(number) for number in range(GOOD)))
    return times


def _whole(reply: Reply, body: dict[str, Any]) -> bool:
    return reply.status == 200 and ("stream" not in body or reply.events()[-1] == "[DONE]")


def send_hostile_requests(port: int) -> None:
    """Send requests until a line arrives on stdin: three at a time, of which two are abandoned after a second."""
    encoded = (
        (path, body if isinstance(body, bytes) else json.dumps(body).encode()) for path, body in hostile_requests()
    )

    def asker(timeout: float) -> Disturb:
        async def ask(count: Callable[[], None]) -> None:
            for path, body in encoded:
                head = (
                    f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {HOSTILE}\r\n"
                    f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
                )
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(head.encode() + body)
                count()
                with suppress(TimeoutError, OSError):
                    async with asyncio.timeout(timeout):
                        while await reader.read(2**16):
                            pass
                writer.transport.abort()

        return ask

    disturb(asker(1.0), asker(1.0), asker(10.0))


def serialize_without_yielding(patch: pytest.MonkeyPatch) -> None:
    """A large response is serialized without running other tasks in between, and a little more slowly."""

    async def after(self: TimeSlices, work: int = 1) -> None:
        self._done += work
        if self._done >= self._size:
            self._done = 0
            time.sleep(0.02)

    patch.setattr(TimeSlices, "yield_after", after)


GATE = Gate(
    name="G25",
    goal=f"one hostile client beside {GOOD} good ones: no good request fails, and first tokens stay fast",
    unit="seconds",
    commit=18,
    nightly=120,
    run=run,
    fault=Fault("a large response is serialized without yielding", "server", serialize_without_yielding),
    planted=18,
)

if __name__ == "__main__":
    send_hostile_requests(int(sys.argv[1]))
