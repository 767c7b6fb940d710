"""The server around the connections: it accepts, keeps time, and leaves without hurry.

uvicorn's own server stops listening at once and cuts what has not ended in time; this one lets a load balancer see
first that it leaves, and lets the engine end what is left, so that streams say that they are not whole.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from socket import socket
from types import TracebackType
from typing import Any, Self

from uvicorn import Config
from uvicorn.server import ServerState

from afterword.door.connection import Connection, Doorway
from afterword.door.limits import DoorLimits
from afterword.door.places import Places, open_files

_TICK = 1.0  # seconds
_LAST_WORDS = 2.0  # seconds for the errors with which the last answers end


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
        self._server: asyncio.Server | None = None
        self._ticking: asyncio.Task[None] | None = None

    @property
    def turned_away(self) -> Counter[str]:
        """How often connections were told an error before the application was asked, by its code or else its status."""
        return self._doorway.turned_away

    async def __aenter__(self) -> Self:
        self._config.load()
        self._tell_date()
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._connect, sock=self._listener, backlog=1024)
        self._ticking = asyncio.create_task(self._tick())
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
        if self._server is not None:
            self._server.close()
            self._server = None
        for connection in self._connections():
            connection.shutdown()

    def _connections(self) -> list[Connection]:
        return [each for each in self._state.connections if isinstance(each, Connection)]

    def _connect(self) -> Connection:
        return Connection(self._config, self._state, self._doorway)

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
