"""The HTTP server: it owns the listening socket and all connections, checks their deadlines, and drains them.

`TransportServer` replaces uvicorn's server, which closes its listener at once on shutdown and cuts late responses.
This server first keeps answering while `/ready` says `draining`, so that a load balancer notices. It then lets the
engine end the remaining responses, so that unfinished streams end with an error event. All state belongs to the event
loop that enters the server.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from email.utils import formatdate
from functools import partial
from socket import socket
from types import TracebackType
from typing import Any, Self

from uvicorn import Config
from uvicorn.server import ServerState

from afterword.system.tasks import run_logged, supervised
from afterword.transport import error_responses
from afterword.transport.connection import Connection, ConnectionContext
from afterword.transport.connection_limiter import ConnectionLimiter, is_scarce_descriptor, raise_file_limit
from afterword.transport.transport_limits import TransportLimits

_TICK = 1.0  # seconds between two checks of all connections
_ACCEPT_BATCH = 16  # connections that are accepted in one turn of the event loop
_PAUSE = 0.1  # seconds without accepting when the system has no file descriptor or memory for a connection
_OUT_OF_RESOURCES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_CLOSE_SECONDS = 2.0  # seconds in which the last responses can end with their errors

_log = logging.getLogger(__name__)


class TransportServer:
    """Serves an ASGI application on a listening socket. Owner of the listener and of all connections.

    `proxies`: addresses with a trusted `X-Forwarded-For` header. `clock` returns seconds.
    """

    def __init__(
        self,
        app: Callable[..., Awaitable[Any]],
        listener: socket,
        limits: TransportLimits,
        proxies: tuple[str, ...] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._listener = listener
        self._config = Config(
            app,
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=bool(proxies),
            forwarded_allow_ips=list(proxies),
            timeout_keep_alive=int(limits.idle_seconds),
        )
        self._state = ServerState()
        max_connections = raise_file_limit(limits.max_connections)
        connection_limiter = ConnectionLimiter(
            max_connections, max_connections if limits.max_per_peer is None else limits.max_per_peer, proxies
        )
        self._context = ConnectionContext(limits, connection_limiter, clock)
        self._checking: asyncio.Task[None] | None = None
        self._starting: set[asyncio.Task[None]] = set()
        self._open = self._pause_logged = False

    @property
    def rejected(self) -> Counter[str]:
        """How many error responses the transport sent, by error code, or by status where the error has no code."""
        return self._context.rejected

    async def __aenter__(self) -> Self:
        self._config.load()
        self._update_date()
        self._listener.setblocking(False)
        self._open = True
        self._listen()
        self._checking = supervised(self._tick, "connection times")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        await self._wait_closed(_CLOSE_SECONDS, asyncio.Event())
        for connection in self._connections():
            connection.transport.abort()
        if self._checking is not None:
            self._checking.cancel()
        if self._state.tasks:  # the application sees disconnected clients
            await asyncio.wait(self._state.tasks, timeout=_CLOSE_SECONDS)

    async def drain(self, delay: float, grace: float, stop_waiting: asyncio.Event) -> None:
        """Serve for another `delay` seconds, then stop accepting and wait until all connections are closed.

        Each response is its connection's last from now on. Returns when no connection is left, `grace` seconds after
        accepting stopped, or when `stop_waiting` is set.
        """
        self._context.draining = True
        await _wait_for(stop_waiting, delay)
        self.close()
        await self._wait_closed(grace, stop_waiting)

    def close(self) -> None:
        """Stop accepting. Idle connections close now, the others after their response."""
        self._context.draining = True
        if self._open:
            self._open = False
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
        for connection in self._connections():
            connection.shutdown()

    def _connections(self) -> list[Connection]:
        return [each for each in self._state.connections if isinstance(each, Connection)]

    def _connect(self) -> Connection:
        return Connection(self._config, self._state, self._context)

    def _accept(self) -> None:
        """Accept up to `_ACCEPT_BATCH` waiting connections, so that few are open above the connection limit.

        The event loop's own server would accept all waiting connections at once and use up the file descriptors.
        """
        for _ in range(_ACCEPT_BATCH):
            try:
                accepted, _address = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno in _OUT_OF_RESOURCES:
                    self._pause_accepting(error.strerror)
                    return
                continue  # the client closed the connection before it was accepted
            accepted.setblocking(False)
            if is_scarce_descriptor(accepted.fileno()):
                self._reject(accepted)
                self._pause_accepting("too few file descriptors are free")
                return
            task = run_logged(partial(self._start_protocol, accepted), "a new connection")
            self._starting.add(task)
            task.add_done_callback(self._starting.discard)

    async def _start_protocol(self, accepted: socket) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(self._connect, accepted)
        except BaseException:
            accepted.close()
            raise

    def _reject(self, accepted: socket) -> None:
        self._context.rejected[str(error_responses.TOO_MANY_CONNECTIONS.code)] += 1
        with suppress(OSError):
            accepted.send(error_responses.TOO_MANY_CONNECTIONS.response)
        accepted.close()

    def _pause_accepting(self, why: str | None) -> None:
        """Accept nothing for `_PAUSE` seconds. Only the first pause is logged."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._listener)
        loop.call_later(_PAUSE, self._listen)
        if not self._pause_logged:
            _log.warning("Connections wait or are rejected: %s. Raise the limit on open files (ulimit -n).", why)
        self._pause_logged = True

    def _listen(self) -> None:
        if self._open:
            asyncio.get_running_loop().add_reader(self._listener, self._accept)

    async def _wait_closed(self, seconds: float, stop_waiting: asyncio.Event) -> None:
        """Wait until no connection is left, for at most `seconds`, or until `stop_waiting` is set."""
        end = self._context.clock() + seconds
        while self._state.connections and not stop_waiting.is_set() and self._context.clock() < end:
            await _wait_for(stop_waiting, 0.05)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK)
            self._update_date()
            now = self._context.clock()
            for connection in self._connections():
                connection.check(now)

    def _update_date(self) -> None:
        self._state.default_headers = [(b"date", formatdate(time.time(), usegmt=True).encode())]


async def _wait_for(event: asyncio.Event, seconds: float) -> bool:
    """Whether `event` is set within `seconds`."""
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        return False
    return True
