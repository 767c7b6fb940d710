"""The lines to a process: what it said last is heard, however it ended."""

from __future__ import annotations

import asyncio
import errno
import socket
import subprocess
import sys
from typing import Any

import psutil
import pytest

from afterword.engine import messages
from afterword.engine.parent.worker_process import spawn_worker

LAST_WORDS = messages.Heartbeat(7, 0, 0, 0.0)
SPEAKS = f"""
import socket, sys
socket.socket(fileno=int(sys.argv[2])).sendall({messages.pack(LAST_WORDS)!r})
"""


def test_last_words_are_heard_though_nothing_can_be_sent_any_more():
    async def test() -> None:
        link = await spawn_worker([sys.executable, "-c", SPEAKS])
        await asyncio.to_thread(link._process.wait)  # type: ignore[attr-defined]
        for run in range(3):  # the first is what shows that nobody listens
            link.send(messages.CloseJob(run))
            await asyncio.sleep(0)
        assert await link.receive() == LAST_WORDS
        assert await link.receive() is None
        await link.wait_ended()

    asyncio.run(test())


@pytest.mark.parametrize(
    ("place", "name", "call"),
    [
        (socket, "socketpair", 1),
        (socket, "socketpair", 2),
        (subprocess, "Popen", 1),
        (asyncio, "open_connection", 1),
        (asyncio, "open_connection", 2),
    ],
)
def test_a_process_that_cannot_be_started_leaves_nothing_behind(monkeypatch, place, name, call):
    """As where no file descriptor is left: the next attempt finds as many as this one did."""
    works, calls = getattr(place, name), []

    def failing(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) == call:
            raise OSError(errno.EMFILE, "Too many open files")
        return works(*arguments, **options)

    async def test() -> None:
        me = psutil.Process()
        before, others = me.num_fds(), set(me.children())  # other tests' servers may be there
        with monkeypatch.context() as patch:
            patch.setattr(place, name, failing)
            with pytest.raises(OSError, match="Too many open files"):
                await spawn_worker([sys.executable, "-c", "import time; time.sleep(60)"])
        async with asyncio.timeout(30):
            while me.num_fds() > before or [
                each for each in me.children() if each not in others and each.status() != "zombie"
            ]:
                await asyncio.sleep(0.01)

    asyncio.run(test())
