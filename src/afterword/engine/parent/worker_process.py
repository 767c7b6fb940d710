"""Starts a worker process, exchanges messages with it, and asks a process for the free memory of the GPUs.

This module knows frames and processes and must not know jobs. The supervisor sees only the protocol `WorkerLink`, so
the tests can replace the process by a simulation.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Protocol

import msgspec

from afterword.engine import messages

LLAMA_COMMAND = (sys.executable, "-m", "afterword.engine.llama")
GPU_MEMORY_COMMAND = (*LLAMA_COMMAND[:-1], f"{LLAMA_COMMAND[-1]}.gpus")

_SECRET = re.compile(r"(KEY|KEYS|TOKEN|SECRET|PASSWORD|PASSPHRASE|CREDENTIALS?|OTLP_\w*HEADERS)$")
_LARGE = 2**16  # bytes of a frame that takes milliseconds to decode
# Seconds to wait for a killed process: it may have to release much memory, or hang in a driver.
_EXIT_SECONDS = 30.0


class WorkerLink(Protocol):
    """The connection to a worker process. The worker counts as alive until `receive` has returned None."""

    @property
    def pid(self) -> int | None:
        """The worker's process id, None if it has none (in a simulation)."""
        ...

    def send(self, message: messages.WorkerMessage) -> None:
        """Send a message. Does nothing if the process has ended."""
        ...

    async def receive(self) -> messages.ServerMessage | None:
        """The next message. None if the process has ended, or has sent an invalid frame."""
        ...

    def kill(self) -> None:
        """Kill the process; `receive` then returns None. May be called again."""
        ...

    async def wait_ended(self) -> int | None:
        """Kill the process and wait for its end. Returns the exit status, None if it is still there after 30 s."""
        ...


SpawnWorker = Callable[[Sequence[str]], Awaitable[WorkerLink]]
"""Starts a command as a worker process."""


async def spawn_worker(command: Sequence[str]) -> WorkerLink:
    """Start a command. Its last two arguments are the file descriptors of the sockets that it reads and writes.

    Each direction has its own socket pair. With a single one, a failed send to a dead worker would close the connection
    before its last messages are read, and the supervisor needs these to find the job that crashed the worker.

    Raises `OSError`, for example if no file descriptor is left; then no process and no socket remains.
    """
    with ExitStack() as undo:
        to_worker, worker_reads = map(undo.enter_context, socket.socketpair())
        worker_writes, from_worker = map(undo.enter_context, socket.socketpair())
        # The worker leaves these signals to its parent, but can ignore them only after Python has started.
        with _signals_blocked(signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            process = subprocess.Popen(
                [*command, str(worker_reads.fileno()), str(worker_writes.fileno())],
                pass_fds=[worker_reads.fileno(), worker_writes.fileno()],
                stdin=subprocess.DEVNULL,
                env=without_secrets(os.environ),
            )
        undo.callback(_end, process)
        worker_reads.close()
        worker_writes.close()
        _, writer = await asyncio.open_connection(sock=to_worker, limit=2**10)
        undo.callback(writer.transport.abort)
        reader, unused_writer = await asyncio.open_connection(sock=from_worker, limit=2**20)
        undo.pop_all()
    return _WorkerProcess(process, reader, (writer, unused_writer))


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that has just been started; waiting blocks the event loop only for an instant."""
    process.kill()
    process.wait()


@contextmanager
def _signals_blocked(*signals: signal.Signals) -> Iterator[None]:
    """Block signals in this thread. A process that is started meanwhile inherits the mask."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@cache
def gpu_memory() -> int | None:
    """Bytes that were free on the GPUs at the first call; None if there is no GPU.

    A separate process asks the driver, because the asking process occupies GPU memory until it ends.
    """
    done = subprocess.run(
        GPU_MEMORY_COMMAND, stdin=subprocess.DEVNULL, capture_output=True, env=without_secrets(os.environ), check=False
    )
    return int(done.stdout) or None if done.returncode == 0 and done.stdout.strip().isdigit() else None


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without keys, tokens and passwords: the worker's native code processes untrusted texts."""
    return {name: value for name, value in environment.items() if not _SECRET.search(name.upper())}


class _WorkerProcess:
    """Owns a process and the server's ends of its two sockets; see `WorkerLink`.

    `streams[0]` sends to the worker; `streams[1]` is kept only to close the socket that `reader` reads.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        reader: asyncio.StreamReader,
        streams: tuple[asyncio.StreamWriter, asyncio.StreamWriter],
    ) -> None:
        self._process = process
        self._reader = reader
        self._streams = streams

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def send(self, message: messages.WorkerMessage) -> None:
        if not self._streams[0].is_closing():
            self._streams[0].write(messages.pack(message))

    async def receive(self) -> messages.ServerMessage | None:
        try:
            header = await self._reader.readexactly(messages.HEADER.size)
            size = messages.HEADER.unpack(header)[0]
            if size > messages.MAX_FRAME_BYTES:
                return None
            if size > _LARGE:
                await asyncio.sleep(0)  # several large frames may be buffered: let other tasks run before each
            return messages.unpack_for_server(await self._reader.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError, msgspec.MsgspecError, UnicodeDecodeError):
            return None

    def kill(self) -> None:
        self._process.kill()
        for stream in self._streams:
            stream.transport.abort()  # ends `receive` even if the process survives SIGKILL for a while

    async def wait_ended(self) -> int | None:
        self.kill()
        try:
            return await asyncio.to_thread(self._process.wait, _EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            return None
