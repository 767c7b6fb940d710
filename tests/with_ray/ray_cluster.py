"""How the tests run an application of Ray Serve, and what they find out about its processes."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from tests.child_process import ending_with_tests, living

PYTHON = os.environ.get("AFTERWORD_RAY_PYTHON", "")
KEY = "sk-ray-0123456789abcdef"
SOURCE = Path(__file__).resolve().parents[2] / "src"
SECONDS = 120


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster on this machine. `process`: the command that runs it; `log`: the requests that were answered.

    `routing`: see docs/scale.md. Unless it is `connections`, replicas have workers and no HTTP API.
    """

    routing: str
    url: str
    file: Path
    log: Path
    process: psutil.Process

    def http(self) -> httpx.Client:
        """A client with the key. Reading certificates, which no test needs, costs much for many clients."""
        headers = {"Authorization": f"Bearer {KEY}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=SECONDS, trust_env=False, verify=False)

    def replicas(self) -> list[psutil.Process]:
        """The processes of the replicas that have a worker."""
        return [each for each in self._descendants("ServeReplica") if workers(each)]

    def serving(self) -> psutil.Process:
        """The replica that computes something."""
        found: list[psutil.Process] = []

        def look() -> bool:
            found[:] = [each for each in self.replicas() if self._computes(each)]
            return bool(found)

        wait_until(look)
        return found[0]

    def _computes(self, replica: psutil.Process) -> bool:
        if self.routing == "connections":
            return bool(running(replica)["running"])
        before = cpu_seconds(replica)
        time.sleep(0.2)  # an idle worker needs much less than a tenth of this time
        return cpu_seconds(replica) - before > 0.05

    def running(self) -> int:
        """The samples that all replicas compute."""
        if self.routing == "connections":
            return sum(int(str(running(each)["running"])) for each in self.replicas())
        with self.http() as http:
            count: int = http.get("/ready").json()["running"]
            return count

    def proxies(self) -> list[psutil.Process]:
        return self._descendants("haproxy")

    def _descendants(self, word: str) -> list[psutil.Process]:
        return [each for each in self.process.children(recursive=True) if word in command(each)]

    def address(self) -> str:
        """The address for `--address`. `auto` could find another cluster of this machine."""
        found = (re.search(r"--gcs-address=(\S+)", command(each)) for each in self._descendants("raylet"))
        return next(filter(None, found))[1]

    def log_lines(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@contextmanager
def streamed(cluster: Cluster, **body: object) -> Iterator[httpx.Response]:
    whole = {"model": "afterword-tiny", "prompt": "Once", "seed": 7, "stream": True, "max_tokens": 200, **body}
    with cluster.http() as http, http.stream("POST", "/v1/completions", json=whole) as response:
        assert response.status_code == 200
        yield response


@contextmanager
def stream(cluster: Cluster, **body: object) -> Iterator[Iterator[str]]:
    """The lines of a stream."""
    with streamed(cluster, **body) as response:
        yield response.iter_lines()


def command(process: psutil.Process) -> str:
    """The command line; empty if the process has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def workers(replica: psutil.Process) -> list[psutil.Process]:
    """The processes in which a replica's models run."""
    try:
        return [each for each in replica.children() if "afterword" in command(each)]
    except psutil.NoSuchProcess:
        return []


def cpu_seconds(replica: psutil.Process) -> float:
    """The CPU time of a replica's workers."""
    return sum(sum(each.cpu_times()[:2]) for each in workers(replica))


def running(replica: psutil.Process) -> dict[str, object]:
    """The state of one replica, which is asked without the proxy."""
    (port,) = {
        each.laddr.port
        for each in replica.net_connections("tcp")
        if each.status == psutil.CONN_LISTEN and 30_000 <= each.laddr.port <= 31_000
    }
    found: dict[str, object] = httpx.get(f"http://127.0.0.1:{port}/ready", trust_env=False, timeout=SECONDS).json()
    return found


def wait_until(condition: Callable[[], object], seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def environment() -> dict[str, str]:
    """The environment of the command, without another cluster's address. The ports of HAProxy are free ones.

    Ray's new clusters need a token, but with an explicit address Ray does not send it on its own.
    """
    own = {name: value for name, value in os.environ.items() if name not in {"RAY_ADDRESS", "AFTERWORD_DEPLOY_ADDRESS"}}
    return own | {
        "PYTHONPATH": str(SOURCE),
        "RAY_AUTH_MODE": "token",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
    }


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def deployed(folder: Path, routing: str, strict: bool = True) -> Iterator[Cluster]:
    """Run two replicas of the built-in model.

    At the end a running stream must be answered to its end, and no process of the cluster may be left.
    """
    file, log, keys, port = folder / "app.yaml", folder / "requests.jsonl", folder / "keys", free_port()
    keys.write_text(KEY)
    keys.chmod(0o600)
    file.write_text(
        f"port: {port}\nreplicas: 2\ncpus: 0.1\ndrain: 60\nrouting: {routing}\n"
        f"serve: {{strict: {str(strict).lower()}, parallel: 8, threads: 1, api-key-file: {keys}, log: {log}}}\n"
    )
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            ending_with_tests([PYTHON, "-m", "afterword", "deploy", str(file)]),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        found: list[psutil.Process] = []
        try:
            cluster = Cluster(routing, f"http://127.0.0.1:{port}", file, log, psutil.Process(process.pid))
            assert process.stdout is not None
            if not any("Ray Serve runs" in line for line in process.stdout):
                errors.seek(0)
                pytest.fail(f"Ray Serve did not start: {errors.read()[-3000:]}")
            wait_until(lambda: len(cluster.replicas()) == 2)
            yield cluster
            found = cluster.process.children(recursive=True)
            with stream(cluster, n=16, max_tokens=240) as lines:
                next(lines)
                process.terminate()
                assert "data: [DONE]" in list(lines), "the drain did not hold"
            assert process.wait(SECONDS) == 0
            wait_until(lambda: not living(found), 30)
        finally:
            process.kill()
            with process:  # closes its output and waits for its end
                pass
