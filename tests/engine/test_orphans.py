"""An engine ends when its parent does, whatever it is doing then: starting, loading, waiting for work."""

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

FAKE = str(Path(__file__).with_name("fake_worker.py"))
SECONDS = 30  # for an engine that never ends, not for slow machines


def opened(path: str) -> bytes:
    """The first frame, as bytes."""
    return messages.pack(
        messages.LoadModel(
            path=path, context=64, sequences=2, threads=1, chunk=8, kv_type="exact", gpu_layers=0, verbose=False
        )
    )


class Lines:
    """The two lines to an engine, whose ends are called as in `worker_process.spawn_worker`."""

    def __init__(self) -> None:
        self.to, self.hears = socket.socketpair()
        self.speaks, self.back = socket.socketpair()
        self.ends = (self.hears, self.speaks)
        self.all = (self.to, self.hears, self.speaks, self.back)

    def command(self, *before: str) -> list[str]:
        return [*before, sys.executable, FAKE, *(str(end.fileno()) for end in self.ends)]

    @contextmanager
    def start(self, *before: str) -> Iterator[subprocess.Popen[bytes]]:
        """Start it through a command, with our copies of its ends closed; what is left of it in the end is killed."""
        fds = [end.fileno() for end in self.ends]
        with subprocess.Popen(self.command(*before), pass_fds=fds, stdout=subprocess.PIPE) as process:
            for end in self.ends:
                end.close()
            try:
                yield process
            finally:
                process.kill()


@pytest.fixture
def lines():
    with ExitStack() as stack:
        made = Lines()
        for end in made.all:
            stack.callback(end.close)
        yield made


def is_loading(lines: Lines) -> None:
    """Wait for the first sign of life; the model is then being loaded."""
    lines.back.settimeout(SECONDS)
    with lines.back.makefile("rb") as stream:
        body = messages.read(stream)
    lines.back.settimeout(None)
    assert body is not None
    assert isinstance(messages.unpack_for_server(body), messages.Heartbeat | messages.ModelReady)


def ends(pid: int) -> None:
    """Wait until a process that is not ours has ended."""
    deadline = time.monotonic() + SECONDS
    while not is_gone(pid):
        assert time.monotonic() < deadline, "it lives on without its parent"
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    """Whether a process has ended; one that its parent has not asked for yet has."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("path", ["slow", "any"], ids=["loading", "ready"])
@pytest.mark.parametrize("end", ["to", "both"])
def test_an_engine_whose_lines_are_closed_ends(lines, path, end):
    with lines.start() as process:
        lines.to.sendall(opened(path))
        is_loading(lines)
        lines.to.close()
        if end == "both":
            lines.back.close()
        assert process.wait(SECONDS) == 0


def test_an_engine_that_nobody_hears_any_more_ends(lines):
    with lines.start() as process:
        lines.to.sendall(opened("slow"))
        is_loading(lines)
        lines.back.close()  # the next sign of life cannot be sent
        assert process.wait(SECONDS) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only the lines tell")
def test_an_engine_whose_parent_was_gone_before_it_began_ends_with_its_lines_open(lines):
    with lines.start("/bin/sh", "-c", '"$@" >/dev/null & echo $!', "sh") as shell:  # it starts the engine and ends
        assert shell.stdout is not None
        pid = int(shell.stdout.readline())
        shell.wait()  # before it is killed
    ends(pid)


PARENT = """
import os, sys, time
sys.path[:0] = sys.argv[1].split(os.pathsep)
from test_orphans import Lines, is_loading, opened
lines = Lines()
with lines.start() as process:
    lines.to.sendall(opened("slow"))
    is_loading(lines)
    print(process.pid, flush=True)
    time.sleep(10**6)
"""


def test_an_engine_whose_parent_is_killed_while_it_loads_ends():
    here = os.pathsep.join([str(Path(FAKE).parent), *sys.path])
    with subprocess.Popen([sys.executable, "-c", PARENT, here], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        os.kill(parent.pid, signal.SIGKILL)
    ends(pid)
