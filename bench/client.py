"""An HTTP client with as little overhead as Python allows, so that it does not limit the measured server.

It stores the arrival time of all bytes of a response and parses them when the response is complete.
"""

from __future__ import annotations

import asyncio
import json
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

Json = dict[str, Any]


class NotPossible(Exception):
    """A server does not support a scenario. The message is the reason that the table shows."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A response: JSON objects, each with the time at which it was complete. A whole response is one object."""

    started: float
    events: tuple[tuple[float, Json], ...]

    @property
    def ended(self) -> float:
        """The time at which the last object was complete."""
        return self.events[-1][0]

    @property
    def times(self) -> list[float]:
        """The times of the objects that contain a choice, and so tokens."""
        return [time for time, event in self.events if event.get("choices")]

    @property
    def choices(self) -> list[Json]:
        """All choices of all objects, in the order of their arrival."""
        return [choice for _, event in self.events for choice in event.get("choices") or ()]

    @property
    def usage(self) -> Json | None:
        """The token counts; None if the server reported none."""
        return next((event["usage"] for _, event in reversed(self.events) if event.get("usage")), None)


class Exchange(asyncio.Protocol):
    """One connection with one request at a time. It owns the received bytes."""

    def __init__(self) -> None:
        self.received = bytearray()
        self.arrivals: list[tuple[int, float]] = []
        """Pairs of a number of received bytes and the time at which they had arrived."""
        self.started = 0.0
        self._head: tuple[int, Mapping[bytes, bytes]] | None = None
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Called by the event loop: store the bytes and their time."""
        self.received += data
        self.arrivals.append((len(self.received), perf_counter()))
        if not self._over.done() and self._is_complete():
            self._over.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the event loop."""
        self._transport = None
        if self._over.done():
            return
        if self._head and not self._head[1].keys() & {b"content-length", b"transfer-encoding"}:
            self._over.set_result(None)  # the end of the connection ends such a body
        else:
            self._over.set_exception(exc or ConnectionResetError("The server closed the connection."))

    def send(self, request: bytes) -> None:
        """Begin a new exchange."""
        if self._transport is None:
            raise ConnectionResetError("The server closed the connection.")
        self.received, self.arrivals, self._head = bytearray(), [], None
        self._over = asyncio.get_running_loop().create_future()
        self.started = perf_counter()
        self._transport.write(request)

    async def over(self) -> None:
        """Wait until the response is complete."""
        await asyncio.shield(self._over)

    def close(self) -> None:
        """Abort the connection, also during a response."""
        self._over.cancel()
        if self._transport:
            self._transport.abort()

    @property
    def ended(self) -> bool:
        """Whether the response is complete or has failed."""
        return self._over.done()

    @property
    def reusable(self) -> bool:
        """Whether the connection can carry another exchange."""
        return self._transport is not None and self._head is not None and self._head[1].get(b"connection") != b"close"

    def _is_complete(self) -> bool:
        if self._head is None:
            end = self.received.find(b"\r\n\r\n")
            if end < 0:
                return False
            self._head = end + 4, dict(_headers(bytes(self.received[:end])))
        start, headers = self._head
        if b"content-length" in headers:
            return len(self.received) >= start + int(headers[b"content-length"])
        # JSON contains no bare line ends, so only the last chunk ends with these bytes.
        return b"transfer-encoding" in headers and self.received.endswith(b"\r\n0\r\n\r\n")

    def read(self) -> Answer:
        """Parse the received bytes. Raises `NotPossible` with the server's error message."""
        if self._head is None:
            raise ConnectionResetError("The server sent no whole header.")
        start, headers = self._head
        status = int(self.received.split(maxsplit=2)[1])
        chunked = b"transfer-encoding" in headers
        pieces = (
            list(_chunks(self.received, start)) if chunked else [(len(self.received), bytes(self.received[start:]))]
        )
        if status != 200:
            raise NotPossible(f"{status}: {_message(b''.join(data for _, data in pieces))}")
        streamed = headers.get(b"content-type", b"").startswith(b"text/event-stream")
        bodies = list(_data_lines(pieces)) if streamed else [(pieces[-1][0], b"".join(data for _, data in pieces))]
        events = tuple((self._time(end), json.loads(body)) for end, body in bodies if body != b"[DONE]")
        for _, event in events:
            if "error" in event:
                raise NotPossible(f"error: {_message(json.dumps(event).encode())}")
        if not events:
            raise NotPossible("the response is empty")
        return Answer(self.started, events)

    def _time(self, end: int) -> float:
        return self.arrivals[bisect_left(self.arrivals, (end, 0.0))][1]


class Client:
    """Connections to one server, kept open for further requests."""

    def __init__(self, url: str, key: str | None = None) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"{url!r} is not an http:// URL.")
        self.host, self.port = parts.hostname, parts.port or 80
        self.path = parts.path.rstrip("/").removesuffix("/v1")
        self.key = key
        self._idle: list[Exchange] = []

    async def ask(self, path: str, body: Json | None = None) -> Answer:
        """Send a request (POST with a body, else GET) and return its whole response."""
        exchange = await self.begin(path, body)
        try:
            try:
                await exchange.over()
            except ConnectionError:
                if exchange.arrivals:
                    raise
                # A server may close an idle connection at any time, so a request without any response is repeated.
                exchange.close()
                exchange = await self.begin(path, body, fresh=True)
                await exchange.over()
            answer = exchange.read()
        except BaseException:
            exchange.close()
            raise
        if exchange.reusable:
            self._idle.append(exchange)
        else:
            exchange.close()
        return answer

    async def begin(self, path: str, body: Json | None = None, fresh: bool = False) -> Exchange:
        """Send a request and return without waiting for the response. The caller closes the exchange."""
        request = self._request(path, body)
        while self._idle and not fresh:
            exchange = self._idle.pop()
            if exchange.reusable:
                exchange.send(request)
                return exchange
        _, exchange = await asyncio.get_running_loop().create_connection(Exchange, self.host, self.port)
        exchange.send(request)
        return exchange

    async def close(self) -> None:
        """Close idle connections."""
        while self._idle:
            self._idle.pop().close()
        await asyncio.sleep(0)  # the event loop closes sockets in its next turn

    def _request(self, path: str, body: Json | None) -> bytes:
        content = b"" if body is None else json.dumps(body, separators=(",", ":")).encode()
        lines = [
            f"{'GET' if body is None else 'POST'} {self.path}{path} HTTP/1.1",
            f"Host: {self.host}:{self.port}",
            "Content-Type: application/json",
            f"Content-Length: {len(content)}",
            *([f"Authorization: Bearer {self.key}"] if self.key else []),
        ]
        return "\r\n".join([*lines, "", ""]).encode() + content


def _headers(head: bytes) -> Iterator[tuple[bytes, bytes]]:
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        yield name.strip().lower(), value.strip().lower()


def _chunks(raw: bytearray, start: int) -> Iterator[tuple[int, bytes]]:
    """The data of each complete chunk, and the position of its end in the raw bytes."""
    while (line_end := raw.find(b"\r\n", start)) >= 0:
        size = int(raw[start:line_end].partition(b";")[0], 16)
        end = line_end + 2 + size
        if size == 0 or end > len(raw):
            return
        yield end, bytes(raw[line_end + 2 : end])
        start = end + 2


def _data_lines(pieces: list[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """The contents of the `data:` lines of an event stream, each with the raw position of its end."""
    rest = b""
    for end, data in pieces:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield end, line[5:].strip()


def _message(body: bytes) -> str:
    """The message of an error body, in OpenAI's envelope or a similar one."""
    try:
        value = json.loads(body)
        inner = value.get("error", value) if isinstance(value, dict) else value
        text = inner.get("message") or inner.get("detail") or inner if isinstance(inner, dict) else inner
    except ValueError:
        text = body.decode(errors="replace")
    return " ".join(str(text).split())[:150]
