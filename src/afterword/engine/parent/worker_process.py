"""One engine's process and the line to it, and what a process says of the GPUs. Knows frames and processes, no jobs.

The simulator of the tests stands in here: whoever keeps the jobs sees a `WorkerLink` and never a process.
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
# seconds that a killed process may take: it may have much memory to give back, or hang in a driver
_EXIT_SECONDS = 30.0


class WorkerLink(Protocol):
    """A line to an engine's process, which is alive until `receive` has returned None. `pid`: its id, if it has one."""

    @property
    def pid(self) -> int | None:
        """The process's id."""
        ...

    def send(self, message: messages.WorkerMessage) -> None:
        """Send a message; into the void if the process is gone."""
        ...

    async def receive(self) -> messages.ServerMessage | None:
        """The next message, or None when the process is gone or talks nonsense, which is no better."""
        ...

    def kill(self) -> None:
        """End the process at once, whatever it is doing; `receive` then returns None. Harmless a second time."""
        ...

    async def wait_ended(self) -> int | None:
        """Kill it and wait until it is gone: its exit status, or None if it cannot be ended."""
        ...


SpawnWorker = Callable[[Sequence[str]], Awaitable[WorkerLink]]
"""Starts a command as an engine's process."""


async def spawn_worker(command: Sequence[str]) -> WorkerLink:
    """Start a command; its last arguments are the file descriptors that it hears and speaks through.

    One line for each way: where a process has died, a failed send would else close the line with its last words unread,
    and who killed it is known from these. Raises `OSError`, as where no file descriptor is left, and leaves nothing.
    """
    with ExitStack() as undo:
        to, hears = map(undo.enter_context, socket.socketpair())
        speaks, back = map(undo.enter_context, socket.socketpair())
        with _signals_blocked(signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # until it ignores them, as its parent's
            process = subprocess.Popen(
                [*command, str(hears.fileno()), str(speaks.fileno())],
                pass_fds=[hears.fileno(), speaks.fileno()],
                stdin=subprocess.DEVNULL,
                env=without_secrets(os.environ),
            )
        undo.callback(_end, process)
        hears.close()
        speaks.close()
        _, writer = await asyncio.open_connection(sock=to, limit=2**10)
        undo.callback(writer.transport.abort)
        reader, ears = await asyncio.open_connection(sock=back, limit=2**20)
        undo.pop_all()
    return _WorkerProcess(process, reader, (writer, ears))


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that has done nothing yet, which is at once."""
    process.kill()
    process.wait()


@contextmanager
def _signals_blocked(*signals: signal.Signals) -> Iterator[None]:
    """What is started here has these signals wait."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@cache
def gpu_memory() -> int | None:
    """Bytes that were left on the GPUs when this was first asked; None if there are none.

    Asked by a process of its own: whoever asks holds some of that memory for as long as it lives.
    """
    done = subprocess.run(
        GPU_MEMORY_COMMAND, stdin=subprocess.DEVNULL, capture_output=True, env=without_secrets(os.environ), check=False
    )
    return int(done.stdout) or None if done.returncode == 0 and done.stdout.strip().isdigit() else None


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without what must not come into the hands of native code that reads strangers' texts."""
    return {name: value for name, value in environment.items() if not _SECRET.search(name.upper())}


class _WorkerProcess:
    """Owner of a process and of our ends of the lines, of which the first is written to; see `WorkerLink`."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        reader: asyncio.StreamReader,
        lines: tuple[asyncio.StreamWriter, asyncio.StreamWriter],
    ) -> None:
        self._process = process
        self._reader = reader
        self._lines = lines

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def send(self, message: messages.WorkerMessage) -> None:
        if not self._lines[0].is_closing():
            self._lines[0].write(messages.pack(message))

    async def receive(self) -> messages.ServerMessage | None:
        try:
            header = await self._reader.readexactly(messages.HEADER.size)
            size = messages.HEADER.unpack(header)[0]
            if size > messages.MAX_FRAME_BYTES:
                return None
            if size > _LARGE:
                await asyncio.sleep(0)  # several may be there: other tasks run before each
            return messages.unpack_for_server(await self._reader.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError, msgspec.MsgspecError, UnicodeDecodeError):
            return None

    def kill(self) -> None:
        self._process.kill()
        for line in self._lines:
            line.transport.abort()  # so that nobody waits for a process that even this does not end

    async def wait_ended(self) -> int | None:
        self.kill()
        try:
            return await asyncio.to_thread(self._process.wait, _EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            return None
