"""HTTP/1.1 connections: uvicorn's protocol class with limits on size and time.

The parser (llhttp, strict mode) is httptools'; responses are written by uvicorn. `Connection` adds the limits of
`TransportLimits`, rejects ambiguous request heads and answers one request at a time. Requests that a client pipelines
are not read: the connection closes after the current response.

Each `Connection` owns the state of its TCP connection. All connections of a server share one `ConnectionContext`, which
the `TransportServer` owns. Everything here runs on the event loop.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from socket import SO_ERROR, SOL_SOCKET

import httptools
from uvicorn import Config
from uvicorn._types import (
    ASGI3Application,
    ASGIReceiveCallable,
    ASGISendCallable,
    ASGISendEvent,
    Scope,
)
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from afterword.transport import error_responses
from afterword.transport.body_writer import WRITE_BODY_KEY
from afterword.transport.connection_limiter import ConnectionLimiter
from afterword.transport.deadlines import Deadlines, Phase
from afterword.transport.error_responses import ErrorResponse
from afterword.transport.request_head import check_head
from afterword.transport.transport_limits import UPLOAD_PATHS, TransportLimits

_MAX_DISCARDED = 2**20  # bytes read and dropped after a rejection, so that the client can read the error response
_BODY_PHASES = ("body", "upload")
_UPGRADE_HEADERS = (b"upgrade", b"http2-settings")
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"  # clients skip it, however often it comes before the response
_CHUNK_PREFIX = b"0"  # a leading zero before the size of the next chunk, which does not change that size
# seconds after a probe when a disconnected client's reset has arrived: from this machine or network, and from afar
_PROBE_SECONDS = (0.005, 0.2)


@dataclass(slots=True)
class ConnectionContext:
    """The state that all connections of a server share; the `TransportServer` owns it.

    `draining`: every connection closes after its current response. `rejected` counts the error responses that the
    transport sent, by error code, or by status where the error has no code.
    """

    limits: TransportLimits
    connection_limiter: ConnectionLimiter
    clock: Callable[[], float]
    draining: bool = False
    rejected: Counter[str] = field(default_factory=Counter)


class Connection(HttpToolsProtocol):
    """One client's connection. The asyncio transport and the parser call it; the server calls `check` every second."""

    def __init__(self, config: Config, state: ServerState, context: ConnectionContext) -> None:
        super().__init__(config, state, {}, asyncio.get_running_loop())
        self._context = context
        self._limits = context.limits
        self._deadlines = Deadlines(context.limits, context.clock())
        self._peer: str | None = None  # the address that holds a connection of the limiter; None after a rejection
        self._received = 0  # bytes since the head began
        self._chunk_size = 0  # bytes of the data being parsed
        self._head = 0  # bytes of the head that have been parsed
        self._discarding = False  # all further input is dropped
        self._half_closed = False  # the client has closed its sending side
        self._discarded = 0

    # ---- called by the asyncio transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Acquire a connection from the limiter, or send 503 and close."""
        super().connection_made(transport)
        peer = self.client[0] if self.client else ""
        if self._context.connection_limiter.acquire(peer):
            self._peer = peer
        else:
            self._discarding = True
            self._count_rejection(error_responses.TOO_MANY_CONNECTIONS)
            transport.write(error_responses.TOO_MANY_CONNECTIONS.response)
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # uvicorn leaves this timer, which refers to the connection, after a reset
        if self._peer is not None:
            self._context.connection_limiter.release(self._peer)

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """Handle a half-close: the client sends nothing more. A client with a complete request still gets its response.

        A client that has disconnected looks the same until the server sends something: the client's operating system
        then replies with a reset, which `_check_disconnect` sees. So the server sends bytes without meaning. HTTP/1.0
        has no such bytes before a response, so there a half-close counts as a disconnect.
        """
        if self._deadlines.phase != "response":
            return None
        cycle = self.cycle
        if not cycle.response_started:
            if cycle.scope["http_version"] == "1.0":
                return None
            self.transport.write(_CONTINUE)
        elif cycle.chunked_encoding and cycle.scope["method"] != "HEAD":
            self.transport.write(_CHUNK_PREFIX)
        cycle.keep_alive = False
        self._half_closed = True
        for seconds in _PROBE_SECONDS:
            self.loop.call_later(seconds, self._check_disconnect)
        return True

    def data_received(self, data: bytes) -> None:
        """Parse received bytes, unless the connection discards its input."""
        if self._discarding:
            self._discard(len(data))
            return
        self._unset_keepalive_if_required()
        if self._deadlines.phase == "idle":
            self._enter_phase("head")
            self._received = 0
        self._chunk_size = len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._decline_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError as problem:
            reason = problem.__context__
            self._reject(reason if isinstance(reason, ErrorResponse) else error_responses.NOT_HTTP)
        else:
            self._received += len(data)
            if self._deadlines.phase == "head" and self._received > self._limits.max_head:
                self._reject(error_responses.HEAD_TOO_LARGE)
            elif self._deadlines.phase in _BODY_PHASES and self._framing() > self._limits.max_framing:
                self._reject(error_responses.FRAMING_TOO_LARGE)

    def check(self, now: float) -> None:
        """Reject or abort the connection if a deadline has passed or the client has disconnected."""
        self._check_disconnect()
        late = self._deadlines.overdue(now, self.transport.get_write_buffer_size())
        if late is None:
            return
        waited = late == "head" and self._received
        if waited or (late in _BODY_PHASES and not self.cycle.response_started):
            self._reject(error_responses.REQUEST_TIMEOUT)
        else:
            self.transport.abort()

    # ---- called by the parser; `feed_data` re-raises what these methods raise

    def on_message_begin(self) -> None:
        """Begin a request. A pipelined request during a response ends the connection after that response."""
        if self.cycle is not None and not self.cycle.response_complete:
            raise error_responses.NOT_HTTP
        if self._deadlines.phase == "idle":  # it arrived with the end of an already answered body
            self._enter_phase("head")
            self._received = -self._chunk_size
        self._head = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._head += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Record a header. A trailer would be indistinguishable from a header before the body, so it is rejected."""
        if self._deadlines.phase != "head":
            raise error_responses.TRAILERS_NOT_ACCEPTED
        self._head += len(name) + len(value) + 4
        if len(self.headers) >= self._limits.max_headers or self._head > self._limits.max_head:
            raise error_responses.HEAD_TOO_LARGE
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Check the complete head and start the application. An offer to upgrade the protocol is ignored."""
        version = self.parser.get_http_version()
        check_head(self.parser.get_method(), self.url, version, self.headers)
        self.expect_100_continue = self.expect_100_continue and version != "1.0"
        if self.parser.should_upgrade():
            return
        is_upload = self.parser.get_method() == b"POST" and self.url.partition(b"?")[0] in UPLOAD_PATHS
        self._enter_phase("upload" if is_upload else "body")
        super().on_headers_complete()
        if self._context.draining:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        self._deadlines.received += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        super().on_message_complete()
        self._enter_phase("idle" if self.cycle.response_complete else "response")

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._enter_phase("rest" if self.cycle.more_body else "idle")

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        cycle.scope[WRITE_BODY_KEY] = partial(_write_part, cycle)  # type: ignore[literal-required]
        super()._start_asgi_task(cycle, _with_framing(app, cycle))

    # ---- internals

    def _check_disconnect(self) -> None:
        """Abort the connection if a client that half-closed it has disconnected: a reset has set a socket error."""
        sock = self.transport.get_extra_info("socket") if self._half_closed else None
        if sock is not None and not self.transport.is_closing() and sock.getsockopt(SOL_SOCKET, SO_ERROR):
            self.transport.abort()

    def _framing(self) -> int:
        """Bytes of a body's chunk framing (sizes, extensions) beyond the size of the body itself.

        Each chunk costs processing time, however small it is. So the framing may be as large as the body, plus
        `max_framing` bytes.
        """
        return self._received - self._head - 2 * self._deadlines.received

    def _enter_phase(self, phase: Phase) -> None:
        self._deadlines.enter_phase(phase, self._context.clock())

    def _decline_upgrade(self, rest: bytes) -> None:
        """Parse a request that offers an upgrade again without the offer: the parser does not read its body otherwise.

        `rest`: the bytes after the head that the parser has not consumed.
        """
        headers = [
            (name, _without_upgrade(value) if name in (b"connection", b"proxy-connection") else value)
            for name, value in self.headers
            if name not in _UPGRADE_HEADERS
        ]
        version = self.parser.get_http_version().encode()
        line = b"%s %s HTTP/%s\r\n" % (self.parser.get_method(), self.url, version)
        head = line + b"".join(b"%s: %s\r\n" % header for header in headers) + b"\r\n"
        self.parser = httptools.HttpRequestParser(self)
        self.data_received(head + rest)

    def _reject(self, error: ErrorResponse) -> None:
        """Stop reading and send an error response. A response that is due or has begun is finished instead."""
        self._discarding = True
        cycle = self.cycle
        if self._deadlines.phase == "response" or (self._deadlines.phase in _BODY_PHASES and cycle.response_started):
            cycle.keep_alive = False
            return
        if self._deadlines.phase == "rest":
            self.transport.close()
            return
        if self._deadlines.phase in _BODY_PHASES:
            cycle.disconnected = True  # the application sees a disconnected client
            cycle.message_event.set()
        self._enter_phase("rest")
        self._count_rejection(error)
        self.transport.write(error.response)
        if self.transport.can_write_eof():
            # not `close`: unread input would make the system send a reset, which can destroy the error response
            self.transport.write_eof()

    def _count_rejection(self, error: ErrorResponse) -> None:
        self._context.rejected[error.code or str(error.status)] += 1

    def _discard(self, size: int) -> None:
        self._discarded += size
        if self._discarded > _MAX_DISCARDED:
            self.transport.abort()


def _without_upgrade(value: bytes) -> bytes:
    """The value of a Connection header without the options of an upgrade; other options such as `close` stay."""
    options = [option.strip() for option in value.split(b",")]
    return b", ".join(option for option in options if option and option.lower() not in _UPGRADE_HEADERS)


def _write_part(cycle: RequestResponseCycle, part: bytes) -> bool:
    """Write a part of a body that is sent in chunks, as uvicorn's `send` does; see `WriteBody`."""
    if not part or not cycle.chunked_encoding or cycle.scope["method"] == "HEAD":
        return False
    if cycle.response_complete or cycle.disconnected or cycle.flow.write_paused:
        return False
    cycle.transport.write(b"%x\r\n%b\r\n" % (len(part), part))
    return True


def _with_framing(app: ASGI3Application, cycle: RequestResponseCycle) -> ASGI3Application:
    """Wrap an application so that its response is complete when the client sees its end.

    With a content length, the response ends with its last byte, and the client may send the next request at once. So
    the response is marked complete then, before the application says so. Without a content length in HTTP/1.0, the end
    of the connection ends the response.
    """

    async def framed(scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        ends_with_connection = False

        async def send_framed(message: ASGISendEvent) -> None:
            nonlocal ends_with_connection
            if message["type"] == "http.response.start":
                has_length = any(name.lower() == b"content-length" for name, _ in message.get("headers", []))
                ends_with_connection = cycle.scope["http_version"] == "1.0" and not has_length
                if ends_with_connection:
                    cycle.chunked_encoding = False
            elif message["type"] == "http.response.body" and not cycle.chunked_encoding:
                body = message.get("body", b"")
                if ends_with_connection:
                    cycle.expected_content_length = len(body)  # uvicorn checks the length of each part
                elif cycle.response_complete and not body:
                    return
                elif len(body) == cycle.expected_content_length:
                    message = {"type": "http.response.body", "body": body, "more_body": False}
            await send(message)

        await app(scope, receive, send_framed)

    return framed
