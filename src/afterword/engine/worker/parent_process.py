"""What a worker process does about its parent: it takes its sockets, ends with it, and hides prompts from others.

This module must import only the standard library: processes that vLLM starts import it too.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Sequence
from typing import NoReturn

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4
_CREDENTIALS = struct.Struct("3i")  # `struct ucred` of a socket's creator: process id, user id, group id
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def sockets(arguments: Sequence[str]) -> tuple[socket.socket, socket.socket]:
    """The sockets from and to the server, whose file descriptors are the last two arguments of the command line."""
    from_server, to_server = (socket.socket(fileno=int(number)) for number in arguments[-2:])
    return from_server, to_server


def die_with_parent(parent_socket: socket.socket) -> None:
    """Ignore the signals that the parent handles, and ask Linux to kill this process when the parent ends.

    On other systems only the closed socket shows the parent's end. A parent that ended before the call of `prctl` sends
    no signal any more. So the parent's process id is compared with that of the process that created `parent_socket`.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        credentials = parent_socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        end_with(_CREDENTIALS.unpack(credentials)[0])


def end_with(parent: int) -> None:
    """Ask Linux to kill this process when the thread that started it ends. End now if `parent` is not its parent."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(0)


def unblock_signals() -> None:
    """Undo the signal mask with which a worker starts; otherwise the processes that it starts inherit the mask."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def keep_memory_private() -> None:
    """Keep prompts out of core files, and forbid other processes of the same user to read this one's memory."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0)


def kill_group() -> NoReturn:
    """End this process, and the process group that it leads, if it leads one."""
    with contextlib.suppress(OSError):
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(0)
