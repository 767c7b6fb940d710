"""The server around the connections: it accepts, keeps time, and leaves without hurry.

uvicorn's own server stops listening at once and cuts what has not ended in time; this one lets a load balancer see
first that it leaves, and lets the engine end what is left, so that streams say that they are not whole.
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

_TICK = 1.0  # seconds
_AT_ONCE = 16  # connections that are accepted together
_PAUSE = 0.1  # seconds without accepting where the system has no file descriptor or no memory for a connection
_OUT_OF_RESOURCES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_CLOSE_SECONDS = 2.0  # seconds for the errors with which the last answers end

_log = logging.getLogger(__name__)


class TransportServer:
    """Lets requests in to an application. Owner of the listener and of all connections."""

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
        most = raise_file_limit(limits.max_connections)
        connection_limiter = ConnectionLimiter(
            most, most if limits.max_per_peer is None else limits.max_per_peer, proxies
        )
        self._context = ConnectionContext(limits, connection_limiter, clock)
        self._ticking: asyncio.Task[None] | None = None
        self._admitted: set[asyncio.Task[None]] = set()
        self._open = self._logged = False

    @property
    def rejected(self) -> Counter[str]:
        """How often connections were told an error before the application was asked, by its code or else its status."""
        return self._context.rejected

    async def __aenter__(self) -> Self:
        self._config.load()
        self._update_date()
        self._listener.setblocking(False)
        self._open = True
        self._listen()
        self._ticking = supervised(self._tick, "connection times")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        await self._wait_closed(_CLOSE_SECONDS, asyncio.Event())
        for connection in self._connections():
            connection.transport.abort()
        if self._ticking is not None:
            self._ticking.cancel()
        if self._state.tasks:  # to them their clients have left
            await asyncio.wait(self._state.tasks, timeout=_CLOSE_SECONDS)

    async def drain(self, delay: float, grace: float, hurry: asyncio.Event) -> None:
        """Answer for `delay` seconds as if nothing were, then let nobody in, and wait for the rest to end.

        Returns when all have left, after `grace` seconds, or when there is suddenly a `hurry`.
        """
        self._context.draining = True
        await _wait_for(hurry, delay)
        self.close()
        await self._wait_closed(grace, hurry)

    def close(self) -> None:
        """Let nobody in any more. Connections without a request end, the others after their answer."""
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
        """Accept some of the connections that wait, so that few are open that have no place.

        An event loop's own server would accept all that wait at once, and leave no file descriptor to anything else.
        """
        for _ in range(_AT_ONCE):
            try:
                accepted, _address = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno in _OUT_OF_RESOURCES:
                    self._pause_accepting(error.strerror)
                    return
                continue  # the connection ended before it was accepted
            accepted.setblocking(False)
            if is_scarce_descriptor(accepted.fileno()):
                self._reject(accepted)
                self._pause_accepting("few file descriptors are left")
                return
            task = run_logged(partial(self._start_protocol, accepted), "a new connection")
            self._admitted.add(task)
            task.add_done_callback(self._admitted.discard)

    async def _start_protocol(self, accepted: socket) -> None:
        """Have a protocol read from a connection."""
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
        """Accept nothing for a moment; logged once."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._listener)
        loop.call_later(_PAUSE, self._listen)
        if not self._logged:
            _log.warning("Connections wait or are refused: %s. Raise the limit of open files.", why)
        self._logged = True

    def _listen(self) -> None:
        if self._open:
            asyncio.get_running_loop().add_reader(self._listener, self._accept)

    async def _wait_closed(self, seconds: float, hurry: asyncio.Event) -> None:
        """Wait until nobody is left, but no longer than that."""
        end = self._context.clock() + seconds
        while self._state.connections and not hurry.is_set() and self._context.clock() < end:
            await _wait_for(hurry, 0.05)

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
    """Whether an event comes within some seconds."""
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        return False
    return True
