"""Background tasks and threads that cannot end unnoticed: what raises is logged, and runs again or ends its process."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0  # seconds before a task that has raised runs again
_SWITCH = 0.0005
"""Seconds after which a thread that computes in Python leaves the interpreter to one that waits for it. An event loop
takes the interpreter back after each system call, so Python's 5 ms would add up to a tenth of a second in one turn."""
_FATAL = 70
"""The exit status of a process that one of its threads has ended: an internal software error, as sysexits.h has it."""

_log = logging.getLogger(__name__)

TaskFunction = Callable[[], Coroutine[Any, Any, None]]


def supervised(work: TaskFunction, name: str, on_error: Callable[[], None] = lambda: None) -> asyncio.Task[None]:
    """A task that does `work` until that returns or the task is cancelled.

    When the work raises, the exception is logged, `on_error` is called, and the work begins again after a pause. The
    pause doubles with each failure, up to a minute; work that has run for a minute begins with the first pause again.
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
            _log.exception("The background task %s has failed. It begins again in %g s.", name, pause)
        try:
            on_error()
        except Exception:
            _log.exception("The background task %s cannot clean up after its failure.", name)
        await asyncio.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def run_logged(work: TaskFunction, name: str) -> asyncio.Task[None]:
    """A task that is done once. It raises nothing: an exception is logged."""
    return asyncio.create_task(_log_failure(work, name), name=name)


async def _log_failure(work: TaskFunction, name: str) -> None:
    try:
        await work()
    except Exception:
        _log.exception("The background task %s has failed.", name)


def switch_threads_soon() -> None:
    """To be called once in a process whose threads compute beside its event loop or its forward passes."""
    sys.setswitchinterval(_SWITCH)


def vital_thread(work: Callable[..., None], *arguments: Any, name: str) -> threading.Thread:
    """A daemon thread without which its process is of no use: when the work raises, the process ends at once."""
    thread = threading.Thread(target=_run_or_end, args=(work, arguments, name), name=name, daemon=True)
    thread.start()
    return thread


def _run_or_end(work: Callable[..., None], arguments: tuple[Any, ...], name: str) -> None:
    try:
        work(*arguments)
    except BaseException as problem:
        if not isinstance(problem, OSError):  # the other process is gone, which is how these processes usually end
            _log.exception("The thread %s has failed; its process ends.", name)
        end_process()


def end_process() -> NoReturn:
    """End this process at once, without waiting for its other threads."""
    os._exit(_FATAL)
