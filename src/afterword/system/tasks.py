"""Background tasks and threads. Each exception is logged; then the work is repeated or the process ends."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from afterword.errors import SettingError

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0  # seconds before a failed task runs again
_SWITCH = 0.0005
"""Seconds after which a running Python thread releases the interpreter lock to a thread that waits for it.

An event loop acquires the lock again after each system call. With Python's default of 5 ms, the waits of one turn of
the loop would add up to a tenth of a second.
"""
_FATAL = 70
"""The exit status of a process that one of its threads has ended: `EX_SOFTWARE` of sysexits.h."""

_log = logging.getLogger(__name__)

TaskFunction = Callable[[], Coroutine[Any, Any, None]]


def supervised(work: TaskFunction, name: str, on_error: Callable[[], None] = lambda: None) -> asyncio.Task[None]:
    """A task that runs `work` until it returns or the task is cancelled.

    When `work` raises, the exception is logged, `on_error` is called, and `work` is called again after a pause. The
    pause doubles with each failure, up to a minute. After a run of more than a minute the first pause applies again.
    """
    return asyncio.create_task(_supervise(work, name, on_error), name=name)


async def _supervise(work: TaskFunction, name: str, on_error: Callable[[], None]) -> None:
    pause = _FIRST_PAUSE
    while True:
        began = time.monotonic()
        try:
            await work()
            return
        except Exception:
            if time.monotonic() - began > _LONGEST_PAUSE:
                pause = _FIRST_PAUSE
            _log.exception("The background task %s has failed. It starts again in %g s.", name, pause)
        try:
            on_error()
        except Exception:
            _log.exception("The background task %s could not clean up after its failure.", name)
        await asyncio.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def run_logged(work: TaskFunction, name: str) -> asyncio.Task[None]:
    """A task that runs `work` once. It never raises: an exception is logged."""
    return asyncio.create_task(_log_failure(work, name), name=name)


async def _log_failure(work: TaskFunction, name: str) -> None:
    try:
        await work()
    except Exception:
        _log.exception("The background task %s has failed.", name)


def switch_threads_soon() -> None:
    """Set a short switch interval, for a process with threads that compute beside an event loop or forward passes.

    Call it once per process.
    """
    sys.setswitchinterval(_SWITCH)


def run_loop(work: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine to its end on uvloop if it is installed, otherwise on asyncio's event loop."""
    try:
        import uvloop
    except ImportError:  # uvloop does not exist for every system
        asyncio.run(work)
    else:
        uvloop.run(work)


def vital_thread(work: Callable[..., None], *arguments: Any, name: str) -> threading.Thread:
    """Start a daemon thread that its process cannot work without: if `work` raises, the process ends at once.

    Raises `SettingError` if the system starts no further thread.
    """
    thread = threading.Thread(target=_run_or_end, args=(work, arguments, name), name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError:  # a thread needs addresses for its stack
        raise SettingError(
            "The system starts no further thread: the limit of memory (ulimit -v) or processes (ulimit -u) is too low."
        ) from None
    return thread


def _run_or_end(work: Callable[..., None], arguments: tuple[Any, ...], name: str) -> None:
    try:
        work(*arguments)
    except BaseException as problem:
        if not isinstance(problem, OSError):  # the other process has ended, as usually at a shutdown
            _log.exception("The thread %s has failed; its process ends.", name)
        end_process()


def end_process() -> NoReturn:
    """End this process at once, without waiting for its other threads."""
    os._exit(_FATAL)
