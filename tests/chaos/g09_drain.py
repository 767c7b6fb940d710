"""G9: on SIGTERM the server reports that it drains, completes running responses, and exits."""

from __future__ import annotations

import asyncio
import signal
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from afterword.transport.server import TransportServer

from . import scripted_model
from .client import Caller
from .gate import Fault, Gate, Result, Trial
from .server import Server

STREAMS, TOKENS = 100, 250
PATIENCE = 60.0  # seconds
_BODY: dict[str, Any] = {"prompt": "a", "max_tokens": TOKENS, "ignore_eos": True, "stream": True}


def run(trial: Trial) -> Result:
    """One server is ended after the other, each with all streams open."""
    seen = {"whole": 0, "cut": 0, "not told": 0, "let in later": 0, "bad exits": 0}
    options = ("--parallel", str(STREAMS), "--context", "512", "--drain-delay", "0.5")
    for number in range(trial.size):
        trial.say(f"G9 {number}")
        with (
            tempfile.NamedTemporaryFile(delete=False) as hold,
            trial.serve(*options, scripted=True, variables={scripted_model.HOLD: hold.name}) as server,
        ):
            asyncio.run(_end(server, Path(hold.name), seen))
    bad = seen["cut"] + seen["not told"] + seen["let in later"] + seen["bad exits"]
    return Result(not bad, {"streams": STREAMS, **seen})


async def _end(server: Server, hold: Path, seen: dict[str, int]) -> None:
    """Streams are open when the signal is sent: while the file `hold` exists the model waits, after all have begun."""
    begun = [asyncio.Event() for _ in range(STREAMS)]
    async with server.visitors() as client:
        streams = [asyncio.create_task(_read(client, event)) for event in begun]
        await asyncio.gather(*(event.wait() for event in begun))
        server.process.send_signal(signal.SIGTERM)
        seen["not told"] += not await _is_told(server)
        hold.unlink()
        for whole in await asyncio.gather(*streams):
            seen["whole" if whole else "cut"] += 1
    with suppress(Exception):
        await asyncio.wait_for(asyncio.to_thread(server.process.wait), PATIENCE)
    seen["bad exits"] += server.process.poll() != 0
    seen["let in later"] += (await Caller(server).ask({"prompt": "a", "max_tokens": 1})).status == 200


async def _read(client: httpx.AsyncClient, begun: asyncio.Event) -> bool:
    """Whether a stream has all its tokens and its end."""
    tokens, last = 0, ""
    try:
        async with client.stream(
            "POST", "/v1/completions", json=_BODY | {"stream_options": {"include_usage": True}}
        ) as answer:
            async for line in answer.aiter_lines():
                begun.set()
                if line:
                    before, last = last, line
        tokens = int(before.partition('"completion_tokens":')[2].partition(",")[0])
    except (httpx.HTTPError, ValueError):
        begun.set()
    return last == "data: [DONE]" and tokens > 0


async def _is_told(server: Server) -> bool:
    """Whether a load balancer sees soon that it must go elsewhere, while requests are still answered."""
    async with server.visitors() as client:
        for _ in range(100):
            with suppress(httpx.HTTPError):
                ready = await client.get("/ready")
                if ready.status_code == 503:
                    return bool(ready.json()["status"] == "draining")
            await asyncio.sleep(0.002)
    return False


async def leave_at_once(*_: object) -> None:
    return


def do_not_drain(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TransportServer, "drain", leave_at_once)


GATE = Gate(
    name="G9",
    goal="on SIGTERM the server reports it, finishes every stream and exits with 0",
    unit="ends",
    commit=3,
    nightly=50,
    run=run,
    fault=Fault("the server ends without waiting for anyone", "server", do_not_drain),
    planted=1,
)
