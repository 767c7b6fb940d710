"""Tests of the connection to a worker process: its last messages are received after its end."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import subprocess
import sys
from typing import Any

import psutil
import pytest

from afterword.engine import messages
from afterword.engine.parent.worker_process import WorkerProgram, spawn_worker

LAST_MESSAGE = messages.Heartbeat(7, 0, 0, 0.0)
PROGRAM = f"""
import socket, sys
socket.socket(fileno=int(sys.argv[2])).sendall({messages.pack(LAST_MESSAGE)!r})
"""


def test_the_last_message_is_received_after_a_failed_send():
    async def test() -> None:
        link = await spawn_worker(WorkerProgram((sys.executable, "-c", PROGRAM)))
        await asyncio.to_thread(link._process.wait)  # type: ignore[attr-defined]
        for job_id in range(3):  # the first send fails, because the process has ended
            link.send(messages.CloseJob(job_id))
            await asyncio.sleep(0)
        assert await link.receive() == LAST_MESSAGE
        assert await link.receive() is None
        await link.wait_ended()

    asyncio.run(test())


@pytest.mark.parametrize(
    ("module", "name", "call"),
    [
        (socket, "socketpair", 1),
        (socket, "socketpair", 2),
        (subprocess, "Popen", 1),
        (asyncio, "open_connection", 1),
        (asyncio, "open_connection", 2),
    ],
)
def test_a_failed_start_leaves_no_process_and_no_descriptor(monkeypatch, module, name, call):
    """For example if no file descriptor is left. The next attempt must not find fewer."""
    original, calls = getattr(module, name), []

    def failing(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) == call:
            raise OSError(errno.EMFILE, "Too many open files")
        return original(*arguments, **options)

    async def test() -> None:
        me = psutil.Process()
        before, others = me.num_fds(), set(me.children())  # servers of other tests may be running
        with monkeypatch.context() as patch:
            patch.setattr(module, name, failing)
            with pytest.raises(OSError, match="Too many open files"):
                await spawn_worker(WorkerProgram((sys.executable, "-c", "import time; time.sleep(60)")))
        async with asyncio.timeout(30):
            while me.num_fds() > before or [
                each for each in me.children() if each not in others and each.status() != "zombie"
            ]:
                await asyncio.sleep(0.01)

    asyncio.run(test())


STARTS_ANOTHER = """
import os, socket, subprocess, sys
other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
socket.socket(fileno=int(sys.argv[2])).sendall(bytes([*other.pid.to_bytes(4, "big")]))
other.wait()
"""


@pytest.mark.parametrize("leader_is_killed_first", [False, True])
def test_the_processes_that_a_worker_has_started_end_with_it(leader_is_killed_first):
    async def test() -> None:
        link = await spawn_worker(WorkerProgram((sys.executable, "-c", STARTS_ANOTHER), starts_others=True))
        reader = link._reader  # type: ignore[attr-defined]
        other = psutil.Process(int.from_bytes(await reader.readexactly(4), "big"))
        assert link.pid is not None
        assert os.getpgid(link.pid) == os.getpgid(other.pid) == link.pid
        if leader_is_killed_first:
            os.kill(link.pid, signal.SIGKILL)
            await reader.read()
        assert await link.wait_ended() == -signal.SIGKILL
        assert not other.is_running() or other.status() == psutil.STATUS_ZOMBIE

    asyncio.run(test())
