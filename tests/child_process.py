"""How tests start a process in its own session, which gets no signal that a terminal or `timeout` sends to the tests.

Run as a program, this file executes a command: the arguments are the process id of its parent and the command.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

import psutil

_PR_SET_PDEATHSIG = 1


def ending_with_tests(command: Sequence[str]) -> list[str]:
    """A command that runs `command`: Linux sends it SIGTERM when the thread that started it ends, even by SIGKILL."""
    return [sys.executable, __file__, str(os.getpid()), *command]


def living(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended. A zombie has."""
    found = []
    for each in processes:
        try:
            if each.status() != psutil.STATUS_ZOMBIE:
                found.append(each)
        except psutil.NoSuchProcess:
            continue
    return found


if __name__ == "__main__":
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)  # holds after execv too
    if os.getppid() == int(sys.argv[1]):  # otherwise the parent ended before the call of prctl
        os.execvp(sys.argv[2], sys.argv[2:])
