"""`python -m bench.front_cost FOLDER --vllm-python PYTHON`: CPU time of Afterword over vLLM, and of vLLM's server.

Both servers run at the same time with the same model and flags, and are measured in turns. The front of each is all of
its processes but vLLM's engine (its main process and those below it), which does the same work in both: for Afterword
the server and its worker, for vLLM the process with the HTTP server. CPU time (user and system) depends little on other
load. A small model, such as that of tests/with_vllm/random_model.py, makes the share of the front large.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from statistics import median
from typing import IO, Any

import httpx
import psutil

from bench.process_tree import ending

CLIENTS = 8
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
FLAGS = ("--dtype=float32", "--block-size=32", "--enforce-eager", "--max-num-seqs=8")
_START_SECONDS = 900


@dataclass(frozen=True, slots=True)
class Load:
    """What the clients do in one round: `requests` each, in turn, of `tokens` tokens. `unit`: of the cost."""

    name: str
    stream: bool
    requests: int
    tokens: int
    unit: str
    logprobs: int | None = None

    @property
    def units(self) -> int:
        """How many tokens or requests a round has."""
        return CLIENTS * self.requests * (self.tokens if self.unit == "token" else 1)


LOADS = (
    Load("streamed", True, 2, 200, "token"),
    Load("whole, 200 tokens", False, 2, 200, "request"),
    Load("whole, 16 tokens", False, 20, 16, "request"),
    Load("whole, 16 tokens, logprobs 5", False, 20, 16, "request", logprobs=5),
)


class Front:
    """A running server. `depth`: its processes down to this depth below the first one are its front."""

    def __init__(self, name: str, url: str, root: psutil.Process, depth: int) -> None:
        self.name, self.url, self._root, self._depth = name, url, root, depth

    def seconds(self) -> float:
        """The CPU time that the processes of the front have used. Helpers of `multiprocessing` use nearly none."""
        found, level = [self._root], [self._root]
        for _ in range(self._depth):
            level = [child for each in level for child in each.children()]
            found += level
        times = [each.cpu_times() for each in found]
        return sum(each.user + each.system for each in times)


def main(arguments: Sequence[str] | None = None) -> None:
    """Start both servers, measure, print, and end them."""
    parser = argparse.ArgumentParser(prog="python -m bench.front_cost", description=__doc__)
    parser.add_argument("folder", help="a model in Hugging Face's format")
    parser.add_argument("--vllm-python", required=True, metavar="PYTHON", help="of the environment with vLLM")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})
    with _running(options.folder, options.vllm_python) as (ours, theirs):
        for load in LOADS:
            costs = _measured((ours, theirs), load, options.rounds)
            print(_line(load, costs[ours.name], costs[theirs.name]), flush=True)


def _measured(fronts: Sequence[Front], load: Load, rounds: int) -> dict[str, list[float]]:
    """Milliseconds a unit by server, for each round after one that is not counted. The servers take turns."""
    seeds = count(1)
    costs: dict[str, list[float]] = {each.name: [] for each in fronts}
    for number in range(rounds + 1):
        for front in fronts if number % 2 else reversed(fronts):
            before = front.seconds()
            with ThreadPoolExecutor(CLIENTS) as clients:
                list(
                    clients.map(
                        lambda seed, front=front: _client(front.url, load, seed), (next(seeds) for _ in range(CLIENTS))
                    )
                )
            if number:
                costs[front.name].append(1000 * (front.seconds() - before) / load.units)
    return costs


def _line(load: Load, ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The medians and ranges in milliseconds, and the ratio with its range over the rounds."""
    ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
    figures = [f"{median(each):.3f} ({min(each):.3f} to {max(each):.3f})" for each in (ours, theirs, ratios)]
    return f"{load.name}: Afterword {figures[0]} ms a {load.unit}, vLLM {figures[1]} ms, ratio {figures[2]}"


def _client(url: str, load: Load, seed: int) -> None:
    """Send requests one after the other, and check that each has its tokens."""
    body: dict[str, Any] = {"prompt": f"Once upon a time {seed}", "max_tokens": load.tokens, "seed": seed}
    body |= {"ignore_eos": True, "stream": load.stream, "logprobs": load.logprobs}
    if load.stream:
        body["stream_options"] = {"include_usage": True}
    with httpx.Client(base_url=url, timeout=300, trust_env=False) as http:
        for _ in range(load.requests):
            response = http.post("/v1/completions", json=body)
            response.raise_for_status()
            (found,) = set(re.findall(r'"completion_tokens":\s*(\d+)', response.text))
            if int(found) != load.tokens:
                raise ValueError(f"{url} generated {found} tokens, not {load.tokens}")


def _commands(folder: str, python: str, ports: Sequence[int]) -> tuple[list[str], list[str]]:
    """The command lines of Afterword and of vLLM's server. The program `vllm` of the build for CPUs does not start."""
    ours = [sys.executable, "-m", "afterword", "serve", folder, "--engine", "vllm", "--vllm-python", python]
    theirs = [python, "-m", "vllm.entrypoints.launchers.api_server.entry", f"--model={folder}", *FLAGS]
    theirs += ["--host=127.0.0.1", f"--port={ports[1]}", "--generation-config=vllm", "--disable-uvicorn-access-log"]
    return [*ours, "--port", str(ports[0]), "--", *FLAGS], theirs


@contextmanager
def _running(folder: str, python: str) -> Iterator[tuple[Front, Front]]:
    """Start both servers at the same time, and end them after the block."""
    ports = [_free_port(), _free_port()]
    with ExitStack() as running:
        started = [running.enter_context(_started(command)) for command in _commands(folder, python, ports)]
        for port, (process, log) in zip(ports, started, strict=True):
            _wait_for(f"http://127.0.0.1:{port}/health", process, log)
        roots, urls = [process for process, _ in started], [f"http://127.0.0.1:{port}" for port in ports]
        yield Front("Afterword", urls[0], roots[0], depth=1), Front("vLLM", urls[1], roots[1], depth=0)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


@contextmanager
def _started(command: Sequence[str]) -> Iterator[tuple[psutil.Popen, IO[str]]]:
    """Run a command until the block ends, and all of its processes: vLLM's engine outlives a server that is killed."""
    with tempfile.TemporaryFile("w+") as log, ending(psutil.Popen(command, stdout=log, stderr=log)) as process:
        yield process, log


def _wait_for(url: str, process: psutil.Popen, log: IO[str]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            if httpx.get(url, trust_env=False, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        if process.poll() is not None or time.monotonic() > deadline:
            log.seek(0)
            raise RuntimeError(f"{url} did not answer: {log.read()[-3000:]}")
        time.sleep(1)  # each call of httpx costs CPU time that the server needs


if __name__ == "__main__":
    main()
