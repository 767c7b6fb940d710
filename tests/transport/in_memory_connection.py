"""A connection without a network: the real protocol and application over a transport that only remembers.

Time stands still unless a test moves it. Names here are the clients': they `say` bytes and see what they were `told`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import Mock

from uvicorn import Config
from uvicorn.server import ServerState

import scripted_engine
from afterword import config
from afterword.api.app import make_app
from afterword.api.service import Service
from afterword.engine.parent.model_manager import ModelDefinition, ModelManager
from afterword.engine.protocol import Load
from afterword.keys.key import static_keys
from afterword.keys.key_registry import KeyRegistry
from afterword.transport.connection import Connection, ConnectionContext
from afterword.transport.connection_limiter import ConnectionLimiter
from afterword.transport.transport_limits import TransportLimits

KEY = "sk-test-0123456789abcdef"


@dataclass
class Engine(scripted_engine.ScriptedEngine):
    """The scripted engine as a supervisor."""

    state: str = "ready"
    load: Load = field(default_factory=Load)
    restarts: int = 0

    def check_capacity(self) -> None:
        """There is always room, but for those whom `start` refuses."""


def application(
    engine: Engine | ModelManager | None = None, keys: bool = True, **settings: Any
) -> Callable[..., Awaitable[None]]:
    """The application over models, or over an engine that says "Hello"."""
    keyring = static_keys((KEY,), None) if keys else ()
    settled = config.Config(keys=keyring, **settings)
    engine = engine or Engine(scripted_engine.says("Hello"), room=10**9)
    models = engine if isinstance(engine, ModelManager) else roster(engine)
    return make_app(Service(settled, models, KeyRegistry(keyring)))


def roster(*engines: Engine) -> ModelManager:
    """Engines as models that are loaded; the first is called "scripted", the next "scripted-2"."""
    names = ["scripted", *(f"scripted-{place}" for place in range(2, len(engines) + 1))]
    models = ModelManager([ModelDefinition(name, 0, Mock()) for name in names])
    for managed_model, engine in zip(models, engines, strict=True):
        managed_model.engine = engine  # type: ignore[assignment]
    return models


class InMemoryTransport(asyncio.Transport):
    """What the protocol holds. `unsent`: bytes that the client has not taken; `takes`: whether it takes any."""

    def __init__(self, peer: str) -> None:
        super().__init__()
        self.told = bytearray()
        self.unsent = 0
        self.takes = True
        self.closing = self.aborted = self.ended = self.paused = False
        self.protocol: Any = None
        self._peer = (peer, 50_000)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"peername": self._peer, "sockname": ("127.0.0.1", 8000)}.get(name, default)

    def write(self, data: Any) -> None:
        assert not self.aborted
        self.told += data
        if not self.takes:
            self.unsent += len(data)
            if self.unsent > 2**16:
                self.protocol.pause_writing()

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.ended = True

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.closing = self.aborted = True

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False


@dataclass
class InMemoryServer:
    """A server without a socket. `now` is its clock."""

    app: Callable[..., Awaitable[None]] = field(default_factory=application)
    limits: TransportLimits = field(default_factory=TransportLimits)
    most: int = 1000
    most_of_one: int = 1000
    now: float = 1000.0

    def __post_init__(self) -> None:
        options = {"http": "httptools", "ws": "none", "lifespan": "off", "log_config": None, "access_log": False}
        self.config = Config(self.app, proxy_headers=False, **options)  # type: ignore[arg-type]
        self.config.load()
        self.state = ServerState()
        self.context = ConnectionContext(self.limits, ConnectionLimiter(self.most, self.most_of_one), lambda: self.now)

    def visitor(self, peer: str = "127.0.0.1") -> InMemoryClient:
        """Somebody connects."""
        return InMemoryClient(self, peer)


class InMemoryClient:
    """A client on a connection of its own."""

    def __init__(self, in_memory_server: InMemoryServer, peer: str) -> None:
        self.in_memory_server = in_memory_server
        self.protocol = Connection(in_memory_server.config, in_memory_server.state, in_memory_server.context)
        self.wire = InMemoryTransport(peer)
        self.wire.protocol = self.protocol
        self.protocol.connection_made(self.wire)
        self._gone = False

    async def say(self, data: bytes, size: int | None = None) -> bytes:
        """Send bytes, in pieces of a size, and see what has been told when nothing happens any more."""
        for start in range(0, len(data), size or len(data) or 1):
            if not self.wire.closing:
                self.protocol.data_received(data[start : start + size] if size else data)
            await self.settle()
        return bytes(self.wire.told)

    async def settle(self) -> None:
        """Let everything happen that can."""
        for _ in range(200):
            await asyncio.sleep(0)
            if self.wire.closing and not self._gone and (self.wire.aborted or not self.wire.unsent):
                self.leave()
            if not self.in_memory_server.state.tasks:
                break

    async def wait(self, seconds: float) -> None:
        """Time passes, second by second."""
        end = self.in_memory_server.now + seconds
        while self.in_memory_server.now < end and not self._gone:
            self.in_memory_server.now = min(end, self.in_memory_server.now + 1)
            self.protocol.check(self.in_memory_server.now)
            await self.settle()

    def leave(self) -> None:
        """The connection ends."""
        if not self._gone:
            self._gone = True
            self.wire.closing = True
            self.protocol.connection_lost(None)

    @property
    def gone(self) -> bool:
        return self._gone

    @property
    def statuses(self) -> list[int]:
        """Those of all answers, in order."""
        return [int(code) for code in re.findall(rb"HTTP/1\.1 (\d{3}) ", bytes(self.wire.told))]


def post(body: bytes, *headers: str, path: str = "/v1/completions", key: str | None = KEY) -> bytes:
    """A request as bytes."""
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1:8000", "Content-Type: application/json", *headers]
    lines += [f"Authorization: Bearer {key}"] if key else []
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def get(path: str, *headers: str, method: str = "GET", key: str | None = KEY, host: str = "127.0.0.1:8000") -> bytes:
    """A request without a body."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", *headers, *([f"Authorization: Bearer {key}"] if key else [])]
    return "\r\n".join([*lines, "", ""]).encode()
