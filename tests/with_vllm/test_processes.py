"""No process of vLLM outlives its server, whichever process is killed; requests survive as the promise says."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import httpx
import psutil
import pytest
from vllm_server import arguments

from tests.child_process import living

SLOW_ROUNDS = 10
MARK = "AFTERWORD_TEST_OF_PROCESSES"
"""An environment variable that all processes of a test inherit. So the process table is searched, not only a tree."""
SECONDS = 240  # for a worker that must load the model again on a slow machine


class VllmServer:
    """A server without keys, and the processes that it has started."""

    def __init__(self, process: subprocess.Popen[str], url: str, mark: str) -> None:
        self.mark = mark
        self.groups: set[int] = set()
        self.process = psutil.Process(process.pid)
        self.http = httpx.Client(base_url=url, timeout=SECONDS, trust_env=False)

    def descendants(self) -> list[psutil.Process]:
        """The worker, and the processes of vLLM: its main process and those that `multiprocessing` adds."""
        return self.process.children(recursive=True)

    @property
    def worker(self) -> psutil.Process:
        return next(each for each in self.process.children() if "bootstrap.py" in " ".join(each.cmdline()))

    @property
    def engine_core(self) -> psutil.Process:
        """vLLM's main process: the largest one that the worker has started."""
        return max(self.worker.children(), key=lambda each: each.memory_info().rss)

    @property
    def engine_worker(self) -> psutil.Process:
        """The process of vLLM that has no further one: its worker, or its main process where there is no worker."""
        below = [each for each in self.engine_core.children() if "resource_tracker" not in " ".join(each.cmdline())]
        return max(below, key=lambda each: each.memory_info().rss) if below else self.engine_core

    def table(self) -> list[psutil.Process]:
        """The processes of this server in the process table, also those whose parent has ended, but for the server."""
        with contextlib.suppress(psutil.NoSuchProcess):  # the server may have ended
            self.groups |= {each.pid for each in self.process.children()}  # a worker leads a group of processes
        found = []
        for each in psutil.process_iter():
            try:
                marked = each.environ().get(MARK) == self.mark
                if each != self.process and (marked or os.getpgid(each.pid) in self.groups):
                    found.append(each)
            except (psutil.Error, ProcessLookupError):
                continue
        return found

    def complete(self, **body: object) -> httpx.Response:
        return self.http.post("/v1/completions", json={"prompt": "Once", "max_tokens": 4, **body})


def wait_until(condition: object, seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextmanager
def started(folder: Path) -> Iterator[VllmServer]:
    command = [sys.executable, "-m", "afterword", "serve", *arguments(folder, "--port", "0", "--parallel", "4")]
    mark = uuid4().hex
    environment = os.environ | {MARK: mark}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        try:
            assert process.stdout is not None
            output = ""
            for line in process.stdout:
                output += line
                if found := re.search(r"\s(http://\S+)\n", output):
                    server = VllmServer(process, found[1], mark)
                    with server.http:
                        yield server
                    return
            log.seek(0)
            pytest.fail(f"The server did not start: {log.read()[-2000:]}")
        finally:
            process.kill()
            with process:  # closes its output and waits for its end
                pass


def test_no_process_is_left_whichever_is_killed(folder: Path) -> None:
    """After each death another worker serves, no process of the one before is left, and the fingerprint is the same."""
    with started(folder) as server:
        fingerprint = server.complete().json()["system_fingerprint"]
        for victim in ("engine_core", "worker"):
            processes = server.descendants()
            assert len(processes) >= 2
            answers = streams_while_killed(server, getattr(server, victim))
            assert answers["stream"].count("error") == 1, "a stream that has begun ends with an error event"
            assert "[DONE]" not in answers["stream"]
            assert answers["waiting"] == "200", "a request that has brought nothing is answered by the next worker"
            assert not living(processes)
            assert server.complete().json()["system_fingerprint"] == fingerprint
        processes = {*server.descendants(), *server.table()}
        server.process.send_signal(signal.SIGKILL)
        wait_until(lambda: not living([*processes, *server.table()]), 30)


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("repetition", range(SLOW_ROUNDS))
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_no_process_is_left_of_each_kind_ten_times(folder: Path, end: signal.Signals, repetition: int) -> None:
    """Each process of the model is killed, and then the server is killed; or the server ends in order. 50 starts."""
    with started(folder) as server:
        for victim in ("engine_worker", "engine_core", "worker") if end == signal.SIGKILL else ():
            assert server.complete().status_code == 200
            before = server.table()
            assert len(before) >= 2
            getattr(server, victim).kill()
            wait_until(lambda before=before: not living(before))
        assert server.complete().status_code == 200
        before = server.table()
        assert len(before) >= 2
        server.process.send_signal(end)
        wait_until(lambda: not living([server.process, *before, *server.table()]), 60)


def streams_while_killed(server: VllmServer, victim: psutil.Process) -> dict[str, str]:
    """What a running stream and waiting requests get when a process is killed.

    The model has four sequences, so the fifth request waits.
    """
    answers = {}
    body = {"prompt": "Once", "max_tokens": 1900, "ignore_eos": True, "n": 4, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        waiting = threading.Thread(target=lambda: answers.update(waiting=str(server.complete().status_code)))
        waiting.start()
        wait_until(lambda: json.loads(server.http.get("/ready").text)["waiting"] >= 1)
        os.kill(victim.pid, signal.SIGKILL)
        answers["stream"] = " ".join("error" if '"error"' in line else line[:12] for line in lines)
    waiting.join(SECONDS)
    return answers
