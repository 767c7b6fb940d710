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

from afterword.door import refusals
from afterword.door.connection import Connection, Doorway
from afterword.door.limits import DoorLimits
from afterword.door.places import Places, is_last, open_files
from afterword.tasks import logged, supervised

_TICK = 1.0  # seconds
_AT_ONCE = 16  # connections that are accepted together
_PAUSE = 0.1  # seconds without accepting where the system has no file descriptor or no memory for a connection
_SCARCE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_LAST_WORDS = 2.0  # seconds for the errors with which the last answers end

_log = logging.getLogger(__name__)


class Door:
    """Lets requests in to an application. Owner of the listener and of all connections."""

    def __init__(
        self,
        app: Callable[..., Awaitable[Any]],
        listener: socket,
        limits: DoorLimits,
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
        most = open_files(limits.max_connections)
        places = Places(most, most if limits.max_per_peer is None else limits.max_per_peer, proxies)
        self._doorway = Doorway(limits, places, clock)
        self._ticking: asyncio.Task[None] | None = None
        self._admitted: set[asyncio.Task[None]] = set()
        self._open = self._told = False

    @property
    def turned_away(self) -> Counter[str]:
        """How often connections were told an error before the application was asked, by its code or else its status."""
        return self._doorway.turned_away

    async def __aenter__(self) -> Self:
        self._config.load()
        self._tell_date()
        self._listener.setblocking(False)
        self._open = True
        self._listen()
        self._ticking = supervised(self._tick, "connection times")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        await self._emptied(_LAST_WORDS, asyncio.Event())
        for connection in self._connections():
            connection.transport.abort()
        if self._ticking is not None:
            self._ticking.cancel()
        if self._state.tasks:  # to them their clients have left
            await asyncio.wait(self._state.tasks, timeout=_LAST_WORDS)

    async def drain(self, delay: float, grace: float, hurry: asyncio.Event) -> None:
        """Answer for `delay` seconds as if nothing were, then let nobody in, and wait for the rest to end.

        Returns when all have left, after `grace` seconds, or when there is suddenly a `hurry`.
        """
        self._doorway.leaving = True
        await _happens(hurry, delay)
        self.close()
        await self._emptied(grace, hurry)

    def close(self) -> None:
        """Let nobody in any more. Connections without a request end, the others after their answer."""
        self._doorway.leaving = True
        if self._open:
            self._open = False
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
        for connection in self._connections():
            connection.shutdown()

    def _connections(self) -> list[Connection]:
        return [each for each in self._state.connections if isinstance(each, Connection)]

    def _connect(self) -> Connection:
        return Connection(self._config, self._state, self._doorway)

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
                if error.errno in _SCARCE:
                    self._rest(error.strerror)
                    return
                continue  # the connection ended before it was accepted
            accepted.setblocking(False)
            if is_last(accepted.fileno()):
                self._turn_away(accepted)
                self._rest("few file descriptors are left")
                return
            task = logged(partial(self._admit, accepted), "a new connection")
            self._admitted.add(task)
            task.add_done_callback(self._admitted.discard)

    async def _admit(self, accepted: socket) -> None:
        """Have a protocol read from a connection."""
        try:
            await asyncio.get_running_loop().connect_accepted_socket(self._connect, accepted)
        except BaseException:
            accepted.close()
            raise

    def _turn_away(self, accepted: socket) -> None:
        self._doorway.turned_away[str(refusals.FULL.code)] += 1
        with suppress(OSError):
            accepted.send(refusals.FULL.response)
        accepted.close()

    def _rest(self, why: str | None) -> None:
        """Accept nothing for a moment; logged once."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._listener)
        loop.call_later(_PAUSE, self._listen)
        if not self._told:
            _log.warning("Connections wait or are refused: %s. Raise the limit of open files.", why)
        self._told = True

    def _listen(self) -> None:
        if self._open:
            asyncio.get_running_loop().add_reader(self._listener, self._accept)

    async def _emptied(self, seconds: float, hurry: asyncio.Event) -> None:
        """Wait until nobody is left, but no longer than that."""
        end = self._doorway.clock() + seconds
        while self._state.connections and not hurry.is_set() and self._doorway.clock() < end:
            await _happens(hurry, 0.05)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK)
            self._tell_date()
            now = self._doorway.clock()
            for connection in self._connections():
                connection.check(now)

    def _tell_date(self) -> None:
        self._state.default_headers = [(b"date", formatdate(time.time(), usegmt=True).encode())]


async def _happens(event: asyncio.Event, seconds: float) -> bool:
    """Whether an event comes within some seconds."""
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        return False
    return True
