"""Starts the servers that gates test: the real command in a separate process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import psutil

from . import ROOT

_START, _STOP = 60, 60  # seconds


@contextmanager
def helper_process(module: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run a module of this package in a separate process with pipes for lines, for work that may crash its process."""
    command = [sys.executable, "-m", f"tests.chaos.{module}", *arguments]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


@dataclass(frozen=True, slots=True)
class Server:
    """A running server. `stderr` is the file with its standard error."""

    url: str
    key: str | None
    model: str
    process: subprocess.Popen[str]
    stderr: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def headers(self) -> dict[str, str]:
        """The header with the API key."""
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def http(self, timeout: float = 60) -> httpx.Client:
        """A client with the server's key."""
        return httpx.Client(base_url=self.url, headers=self.headers, timeout=timeout, trust_env=False)

    def async_http(self, timeout: float = 60) -> httpx.AsyncClient:
        """An asynchronous client with the server's key and no connection limit."""
        return httpx.AsyncClient(
            base_url=self.url,
            headers=self.headers,
            timeout=timeout,
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
        )

    def with_key(self, key: str) -> Server:
        """The same server for requests with this API key."""
        return replace(self, key=key)

    @property
    def stderr_bytes(self) -> bytes:
        """The server's standard error, also after its end."""
        return self.stderr.read_bytes()

    @property
    def memory(self) -> float:
        """Memory of the server's own process in MiB, without the worker."""
        return float(psutil.Process(self.pid).memory_info().rss) / 2**20

    def alive(self) -> bool:
        return self.process.poll() is None

    def worker(self) -> psutil.Process:
        """The worker process. Raises `LookupError` while there is none."""
        for child in psutil.Process(self.pid).children():
            if child.status() != psutil.STATUS_ZOMBIE:
                return child
        raise LookupError("no worker")

    def load(self) -> dict[str, Any]:
        """The JSON body of `/ready`."""
        with self.http() as client:
            answer: dict[str, Any] = client.get("/ready").json()
            return answer


@contextmanager
def serving(
    *arguments: str,
    scripted: bool = False,
    planted: str | None = None,
    key: str | None = None,
    variables: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Start a server on a free port and stop it afterwards. `variables` are added to its environment."""
    flags = [*(["--scripted"] if scripted else []), *(["--planted", planted] if planted else [])]
    keys = ["--api-key", key] if key else []
    command = [sys.executable, "-m", "tests.chaos.serve", *flags, "serve", "--port", "0", *keys, *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AFTERWORD_")}
    with tempfile.TemporaryDirectory() as folder:
        environment |= {"XDG_DATA_HOME": folder} | (variables or {})  # an empty folder for its batches
        stderr = Path(folder, "stderr")
        with (
            stderr.open("w") as log,
            subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
            ) as process,
        ):
            try:
                yield _wait_until_ready(process, stderr, key)
                process.send_signal(signal.SIGTERM)
                process.wait(_STOP)
            finally:
                process.kill()


def _wait_until_ready(process: subprocess.Popen[str], stderr: Path, key: str | None) -> Server:
    assert process.stdout is not None
    kill_timer = threading.Timer(_START, process.kill)
    kill_timer.start()
    output = ""
    for line in process.stdout:
        output += line
        if found := re.search(r"serves (\S+) .*\s(http://\S+)\n", output, re.DOTALL):
            kill_timer.cancel()
            return Server(found[2], key, found[1], process, stderr)
    kill_timer.cancel()
    raise RuntimeError(f"The server did not start: {output}{stderr.read_text(errors='replace')}")
