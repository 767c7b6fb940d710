"""What clients of the HTTP API see when a replica ends while it streams."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from test_routed_engine import POLICY, Replicas, replicas, run

from afterword.api.app import make_app
from afterword.api.service import Service
from afterword.config import Config
from afterword.engine.parent.model_manager import ModelDefinition, ModelManager
from afterword.engine.replicas.routed_engine import RoutedEngine, RoutedModel
from afterword.engine.replicas.routing import PrefixFirst

BODY = {"prompt": [1, 2, 3], "max_tokens": 480, "seed": 1, "stream": True, "ignore_eos": True}


async def streamed(app: Any, on_text: Callable[[], Awaitable[None]]) -> list[str]:
    """The events of a stream. `on_text` is called once, at the first text."""
    parts: list[bytes] = []
    body = [{"type": "http.request", "body": json.dumps(BODY).encode()}]

    async def receive() -> dict[str, object]:
        return body.pop() if body else await asyncio.Event().wait() or {}

    async def send(message: dict[str, Any]) -> None:
        if message.get("body"):
            parts.append(message["body"])
            if len(parts) == 1:
                await on_text()

    path, address = "/v1/completions", ("127.0.0.1", 1)
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""}
    scope |= {"headers": headers, "client": address, "server": address, "scheme": "http", "http_version": "1.1"}
    await app(scope, receive, send)
    return b"".join(parts).decode().removesuffix("\n\n").split("\n\n")


async def stream_with_a_death(path: str) -> tuple[list[str], list[str]]:
    """The events of a stream on two replicas, and of the same stream while its replica ends."""
    async with replicas() as found:
        for name in ("a", "b"):
            await found.add_worker(name, path)
        routed = RoutedModel("model", PrefixFirst(), POLICY)
        models = ModelManager([ModelDefinition("model", 0, lambda: RoutedEngine(routed, found.find))])
        try:
            await models.open()
            app = make_app(Service(Config(), models))
            whole = await streamed(app, nothing)
            return whole, await streamed(app, lambda: kill(found))
        finally:
            await models.close()


async def nothing() -> None: ...


async def kill(found: Replicas) -> None:
    await found.kill(found.busy())


def text(events: list[str]) -> str:
    chunks = [json.loads(event.removeprefix("data: ")) for event in events if event != "data: [DONE]"]
    return "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk.get("choices"))


def test_a_stream_goes_on_at_another_replica():
    async def test() -> None:
        whole, found = await stream_with_a_death("any")
        assert (whole[-1], found[-1]) == ("data: [DONE]", "data: [DONE]")
        assert len(text(whole)) == 480
        assert text(found) == text(whole)

    run(test)


def test_without_a_promise_a_stream_ends_with_an_error_event_and_never_says_done():
    async def test() -> None:
        whole, found = await stream_with_a_death("unsure")
        assert whole[-1] == "data: [DONE]"
        assert "data: [DONE]" not in found
        assert json.loads(found[-1].removeprefix("data: "))["error"]["type"] == "server_error"
        assert text(whole).startswith(text(found[:-1]))
        assert 0 < len(text(found[:-1])) < 480

    run(test)
