"""Starts Afterword's own server for commands that measure it alone."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class StartedServer:
    """A server that is ready. `seconds`: from its start until it was ready."""

    pid: int
    port: int
    seconds: float


@contextmanager
def started_server(words: list[str]) -> Iterator[StartedServer]:
    """Start `afterword serve` with these arguments. Afterwards SIGKILL ends it and its worker."""
    begun = time.monotonic()
    command = [sys.executable, "-m", "afterword", "serve", "--port", "0", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = next(found[0] for line in process.stdout if (found := re.search(r"http://\S+", line)))
            yield StartedServer(process.pid, urlsplit(url).port or 80, time.monotonic() - begun)
        finally:
            os.kill(process.pid, signal.SIGKILL)
