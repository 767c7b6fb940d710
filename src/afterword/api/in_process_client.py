"""Sends requests to the ASGI application from within this process: the same routes and responses, without a socket.

Such a request needs no API key. The server charges it to the account given to `in_process_client`, or to no account.
"""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import ASGIApp, Message

from afterword.batch.output_lines import SendRequest, ServerReply
from afterword.keys.key_registry import Account

SCOPE_KEY = "afterword.in_process"
"""The key of the ASGI scope that marks an in-process request. Its value is the account. A client cannot set it."""


def in_process_client(app: ASGIApp, account: Account | None = None) -> SendRequest:
    """A function that sends one request to `app` and returns its response."""

    async def send_request(method: str, path: str, body: bytes) -> ServerReply:
        parts: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        sent: list[Message] = []

        async def receive() -> Message:
            if not parts:
                await asyncio.Event().wait()  # never disconnects: the caller cancels this task instead
            return parts.pop()

        async def send(message: Message) -> None:
            sent.append(message)

        await app(_scope(method, path) | {SCOPE_KEY: account}, receive, send)
        return _make_reply(sent)

    return send_request


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


def _make_reply(messages: list[Message]) -> ServerReply:
    body = b"".join(message.get("body", b"") for message in messages[1:])
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in messages[0]["headers"]}
    return ServerReply.from_response(messages[0]["status"], body, headers)
