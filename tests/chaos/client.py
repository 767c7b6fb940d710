"""A client that costs little, so that many requests are possible: kept connections, an answer's bytes and no more."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from .server import Server

PATIENCE = 30.0
"""Seconds after which an answer that has not come is a hang."""
_LINE = 2**20  # bytes of a header block
_PAUSE = 0.1  # seconds that a client that disconnects waits for more


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer. `body` is without framing; of a stream, all events. Status 0: none, and `body` says why.

    `first`: seconds to its head, with which a stream's first token comes.
    """

    status: int
    body: bytes
    first: float = 0.0

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[Any]:
        """What a whole stream brought, "[DONE]" included."""
        lines = (line[6:] for line in self.body.split(b"\n\n") if line)
        return [line.decode() if line == b"[DONE]" else json.loads(line) for line in lines]


class Caller:
    """One connection, opened when it is needed and kept. It owns its socket."""

    def __init__(self, server: Server) -> None:
        self._host, self._port = "127.0.0.1", server.port
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in server.headers.items())
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, body: object, path: str = "/v1/completions") -> Reply:
        """POST a value as JSON, or bytes as they are. An answer that does not come, or not whole, has the status 0."""
        start = time.monotonic()
        try:
            async with asyncio.timeout(PATIENCE):
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

    async def ask_and_leave(self, body: object, after: int, path: str = "/v1/completions") -> None:
        """The same, but gone for good after so many reads of the answer; 0: before there is any."""
        with suppress(TimeoutError, OSError):
            reader, _ = await self._send(body, path)
            for _ in range(after):
                async with asyncio.timeout(_PAUSE):  # an answer may be over by now, or have not begun
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


async def crowd(
    server: Server, items: Iterable[Any], visit: Callable[[Caller, Any], Awaitable[None]], size: int
) -> None:
    """Visit the server with each item, `size` at a time, each visitor on a connection of its own.

    An item is taken when a visitor is free, so they can be made on the way. The first exception ends it.
    """
    waiting = iter(items)

    async def visitor() -> None:
        caller = Caller(server)
        try:
            for item in waiting:
                await visit(caller, item)
        finally:
            caller.leave()

    async with asyncio.TaskGroup() as group:
        for _ in range(size):
            group.create_task(visitor())


def late(times: list[float | None]) -> float:
    """How long all but one in a hundred took at most, of those that came at all."""
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
