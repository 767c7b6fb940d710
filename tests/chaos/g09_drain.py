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
from .client import ClientConnection
from .gate import Fault, Gate, Result, Trial
from .server import Server

STREAMS, TOKENS = 100, 250
TIMEOUT = 60.0  # seconds
_BODY: dict[str, Any] = {"prompt": "a", "max_tokens": TOKENS, "ignore_eos": True, "stream": True}


def run(trial: Trial) -> Result:
    """Send SIGTERM to `trial.size` servers one after the other, each with all streams open."""
    seen = {"whole": 0, "cut": 0, "not reported": 0, "accepted later": 0, "bad exits": 0}
    options = ("--parallel", str(STREAMS), "--context", "512", "--drain-delay", "0.5")
    for number in range(trial.size):
        trial.say(f"G9 {number}")
        with (
            tempfile.NamedTemporaryFile(delete=False) as hold,
            trial.serve(*options, scripted=True, variables={scripted_model.HOLD: hold.name}) as server,
        ):
            asyncio.run(_end(server, Path(hold.name), seen))
    bad = seen["cut"] + seen["not reported"] + seen["accepted later"] + seen["bad exits"]
    return Result(not bad, {"streams": STREAMS, **seen})


async def _end(server: Server, hold: Path, seen: dict[str, int]) -> None:
    """Send the signal while all streams are open: the scripted model waits as long as the file `hold` exists."""
    begun = [asyncio.Event() for _ in range(STREAMS)]
    async with server.async_http() as client:
        streams = [asyncio.create_task(_read(client, event)) for event in begun]
        await asyncio.gather(*(event.wait() for event in begun))
        server.process.send_signal(signal.SIGTERM)
        seen["not reported"] += not await _reports_draining(server)
        hold.unlink()
        for whole in await asyncio.gather(*streams):
            seen["whole" if whole else "cut"] += 1
    with suppress(Exception):
        await asyncio.wait_for(asyncio.to_thread(server.process.wait), TIMEOUT)
    seen["bad exits"] += server.process.poll() != 0
    seen["accepted later"] += (await ClientConnection(server).ask({"prompt": "a", "max_tokens": 1})).status == 200


async def _read(client: httpx.AsyncClient, begun: asyncio.Event) -> bool:
    """Whether a stream has its usage and its end."""
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


async def _reports_draining(server: Server) -> bool:
    """Whether `/ready` soon reports "draining" with status 503, so that a load balancer uses other servers."""
    async with server.async_http() as client:
        for _ in range(100):
            with suppress(httpx.HTTPError):
                ready = await client.get("/ready")
                if ready.status_code == 503:
                    return bool(ready.json()["status"] == "draining")
            await asyncio.sleep(0.002)
    return False


async def return_immediately(*_: object) -> None:
    return


def do_not_drain(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TransportServer, "drain", return_immediately)


GATE = Gate(
    name="G9",
    goal="on SIGTERM the server reports it, finishes every stream and exits with 0",
    unit="ends",
    commit=3,
    nightly=50,
    run=run,
    fault=Fault("the server exits without waiting for running responses", "server", do_not_drain),
    planted=1,
)
