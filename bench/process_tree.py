"""Ends a process and those below it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

_END_SECONDS = 30


@contextmanager
def ending(process: psutil.Popen) -> Iterator[psutil.Popen]:
    """End a process after the block, and all that it has started: first those, so that none is left without a parent.

    Nothing is raised where it has ended already: the error of the block is the one to see.
    """
    with process:
        try:
            yield process
        finally:
            _end(process)


def _end(process: psutil.Popen) -> None:
    tree: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        tree = [*process.children(recursive=True), process]
    for each in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.terminate()
    _, left = psutil.wait_procs(tree, timeout=_END_SECONDS)
    for each in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
