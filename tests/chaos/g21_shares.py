"""G21: one key holds all sequences, in each possible way. Another key's short requests begin within few passes."""

from __future__ import annotations

import asyncio
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import pytest

from afterword.engine.core.scheduler import Scheduler

from .client import ClientConnection
from .gate import Fault, Gate, Result, Trial
from .server import Server

SEQUENCES, LONG = 16, 2000
PASSES = 100
"""Upper bound of forward passes during a short request. A sample is protected for 16 passes after a preemption, and the
worker computes some passes while the request and its response are transferred."""
_GREEDY, _POLITE = "sk-greedy-000000", "sk-polite-000000"
_LONG = {"max_tokens": LONG, "ignore_eos": True, "temperature": 1, "seed": 7}
_HELD_SECONDS = 20.0
_SAME = {"prompt": "Once upon a time there was", "n": SEQUENCES, "max_tokens": 150, "seed": 3, "ignore_eos": True}

Body = dict[str, Any]


def run(trial: Trial) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder, "keys")
        keys.write_text(f"{_GREEDY}\n{_POLITE}\n")
        keys.chmod(0o600)
        sizes = ("--parallel", str(SEQUENCES), "--context", "2048", "--limit=queue_seconds=5")
        with trial.serve(*sizes, "--api-key-file", str(keys)) as server:
            return asyncio.run(_measure(server.with_key(_GREEDY), trial))


async def _measure(greedy: Server, trial: Trial) -> Result:
    polite = greedy.with_key(_POLITE)
    passes: list[int] = []
    failed = 0
    for kind, hold in _WAYS.items():
        trial.say(f"G21 {kind}")
        holding = await hold(greedy)
        for number in range(max(1, trial.size // len(_WAYS))):
            took = await _short(polite, f"{kind} {number}")
            failed += took is None
            passes += [took] if took is not None else []
            if took is None:
                break  # with the planted bug each further request would wait as long
        await holding()
        await _until(greedy, running=0)
        if failed:
            break
    others, counted = await _compare(greedy, polite) if not failed else (0, 0)
    figures = {
        "failed": failed,
        "passes during one": f"median {median(passes or [0]):.0f}, at most {max(passes or [0])}",
        "during the compared request": counted,
        "changed choices": others,
    }
    return Result(not failed and not others and max(passes, default=0) <= PASSES, figures)


# ---- ways to hold all sequences; each returns a function that ends it


async def _many_samples(server: Server) -> Callable[[], Any]:
    return await _requests(server, [{"prompt": "Once upon a time", "n": SEQUENCES}])


async def _candidates(server: Server) -> Callable[[], Any]:
    return await _requests(server, [{"prompt": "Once upon a time", "best_of": SEQUENCES}])


async def _many_requests(server: Server) -> Callable[[], Any]:
    return await _requests(server, [{"prompt": f"Request {number} of many"} for number in range(SEQUENCES)])


async def _requests(server: Server, bodies: list[Body]) -> Callable[[], Any]:
    tasks = [asyncio.create_task(ClientConnection(server).ask(_LONG | body)) for body in bodies]
    await _until(server, running=SEQUENCES)

    async def end() -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    return end


async def _batch_row(server: Server) -> Callable[[], Any]:
    row = {"custom_id": "1", "method": "POST", "url": "/v1/completions"}
    body = _LONG | {"model": server.model, "prompt": "Once upon a time", "n": SEQUENCES}
    async with server.async_http() as http:
        files = {"file": ("rows.jsonl", json.dumps(row | {"body": body}).encode())}
        file = (await http.post("/v1/files", files=files, data={"purpose": "batch"})).json()["id"]
        made = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}
        batch = (await http.post("/v1/batches", json=made)).json()["id"]
    await _until(server, running=SEQUENCES)

    async def end() -> None:
        async with server.async_http() as http:
            (await http.post(f"/v1/batches/{batch}/cancel")).raise_for_status()

    return end


_WAYS = {"n": _many_samples, "best_of": _candidates, "requests": _many_requests, "batch": _batch_row}


# ---- measurements of other clients


async def _short(server: Server, text: str) -> int | None:
    """Request one token. Returns the number of forward passes until its response, or None without a response."""
    async with server.async_http() as http:
        before = await _passes(http)
        connection = ClientConnection(server)
        reply = await connection.ask({"prompt": f"A short request: {text}", "max_tokens": 1})
        connection.leave()
        return await _passes(http) - before if reply.status == 200 else None


async def _passes(http: httpx.AsyncClient) -> int:
    text = (await http.get("/metrics")).text
    return sum(int(float(each)) for each in re.findall(r"^afterword:engine_pass_seconds_count\{.*\} (\S+)", text, re.M))


async def _until(server: Server, running: int) -> None:
    """Wait until this many sequences are in use. Raises `TimeoutError` after `_HELD_SECONDS`."""
    async with server.async_http() as http, asyncio.timeout(_HELD_SECONDS):
        while (await http.get("/ready")).json()["running"] != running:
            await asyncio.sleep(0.02)


async def _whole(server: Server) -> list[Body]:
    async with server.async_http(timeout=120) as http:
        answer = await http.post("/v1/completions", json=_SAME | {"logprobs": 2})
    choices: list[Body] = answer.json()["choices"]
    return choices


async def _compare(server: Server, other: Server) -> tuple[int, int]:
    """Send a request alone, and again while another key sends short requests one after the other.

    Returns the number of choices that differ, and the number of short requests.
    """
    undisturbed = await _whole(server)
    whole, count = asyncio.create_task(_whole(server)), 0
    await _until(server, running=SEQUENCES)
    while not whole.done():
        count += await _short(other, f"beside {count}") is not None
    return sum(a != b for a, b in zip(undisturbed, await whole, strict=True)), count


def disable_preemption(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Scheduler, "_victims", lambda *_: [])


GATE = Gate(
    name="G21",
    goal="while one key holds all sequences, another key's short requests begin within few passes; no text changes",
    unit="short requests",
    commit=24,
    nightly=2_000,
    run=run,
    fault=Fault("no sequence is preempted for a waiting client", "worker", disable_preemption),
    planted=8,
)
