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
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import msgspec

from afterword.engine import messages


@dataclass(frozen=True, slots=True)
class WorkerProgram:
    """The program that runs as worker.

    `command`: its last two arguments, which `spawn_worker` adds, are the file descriptors of the sockets that it reads
    and writes. `starts_others`: the worker starts processes of its own. It is then the leader of a process group, and
    the whole group is killed with it.
    """

    command: tuple[str, ...]
    starts_others: bool = False


LLAMA = WorkerProgram((sys.executable, "-m", "afterword.engine.llama"))
GPU_MEMORY_COMMAND = (*LLAMA.command[:-1], f"{LLAMA.command[-1]}.gpus")

_SECRET = re.compile(r"(KEY|KEYS|TOKEN|SECRET|PASSWORD|PASSPHRASE|CREDENTIALS?|OTLP_\w*HEADERS)$")
_LARGE = 2**16  # bytes of a frame that takes milliseconds to decode
# Seconds to wait for a killed process: it may have to release much memory, or hang in a driver.
_EXIT_SECONDS = 30.0
_GROUP_SECONDS, _GROUP_CHECK_SECONDS = 5.0, 0.02  # for the processes that a killed worker has started


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


SpawnWorker = Callable[[WorkerProgram], Awaitable[WorkerLink]]
"""Starts a program as a worker process."""


async def spawn_worker(program: WorkerProgram) -> WorkerLink:
    """Start a program as a worker process.

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
                [*program.command, str(worker_reads.fileno()), str(worker_writes.fileno())],
                pass_fds=[worker_reads.fileno(), worker_writes.fileno()],
                stdin=subprocess.DEVNULL,
                env=without_secrets(os.environ),
                process_group=0 if program.starts_others else None,
            )
        undo.callback(_end, process)
        worker_reads.close()
        worker_writes.close()
        _, writer = await asyncio.open_connection(sock=to_worker, limit=2**10)
        undo.callback(writer.transport.abort)
        reader, unused_writer = await asyncio.open_connection(sock=from_worker, limit=2**20)
        undo.pop_all()
    return _WorkerProcess(process, reader, (writer, unused_writer), program.starts_others)


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
        leads_group: bool,
    ) -> None:
        self._process = process
        self._leads_group = leads_group
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
        if self._leads_group and self._process.returncode is None:  # its id is free for others once it was waited for
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        for stream in self._streams:
            stream.transport.abort()  # ends `receive` even if the process survives SIGKILL for a while

    async def wait_ended(self) -> int | None:
        self.kill()
        try:
            code = await asyncio.to_thread(self._process.wait, _EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            return None
        if self._leads_group:
            await _wait_for_group(self._process.pid)
        return code


async def _wait_for_group(group: int) -> None:
    """Wait until no process of a killed group is left: the next worker needs the memory that they release.

    Zombies count as processes of the group, and some containers never remove them. So the time is limited.
    """
    for _ in range(int(_GROUP_SECONDS / _GROUP_CHECK_SECONDS)):
        try:
            os.killpg(group, 0)
        except OSError:  # no such group; or its id belongs to another user's processes by now
            return
        await asyncio.sleep(_GROUP_CHECK_SECONDS)
