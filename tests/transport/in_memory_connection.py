"""In-memory clients and connections: the real protocol and application over a transport that records bytes.

The clock stands still until a test advances it with `InMemoryClient.wait`.
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
    """The scripted engine with the interface of a supervisor."""

    state: str = "ready"
    load: Load = field(default_factory=Load)
    restarts: int = 0

    def check_capacity(self) -> None:
        """Accept every request. `start` may still raise `Overloaded`."""


def application(
    engine: Engine | ModelManager | None = None, keys: bool = True, **settings: Any
) -> Callable[..., Awaitable[None]]:
    """The application for a model manager or an engine; by default for an engine that generates "Hello"."""
    api_keys = static_keys((KEY,), None) if keys else ()
    settled = config.Config(keys=api_keys, **settings)
    engine = engine or Engine(scripted_engine.text_script("Hello"), max_jobs=10**9)
    models = engine if isinstance(engine, ModelManager) else model_manager_of(engine)
    return make_app(Service(settled, models, KeyRegistry(api_keys)))


def model_manager_of(*engines: Engine) -> ModelManager:
    """A model manager with `engines` as loaded models, named "scripted", "scripted-2" and so on."""
    names = ["scripted", *(f"scripted-{number}" for number in range(2, len(engines) + 1))]
    models = ModelManager([ModelDefinition(name, 0, Mock()) for name in names])
    for managed_model, engine in zip(models, engines, strict=True):
        managed_model.engine = engine  # type: ignore[assignment]
    return models


class InMemoryTransport(asyncio.Transport):
    """The transport of one connection.

    `written`: bytes that the server wrote. `unsent`: how many of them the client has not read. `reads`: whether the
    client reads at all.
    """

    def __init__(self, peer: str) -> None:
        super().__init__()
        self.written = bytearray()
        self.unsent = 0
        self.reads = True
        self.closing = self.aborted = self.ended = self.paused = False
        self.protocol: Any = None
        self._peer = (peer, 50_000)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"peername": self._peer, "sockname": ("127.0.0.1", 8000)}.get(name, default)

    def write(self, data: Any) -> None:
        assert not self.aborted
        self.written += data
        if not self.reads:
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
    """The shared state of connections without a socket. `now` is the clock, in seconds."""

    app: Callable[..., Awaitable[None]] = field(default_factory=application)
    limits: TransportLimits = field(default_factory=TransportLimits)
    max_connections: int = 1000
    max_per_client: int = 1000
    now: float = 1000.0

    def __post_init__(self) -> None:
        options = {"http": "httptools", "ws": "none", "lifespan": "off", "log_config": None, "access_log": False}
        self.config = Config(self.app, proxy_headers=False, **options)  # type: ignore[arg-type]
        self.config.load()
        self.state = ServerState()
        limiter = ConnectionLimiter(self.max_connections, self.max_per_client)
        self.context = ConnectionContext(self.limits, limiter, lambda: self.now)

    def connect(self, peer: str = "127.0.0.1") -> InMemoryClient:
        return InMemoryClient(self, peer)


class InMemoryClient:
    """A client with its connection."""

    def __init__(self, server: InMemoryServer, peer: str) -> None:
        self.server = server
        self.protocol = Connection(server.config, server.state, server.context)
        self.transport = InMemoryTransport(peer)
        self.transport.protocol = self.protocol
        self.protocol.connection_made(self.transport)
        self._closed = False

    async def send(self, data: bytes, size: int | None = None) -> bytes:
        """Send bytes, in pieces of `size`. Returns all bytes that the server has written when it is idle again."""
        for start in range(0, len(data), size or len(data) or 1):
            if not self.transport.closing:
                self.protocol.data_received(data[start : start + size] if size else data)
            await self.settle()
        return bytes(self.transport.written)

    async def settle(self) -> None:
        """Run the event loop until no request is being processed, for at most 200 turns."""
        for _ in range(200):
            await asyncio.sleep(0)
            if self.transport.closing and not self._closed and (self.transport.aborted or not self.transport.unsent):
                self.disconnect()
            if not self.server.state.tasks:
                break

    async def wait(self, seconds: float) -> None:
        """Advance the clock second by second and check the deadlines."""
        end = self.server.now + seconds
        while self.server.now < end and not self._closed:
            self.server.now = min(end, self.server.now + 1)
            self.protocol.check(self.server.now)
            await self.settle()

    def disconnect(self, problem: Exception | None = None) -> None:
        if not self._closed:
            self._closed = True
            self.transport.closing = True
            self.protocol.connection_lost(problem)

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def statuses(self) -> list[int]:
        """The status codes of all responses, in order."""
        return [int(code) for code in re.findall(rb"HTTP/1\.1 (\d{3}) ", bytes(self.transport.written))]


def post(body: bytes, *headers: str, path: str = "/v1/completions", key: str | None = KEY) -> bytes:
    """The bytes of a POST request."""
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1:8000", "Content-Type: application/json", *headers]
    lines += [f"Authorization: Bearer {key}"] if key else []
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def get(path: str, *headers: str, method: str = "GET", key: str | None = KEY, host: str = "127.0.0.1:8000") -> bytes:
    """The bytes of a request without a body."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", *headers, *([f"Authorization: Bearer {key}"] if key else [])]
    return "\r\n".join([*lines, "", ""]).encode()
