"""An HTTP client with little overhead: it keeps connections open and returns the bytes of responses unparsed."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from .server import Server

TIMEOUT = 30.0
"""Seconds after which a missing response counts as a hang."""
_LINE = 2**20  # bytes of a header block
_PAUSE = 0.1  # seconds that a client waits for more bytes before it disconnects


@dataclass(frozen=True, slots=True)
class Reply:
    """A response. `body` has no chunk framing. Status 0: there is no whole response, and `body` holds the reason.

    `first`: seconds until the head arrived. The first token of a stream arrives with it.
    """

    status: int
    body: bytes
    first: float = 0.0

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[Any]:
        """All events of a whole stream, "[DONE]" included."""
        lines = (line[6:] for line in self.body.split(b"\n\n") if line)
        return [line.decode() if line == b"[DONE]" else json.loads(line) for line in lines]


class ClientConnection:
    """One connection, opened on the first request and kept open. It owns its socket."""

    def __init__(self, server: Server) -> None:
        self._host, self._port = "127.0.0.1", server.port
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in server.headers.items())
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, body: object, path: str = "/v1/completions", timeout: float = TIMEOUT) -> Reply:
        """POST a value as JSON, or bytes unchanged. A response that is not whole after `timeout` has the status 0."""
        start = time.monotonic()
        try:
            async with asyncio.timeout(timeout):
                reader, _ = await self._send(body, path)
                status, headers = await _head(reader)
                first = time.monotonic() - start
                whole = await _body(reader, headers)
        except (TimeoutError, OSError, EOFError) as problem:
            self.leave()
            return Reply(0, repr(problem).encode())
        except BaseException:
            self.leave()
            raise
        if headers.get("connection", "").lower() == "close":
            self.leave()
        return Reply(status, whole, first)

    async def ask_and_disconnect(self, body: object, after: int, path: str = "/v1/completions") -> None:
        """POST and disconnect after `after` reads of the response; 0: before the response begins."""
        with suppress(TimeoutError, OSError):
            reader, _ = await self._send(body, path)
            for _ in range(after):
                async with asyncio.timeout(_PAUSE):  # the response may have ended, or not have begun
                    await reader.read(2**16)
        self.leave()

    def leave(self) -> None:
        """Abort the connection without sending or reading more."""
        if self._streams:
            self._streams[1].transport.abort()
            self._streams = None

    async def _send(self, body: object, path: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n{self._headers}"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        if self._streams and (self._streams[0].at_eof() or self._streams[1].is_closing()):
            self.leave()
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host, self._port, limit=_LINE)
        self._streams[1].write(head.encode() + content)
        return self._streams


async def run_concurrently(
    server: Server, items: Iterable[Any], send_item: Callable[[ClientConnection, Any], Awaitable[None]], size: int
) -> None:
    """Call `send_item` for each item, on `size` concurrent connections.

    `items` is consumed lazily, so it may be a generator. The first exception ends all of it.
    """
    waiting = iter(items)

    async def process_items() -> None:
        connection = ClientConnection(server)
        try:
            for item in waiting:
                await send_item(connection, item)
        finally:
            connection.leave()

    async with asyncio.TaskGroup() as group:
        for _ in range(size):
            group.create_task(process_items())


def p99(times: list[float | None]) -> float:
    """The 99th percentile of the times, in seconds. `None` (a failed request) is left out."""
    known = sorted(each for each in times if each is not None)
    return known[int(len(known) * 0.99)] if known else 0.0


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines[1:] if line)
    return int(lines[0].split()[1]), {name.lower(): value.strip() for name, _, value in pairs}


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    if "content-length" in headers:
        return await reader.readexactly(int(headers["content-length"]))
    parts = []
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        parts.append((await reader.readexactly(size + 2))[:-2])
    await reader.readexactly(2)
    return b"".join(parts)
