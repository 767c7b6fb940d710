"""Asks the application from within this process: the same routes and answers, without a socket.

What is asked so needs no key: it is charged to the account that it says, or to nobody.
"""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import ASGIApp, Message

from afterword.batch.output_lines import SendRequest, ServerReply
from afterword.keys.key_registry import Account

SCOPE_KEY = "afterword.inside"
"""Where a request says that it came this way; nothing that comes from outside can put it there."""


def in_process_client(app: ASGIApp, account: Account | None = None) -> SendRequest:
    """A way to ask an application."""

    async def ask(method: str, path: str, body: bytes) -> ServerReply:
        parts: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        said: list[Message] = []

        async def receive() -> Message:
            if not parts:
                await asyncio.Event().wait()  # who asks does not leave, but is cancelled with what was asked
            return parts.pop()

        async def send(message: Message) -> None:
            said.append(message)

        await app(_scope(method, path) | {SCOPE_KEY: account}, receive, send)
        return _make_reply(said)

    return ask


def _scope(method: str, path: str) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        "client": None,
        "server": None,
    }


def _make_reply(said: list[Message]) -> ServerReply:
    body = b"".join(message.get("body", b"") for message in said[1:])
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in said[0]["headers"]}
    return ServerReply.from_response(said[0]["status"], body, headers)
