"""One connection: uvicorn's HTTP/1.1 protocol, with limits on everything that comes before a request is whole.

The parser (llhttp, strict) and the bytes of answers are uvicorn's and httptools'. Here a connection learns what it may
cost, refuses heads that are not clear, and answers one request at a time: what is sent ahead is not read, and the
connection ends after the answer.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
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
from afterword.transport.connection_limiter import ConnectionLimiter
from afterword.transport.deadlines import Deadlines, Phase
from afterword.transport.error_responses import ErrorResponse
from afterword.transport.request_head import check_head
from afterword.transport.transport_limits import UPLOAD_PATHS, TransportLimits

_MAX_DISCARDED = 2**20  # bytes thrown away after a refusal, so that the sender gets to read it
_BODIES = ("body", "upload")
_OF_UPGRADES = (b"upgrade", b"http2-settings")
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"  # which clients skip, however often it comes before the answer
_CHUNK_PREFIX = b"0"  # before the size of the next chunk, which it does not change
# seconds after which the system of a client that has left, near or far, has answered a probe
_PROBE_SECONDS = (0.005, 0.2)


@dataclass(slots=True)
class ConnectionContext:
    """What all connections have in common. Owner: the door. `draining`: every answer is a connection's last.

    `rejected`: how often connections were told an error from here, by its code or else its status.
    """

    limits: TransportLimits
    connection_limiter: ConnectionLimiter
    clock: Callable[[], float]
    draining: bool = False
    rejected: Counter[str] = field(default_factory=Counter)


class Connection(HttpToolsProtocol):
    """One client's connection. The transport and the parser call it; the door asks it to `check` the time."""

    def __init__(self, config: Config, state: ServerState, context: ConnectionContext) -> None:
        super().__init__(config, state, {}, asyncio.get_running_loop())
        self._context = context
        self._limits = context.limits
        self._deadlines = Deadlines(context.limits, context.clock())
        self._peer: str | None = None  # who has taken a place
        self._received = 0  # bytes since the head began
        self._chunk_size = 0  # bytes that are being read
        self._head = 0  # bytes of the head, as far as it is understood
        self._discarding = False  # nothing that comes is read
        self._half_closed = False  # nothing more comes
        self._discarded = 0

    # ---- what the transport says

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Somebody connects; without a place they are told so and let go."""
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
        """They are gone."""
        super().connection_lost(exc)
        if self._peer is not None:
            self._context.connection_limiter.release(self._peer)

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """The client sends nothing more. One with a whole request may still read its answer, so it gets that.

        A client that has left looks the same until something is sent: then its system answers with a reset, which
        `check` sees. HTTP/1.0 has nothing that could be sent before the answer, so there it counts as left.
        """
        if self._deadlines.phase != "answer":
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
        """Read on, as far as somebody listens."""
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
            elif self._deadlines.phase in _BODIES and self._framing() > self._limits.max_framing:
                self._reject(error_responses.FRAMING_TOO_LARGE)

    def check(self, now: float) -> None:
        """Cut what takes too long, and what is left alone; called every second or so."""
        self._check_disconnect()
        late = self._deadlines.overdue(now, self.transport.get_write_buffer_size())
        if late is None:
            return
        waited = late == "head" and self._received
        if waited or (late in _BODIES and not self.cycle.response_started):
            self._reject(error_responses.REQUEST_TIMEOUT)
        else:
            self.transport.abort()

    # ---- what the parser says; what is raised comes out of `feed_data`

    def on_message_begin(self) -> None:
        """A request begins, but not while another one is being answered."""
        if self.cycle is not None and not self.cycle.response_complete:
            raise error_responses.NOT_HTTP
        if self._deadlines.phase == "idle":  # it came with the rest of a body that had been answered before its end
            self._enter_phase("head")
            self._received = -self._chunk_size
        self._head = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """A part of the target."""
        self._head += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header. After the body it could not be told from one before it, so there it is refused."""
        if self._deadlines.phase != "head":
            raise error_responses.TRAILERS_NOT_ACCEPTED
        self._head += len(name) + len(value) + 4
        if len(self.headers) >= self._limits.max_headers or self._head > self._limits.max_head:
            raise error_responses.HEAD_TOO_LARGE
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is whole: the application begins unless it is refused. Offers to upgrade are not taken up."""
        version = self.parser.get_http_version()
        check_head(self.parser.get_method(), self.url, version, self.headers)
        self.expect_100_continue = self.expect_100_continue and version != "1.0"
        if self.parser.should_upgrade():
            return
        long = self.parser.get_method() == b"POST" and self.url.partition(b"?")[0] in UPLOAD_PATHS
        self._enter_phase("upload" if long else "body")
        super().on_headers_complete()
        if self._context.draining:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._deadlines.received += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole."""
        if self.parser.should_upgrade():
            return
        super().on_message_complete()
        self._enter_phase("idle" if self.cycle.response_complete else "answer")

    def on_response_complete(self) -> None:
        """The answer is whole."""
        super().on_response_complete()
        self._enter_phase("rest" if self.cycle.more_body else "idle")

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        """The application begins."""
        super()._start_asgi_task(cycle, _with_framing(app, cycle))

    # ----

    def _check_disconnect(self) -> None:
        """Cut a client that has not only ended its sending but left, which a reset has told."""
        line = self.transport.get_extra_info("socket") if self._half_closed else None
        if line is not None and not self.transport.is_closing() and line.getsockopt(SOL_SOCKET, SO_ERROR):
            self.transport.abort()

    def _framing(self) -> int:
        """Bytes of a body's framing beyond as many as the body has: headers of chunks, with their extensions.

        Each chunk costs work, however small it is; so framing may grow with the body, and a little beside it.
        """
        return self._received - self._head - 2 * self._deadlines.received

    def _enter_phase(self, phase: Phase) -> None:
        self._deadlines.enter_phase(phase, self._context.clock())

    def _decline_upgrade(self, rest: bytes) -> None:
        """Read a request that offers an upgrade again as one that does not: the parser leaves its body away."""
        kept = [
            (name, _without_upgrade(value) if name in (b"connection", b"proxy-connection") else value)
            for name, value in self.headers
            if name not in _OF_UPGRADES
        ]
        version = self.parser.get_http_version().encode()
        line = b"%s %s HTTP/%s\r\n" % (self.parser.get_method(), self.url, version)
        head = line + b"".join(b"%s: %s\r\n" % header for header in kept) + b"\r\n"
        self.parser = httptools.HttpRequestParser(self)
        self.data_received(head + rest)

    def _reject(self, refusal: ErrorResponse) -> None:
        """Read nothing more. Who is being answered gets the answer first; else this is one."""
        self._discarding = True
        cycle = self.cycle
        if self._deadlines.phase == "answer" or (self._deadlines.phase in _BODIES and cycle.response_started):
            cycle.keep_alive = False
            return
        if self._deadlines.phase == "rest":
            self.transport.close()
            return
        if self._deadlines.phase in _BODIES:
            cycle.disconnected = True  # to the application they are gone
            cycle.message_event.set()
        self._enter_phase("rest")
        self._count_rejection(refusal)
        self.transport.write(refusal.response)
        if self.transport.can_write_eof():
            self.transport.write_eof()  # and not `close`, with which what they still send would cost them the answer

    def _count_rejection(self, refusal: ErrorResponse) -> None:
        self._context.rejected[refusal.code or str(refusal.status)] += 1

    def _discard(self, size: int) -> None:
        self._discarded += size
        if self._discarded > _MAX_DISCARDED:
            self.transport.abort()


def _without_upgrade(value: bytes) -> bytes:
    """What a Connection header says beside an offer to upgrade, such as `close`."""
    options = [option.strip() for option in value.split(b",")]
    return b", ".join(option for option in options if option and option.lower() not in _OF_UPGRADES)


def _with_framing(app: ASGI3Application, cycle: RequestResponseCycle) -> ASGI3Application:
    """An application whose answers end where the client sees their end.

    With a content length that is the last byte, after which the client may send its next request at once: the answer
    is complete then, although the application has yet to say so. Without one, in HTTP/1.0, it is the connection's end.
    """

    async def answer(scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        unframed = False

        async def sent(message: ASGISendEvent) -> None:
            nonlocal unframed
            if message["type"] == "http.response.start":
                has_length = any(name.lower() == b"content-length" for name, _ in message.get("headers", []))
                unframed = cycle.scope["http_version"] == "1.0" and not has_length
                if unframed:
                    cycle.chunked_encoding = False
            elif message["type"] == "http.response.body" and not cycle.chunked_encoding:
                body = message.get("body", b"")
                if unframed:
                    cycle.expected_content_length = len(body)  # uvicorn asks for no more than that
                elif cycle.response_complete and not body:
                    return
                elif len(body) == cycle.expected_content_length:
                    message = {"type": "http.response.body", "body": body, "more_body": False}
            await send(message)

        await app(scope, receive, sent)

    return answer
