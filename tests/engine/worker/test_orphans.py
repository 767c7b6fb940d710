"""Tests that a worker ends with its parent while it starts, loads or waits for jobs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from afterword.engine import messages

FAKE = str(Path(__file__).parents[1] / "fake_worker.py")
SECONDS = 30  # timeout for a worker that never ends; generous for slow machines


def load_frame(path: str) -> bytes:
    """The bytes of the first frame to a worker."""
    return messages.pack(
        messages.LoadModel(
            path=path, context=64, sequences=2, threads=1, chunk=8, kv_type="exact", gpu_layers=0, verbose=False
        )
    )


class Sockets:
    """The two socket pairs of a worker, named as in `worker_process.spawn_worker`."""

    def __init__(self) -> None:
        self.to_worker, self.worker_reads = socket.socketpair()
        self.worker_writes, self.from_worker = socket.socketpair()
        self.worker_ends = (self.worker_reads, self.worker_writes)
        self.all = (self.to_worker, *self.worker_ends, self.from_worker)

    def command(self, *before: str) -> list[str]:
        return [*before, sys.executable, FAKE, *(str(end.fileno()) for end in self.worker_ends)]

    @contextmanager
    def start(self, *before: str) -> Iterator[subprocess.Popen[bytes]]:
        """Start a worker through the command `before`, and close this process's copies of the worker's sockets.

        The started process is killed at the end.
        """
        fds = [end.fileno() for end in self.worker_ends]
        with subprocess.Popen(self.command(*before), pass_fds=fds, stdout=subprocess.PIPE) as process:
            for end in self.worker_ends:
                end.close()
            try:
                yield process
            finally:
                process.kill()


@pytest.fixture
def sockets():
    with ExitStack() as stack:
        made = Sockets()
        for end in made.all:
            stack.callback(end.close)
        yield made


def wait_for_heartbeat(sockets: Sockets) -> None:
    """Wait for the first heartbeat; the worker is then loading the model or has loaded it."""
    sockets.from_worker.settimeout(SECONDS)
    with sockets.from_worker.makefile("rb") as stream:
        body = messages.read(stream)
    sockets.from_worker.settimeout(None)
    assert body is not None
    assert isinstance(messages.unpack_for_server(body), messages.Heartbeat | messages.ModelReady)


def wait_ended(pid: int) -> None:
    """Wait until a process has ended that is no child of this one."""
    deadline = time.monotonic() + SECONDS
    while not has_ended(pid):
        assert time.monotonic() < deadline, "the worker survives its parent"
        time.sleep(0.02)


def has_ended(pid: int) -> bool:
    """Whether a process has ended. A zombie has."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("path", ["slow", "any"], ids=["loading", "ready"])
@pytest.mark.parametrize("end", ["to", "both"])
def test_a_worker_whose_sockets_are_closed_ends(sockets, path, end):
    with sockets.start() as process:
        sockets.to_worker.sendall(load_frame(path))
        wait_for_heartbeat(sockets)
        sockets.to_worker.close()
        if end == "both":
            sockets.from_worker.close()
        assert process.wait(SECONDS) == 0


def test_a_worker_that_cannot_send_ends(sockets):
    with sockets.start() as process:
        sockets.to_worker.sendall(load_frame("slow"))
        wait_for_heartbeat(sockets)
        sockets.from_worker.close()  # the next heartbeat cannot be sent
        assert process.wait(SECONDS) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="on other systems only closed sockets show the parent's end")
def test_a_worker_whose_parent_ended_before_its_start_ends_with_open_sockets(sockets):
    with sockets.start("/bin/sh", "-c", '"$@" >/dev/null & echo $!', "sh") as shell:  # starts the worker and ends
        assert shell.stdout is not None
        pid = int(shell.stdout.readline())
        shell.wait()  # before `start` kills it
    wait_ended(pid)


PARENT = """
import os, sys, time
sys.path[:0] = sys.argv[1].split(os.pathsep)
from test_orphans import Sockets, load_frame, wait_for_heartbeat
sockets = Sockets()
with sockets.start() as process:
    sockets.to_worker.sendall(load_frame("slow"))
    wait_for_heartbeat(sockets)
    print(process.pid, flush=True)
    time.sleep(10**6)
"""


def test_a_worker_whose_parent_is_killed_while_it_loads_ends():
    here = os.pathsep.join([str(Path(FAKE).parent), *sys.path])
    with subprocess.Popen([sys.executable, "-c", PARENT, here], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        os.kill(parent.pid, signal.SIGKILL)
    wait_ended(pid)
