"""Sends the parts of a streamed body, and measures how long that waits for the client and how much it has taken."""

from __future__ import annotations

from starlette.types import Scope, Send

from afterword.completion.step_queue import Reader
from afterword.transport.body_writer import WRITE_BODY_KEY, WriteBody


class PartSender:
    """Sends the parts of one response's body, after its start. `reader` learns of each."""

    __slots__ = ("_reader", "_send", "_write")

    def __init__(self, scope: Scope, send: Send, reader: Reader) -> None:
        self._write: WriteBody | None = scope.get(WRITE_BODY_KEY)  # not with other servers, such as Ray Serve's
        self._send = send
        self._reader = reader

    async def send(self, part: bytes) -> None:
        """Send a part, after which more follows. It waits while the client leaves too much unread."""
        if self._write is not None and self._write(part):
            self._reader.sent += len(part)
            return
        with self._reader.sending(len(part)):
            await self._send({"type": "http.response.body", "body": part, "more_body": True})
