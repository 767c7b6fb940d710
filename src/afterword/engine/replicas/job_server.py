"""Serves an engine replica's models over TCP to servers that route jobs to it.

A connection belongs to one model. When it ends, for whatever reason, all its jobs end, so an engine computes nothing
for a server that is gone. The secret keeps out programs that were not told the replica's address.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Mapping
from typing import Protocol

from afterword.engine.messages import (
    CancelTokenize,
    CloseJob,
    DropSample,
    Heartbeat,
    ModelReady,
    PassDone,
    PauseJob,
    ResumeJob,
    StartJob,
    TextTokens,
)
from afterword.engine.protocol import Engine, JobHandle, Load, Step
from afterword.engine.replicas import wire
from afterword.engine.replicas.connection import watch_peer
from afterword.errors import AfterwordError, EngineFailure

_log = logging.getLogger(__name__)

HELLO_SECONDS, HELLO_BYTES = 5.0, 4096
MOST_STRANGERS = 64
"""Connections without a valid `Hello`. Further ones are closed: anyone can open them, and each takes a descriptor."""
BUFFER_BYTES = 2**20
"""Bytes that wait for the network above which the jobs of a connection are paused."""
HELD_BYTES = 4 * 2**20
"""Bytes of steps in one frame, approximately. One larger step has a frame of its own."""
BEAT_SECONDS = 1.0
"""Seconds between two heartbeats to each server."""


class ServedEngine(Engine, Protocol):
    """An engine with a load."""

    @property
    def load(self) -> Load:
        """The numbers of running and of waiting samples."""
        ...


class JobServer:
    """Listens for servers. `engines`: the loaded engines by the names of their models."""

    def __init__(self, engines: Mapping[str, ServedEngine]) -> None:
        self.secret = secrets.token_urlsafe(24)
        self._engines = engines
        self._connections: set[_Connection] = set()
        self._serving: set[asyncio.Task[None]] = set()
        self._strangers = 0
        self._server: asyncio.Server | None = None
        self._leaving = False
        self._busy = time.monotonic()

    async def open(self, host: str) -> int:
        """Listen on a free port of the host's address, which is returned."""
        self._server = await asyncio.start_server(self._accept, host, 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def leave(self, quiet: float, longest: float) -> None:
        """Ask servers to send jobs elsewhere, and wait until there was none for `quiet` seconds."""
        self._leaving, began = True, time.monotonic()
        self._busy = began
        for connection in self._connections:
            connection.send(wire.Leaving())
        while time.monotonic() - began < longest and time.monotonic() - self._busy < quiet:
            await asyncio.sleep(0.1)
            if any(connection.busy for connection in self._connections):
                self._busy = time.monotonic()

    async def close(self) -> None:
        """End all connections and their jobs."""
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.end()
        if self._serving:
            await asyncio.wait(self._serving)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._strangers >= MOST_STRANGERS:
            writer.transport.abort()
            return
        self._strangers += 1
        task = asyncio.create_task(self._serve(reader, writer))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            try:
                engine = await self._engine_for(reader)
            finally:
                self._strangers -= 1
            if engine is not None:
                await self._serve_engine(engine, reader, writer)
        finally:
            writer.transport.abort()

    async def _engine_for(self, reader: asyncio.StreamReader) -> ServedEngine | None:
        """The engine that a peer asks for. None if it does not ask in time, or does not know the secret."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HELLO_SECONDS):
                hello = await wire.read_from_server(reader, HELLO_BYTES)
            if isinstance(hello, wire.Hello) and secrets.compare_digest(hello.secret.encode(), self.secret.encode()):
                return self._engines.get(hello.model)
        return None

    async def _serve_engine(
        self, engine: ServedEngine, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        watch_peer(writer)
        connection = _Connection(engine, writer)
        self._connections.add(connection)
        try:
            if self._leaving:
                connection.send(wire.Leaving())
            while (message := await wire.read_from_server(reader)) is not None:
                connection.apply(message)
        finally:
            self._connections.discard(connection)
            connection.end()


class _Connection:
    """The jobs and texts of one server."""

    def __init__(self, engine: ServedEngine, writer: asyncio.StreamWriter) -> None:
        self._engine, self._writer = engine, writer
        # Equal limits, so that `drain` waits exactly while more than this waits to be sent.
        writer.transport.set_write_buffer_limits(high=BUFFER_BYTES, low=BUFFER_BYTES)
        self._fingerprint = engine.model_info.fingerprint
        self._jobs: dict[int, JobHandle] = {}
        self._texts: dict[int, asyncio.Task[None]] = {}
        self._paused: set[int] = set()  # jobs that the server has paused
        self._delayed: set[int] = set()  # jobs that wait for the network
        self._steps: dict[int, Step] = {}  # of this turn of the event loop
        self._held_bytes = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self.send(ModelReady(engine.model_info))
        self._run(self._beat())

    @property
    def busy(self) -> bool:
        """Whether there is a job or a text."""
        return bool(self._jobs or self._texts)

    def send(self, message: wire.FromReplica) -> None:
        """Send a message. Does nothing if the server is gone."""
        if not self._writer.is_closing():
            self._writer.write(wire.frame(message))

    def end(self) -> None:
        """End the connection, its jobs and its texts."""
        for handle in self._jobs.values():
            handle.close()
        for task in self._tasks:
            task.cancel()
        self._jobs.clear()
        self._writer.transport.abort()

    def apply(self, message: wire.ToReplica) -> None:
        """Apply a message of the server. One about a job or text that has ended has no effect."""
        if isinstance(message, StartJob):
            self._start(message)
        elif isinstance(message, wire.ReadText):
            self._read(message)
        elif isinstance(message, CancelTokenize):
            if message.call in self._texts:
                self._texts[message.call].cancel()
        elif not isinstance(message, wire.Hello) and (handle := self._jobs.get(message.job_id)):
            if isinstance(message, DropSample):
                handle.drop(message.sample)
            elif isinstance(message, CloseJob):
                handle.close()
            elif isinstance(message, PauseJob):
                self._paused.add(message.job_id)
                handle.pause()
            elif isinstance(message, ResumeJob):
                self._paused.discard(message.job_id)
                self._resume(message.job_id, handle)

    def _has_model(self) -> bool:
        """Whether the engine has the connection's model. If not, end: the server then learns of the new one."""
        if self._engine.model_info.fingerprint == self._fingerprint:
            return True
        self._writer.transport.abort()
        return False

    def _start(self, message: StartJob) -> None:
        if not self._has_model():
            return
        try:
            handle = self._engine.start(message.job)
        except Exception as error:
            self.send(wire.JobFailed(message.job_id, _failure_of(error)))
            return
        self._jobs[message.job_id] = handle
        self._run(self._pass_on(message.job_id, handle))

    async def _pass_on(self, job_id: int, handle: JobHandle) -> None:
        try:
            async for step in handle:
                self._put(job_id, step)
                await self._wait_for_network(job_id, handle)
        except Exception as error:
            handle.close()
            self._flush()
            self.send(wire.JobFailed(job_id, _failure_of(error)))
        finally:
            self._jobs.pop(job_id, None)
            self._paused.discard(job_id)

    async def _wait_for_network(self, job_id: int, handle: JobHandle) -> None:
        """Wait while much waits to be sent. The job is paused, so that its steps do not fill the memory."""
        if self._writer.transport.get_write_buffer_size() <= BUFFER_BYTES:
            return
        self._delayed.add(job_id)
        handle.pause()
        try:
            await self._writer.drain()
        except OSError:  # the server is gone
            handle.close()
        finally:
            self._delayed.discard(job_id)
        self._resume(job_id, handle)

    def _resume(self, job_id: int, handle: JobHandle) -> None:
        """Resume a job for which there is no reason to pause."""
        if job_id not in self._paused and job_id not in self._delayed:
            handle.resume()

    def _put(self, job_id: int, step: Step) -> None:
        """Send small steps of one turn of the event loop, such as those of one forward pass, in one frame."""
        size = step.size
        if job_id in self._steps or self._held_bytes + size > HELD_BYTES:
            self._flush()
        if not self._steps:
            asyncio.get_running_loop().call_soon(self._flush)
        self._steps[job_id] = step
        self._held_bytes += size

    def _flush(self) -> None:
        steps, self._steps, self._held_bytes = self._steps, {}, 0
        if steps and self._has_model():
            self.send(PassDone(steps, self._engine.load))

    def _read(self, message: wire.ReadText) -> None:
        task = self._texts[message.call] = self._run(self._tokenize(message))
        # a callback and no `finally`: the task may be cancelled before it begins
        task.add_done_callback(lambda _: self._texts.pop(message.call, None))

    async def _tokenize(self, message: wire.ReadText) -> None:
        try:
            tokens = await self._engine.tokenize(message.text, message.special, message.client)
            if self._has_model():
                self.send(TextTokens.of(message.call, tokens))
        except Exception as error:
            self.send(wire.TextFailed(message.call, _failure_of(error)))

    async def _beat(self) -> None:
        """Report life and load, while the engine has the connection's model."""
        while self._has_model():
            self.send(Heartbeat(0, 0, 0, 0.0))
            self.send(PassDone({}, self._engine.load))
            await asyncio.sleep(BEAT_SECONDS)

    def _run(self, work: object) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(work)  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _failure_of(error: Exception) -> wire.Failure:
    """The error of a job or text as it is sent. One that no engine should raise is logged."""
    if isinstance(error, AfterwordError):
        return wire.failure_of(error)
    _log.error("An engine has failed for one job or text.", exc_info=error)
    return wire.failure_of(EngineFailure())
