"""Runs a command none of whose processes outlives this one, also when this one is killed: `guarded`.

`python guarded.py COMMAND…` leads a process group. It kills the group when the command has ended, and when its standard
input is closed, which is a pipe from its parent: the system closes it when the parent is killed. Linux's signal at the
death of a parent would end the command itself, but not the processes that the command has started.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

_END_SECONDS = 30  # for the command to end in order after SIGTERM


@contextmanager
def guarded(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command, and end it afterwards. `options`: those of `Popen`. The process of the value is the guard."""
    words = [sys.executable, __file__, *command]
    with subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True, **options) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):  # it may have ended, and with it all of its group
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(_END_SECONDS)
            finally:
                assert process.stdin is not None
                process.stdin.close()


def main(command: Sequence[str]) -> None:
    """Run a command as the guard."""
    signal.signal(signal.SIGTERM, lambda *_: None)  # the whole group gets it; the command may need time
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    threading.Thread(target=_wait_for_parent, daemon=True).start()
    child.wait()
    _kill_group()


def _wait_for_parent() -> None:
    sys.stdin.buffer.read()
    _kill_group()


def _kill_group() -> NoReturn:
    """Kill the processes of the group, and this one."""
    os.killpg(os.getpid(), signal.SIGKILL)
    raise AssertionError("this process leads its group")


if __name__ == "__main__":
    main(sys.argv[1:])
