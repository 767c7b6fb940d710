"""G22: beside any request within the limits, with the largest bodies and responses, `/health` answers at once."""

from __future__ import annotations

import http.client
import json
import math
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from afterword.api.responses import incremental
from afterword.api.responses.time_slices import TimeSlices

from .gate import Fault, Gate, Result, Trial
from .server import Server, helper_process

WORST = 0.1
"""Upper bound of the time of `/health`, in seconds."""
MOST_MEMORY = 768
"""Upper bound of the memory of the server's own process, in MiB."""
_ATTEMPTS = 3
"""How often a time above `WORST` is measured. The least counts: a pause of the machine is not one of the server."""
_PAUSE = 0.01  # seconds between two requests
_CONTEXT = 2048
_LIMIT = 300  # seconds for a request
_BODY = 8 * 2**20 - 2**10
_ENDED = ("completed", "failed", "expired", "cancelled")
_WORDS = 256  # token ids below this are bytes


def run(trial: Trial) -> Result:
    slowest: dict[str, float] = {}
    sizes: dict[str, int] = {}
    wrong, memory = 0, 0.0
    with (
        trial.serve("--parallel", "8", "--context", str(_CONTEXT), scripted=True) as server,
        helper_process("discarding_client") as client_process,
    ):
        for name, (path, body, status) in list(cases().items()) * trial.size:
            trial.say(f"G22 {name}")
            found = _least(partial(_ask, server, client_process, path, body), status)
            wrong += found.wrong
            slowest[name] = max(slowest.get(name, 0.0), found.seconds)
            memory = max(memory, _peak_memory(server))
            sizes[name] = found.size
        for name, (lines, ended) in batches().items():
            trial.say(f"G22 {name}")
            found = _least(partial(_run_batch, server, lines), ended)
            wrong, sizes[name], slowest[name] = wrong + found.wrong, found.size, found.seconds
            memory = max(memory, _peak_memory(server))
    worst = max(slowest.values())
    figures = {f"{name}: MB, ms": f"{sizes[name] / 1e6:.0f}, {slowest[name] * 1000:.0f}" for name in sizes}
    passed = wrong == 0 and worst <= WORST and memory <= MOST_MEMORY
    return Result(passed, {"wrong": wrong, "worst, ms": round(worst * 1000), "MiB": round(memory)} | figures)


@dataclass(frozen=True, slots=True)
class _Measured:
    """The bytes of the last response, the least seconds of `/health`, and how many responses had a wrong status."""

    size: int
    seconds: float
    wrong: int


def _least(measure: Callable[[], tuple[tuple[object, int], float]], expected: object) -> _Measured:
    """Measure up to `_ATTEMPTS` times. `measure` returns status and bytes of a response, and seconds."""
    size, least, wrong = 0, math.inf, 0
    for _ in range(_ATTEMPTS):
        if least > WORST:
            (status, size), seconds = measure()
            least, wrong = min(least, seconds), wrong + (status != expected)
    return _Measured(size, least, wrong)


def completion(**fields: Any) -> tuple[str, str, int]:
    return "/v1/completions", json.dumps(fields), 200


def cases() -> dict[str, tuple[str, str, int]]:
    """Requests named after their large part: path, body and expected status."""
    prompt = [7 * position % _WORDS for position in range(2000)]
    stops = [chr(ord("a") + number) * 1023 for number in range(16)]
    items = _BODY // 4
    return {
        "reports": completion(prompt=prompt, n=128, prompt_logprobs=20, max_tokens=1),
        "echoes": completion(prompt=prompt, n=128, echo=True, logprobs=20, max_tokens=1),
        "streamed echoes": completion(prompt=prompt, n=128, echo=True, logprobs=20, max_tokens=1, stream=True),
        "scored prompts": completion(prompt=[prompt] * 20, echo=True, logprobs=20, max_tokens=0),
        "long texts": completion(prompt="a", n=16, logprobs=20, max_tokens=_CONTEXT - 8, ignore_eos=True),
        "ranked texts": completion(prompt="a", best_of=16, logprobs=20, max_tokens=_CONTEXT - 8, ignore_eos=True),
        "stop strings": completion(prompt=["a"] * 2048, stop=stops, max_tokens=1),
        "truncated": completion(prompt=["a" * 17_000] * 400, truncate_prompt_tokens=8, max_tokens=1),
        "lists": ("/v1/completions", f'{{"prompt":[{",".join(["[1]"] * items)}]}}', 400),
        "ids": ("/v1/completions", f'{{"prompt":[{",".join(["1"] * 2 * items)}],"max_tokens":1}}', 400),
        "schemas": ("/v1/completions", f'{{"json_schema":{{"enum":[{",".join(["1"] * 2 * items)}]}}}}', 400),
        "breakers": ("/v1/completions", f'{{"dry_sequence_breakers":"[{",".join(["1"] * 2 * items)}]"}}', 400),
        "numbers": ("/v1/completions", f'{{"seed":{"1" * _BODY}}}', 400),
        "nested": ("/v1/completions", f'{{"prompt":{"[" * 900}{",".join(["1"] * (2 * items - 999))}{"]" * 900}}}', 400),
        "surrogates": ("/v1/completions", f'{{"prompt":"{"a" * _BODY}\\ud800"}}', 400),
        "banned ids": ("/v1/completions", f'{{"banned_tokens":"1{" " * _BODY}x"}}', 400),
        "detokenized": ("/detokenize", f'{{"tokens":[{",".join(["97"] * (_BODY // 3))}]}}', 200),
    }


def batches() -> dict[str, tuple[list[str], str]]:
    """Batches named after their large part: the bodies of their lines, and their last status."""
    prompt = [7 * position % _WORDS for position in range(2000)]
    reports = json.dumps({"prompt": prompt, "n": 5, "prompt_logprobs": 20, "max_tokens": 1})
    lists = f'{{"prompt":[{",".join(["[1]"] * (_BODY // 4 - 64))}]}}'
    ids = f'{{"prompt":[{",".join(["1"] * (_BODY // 2 - 128))}],"max_tokens":1}}'
    return {"lines of lists": ([lists] * 4, "failed"), "answers to lines": ([reports, ids] * 2, "completed")}


def _run_batch(server: Server, bodies: list[str]) -> tuple[tuple[str, int], float]:
    """Run a batch. Returns its last status, the bytes of its output, and the longest time of `/health` in seconds."""
    head = '"method":"POST","url":"/v1/completions"'
    lines = [f'{{"custom_id":"{number}",{head},"body":{body}}}\n' for number, body in enumerate(bodies)]
    snapshots = _health_times(server)
    worst = next(snapshots)
    deadline = time.monotonic() + _LIMIT
    with server.http(timeout=_LIMIT) as http:
        files = {"file": ("lines.jsonl", "".join(lines).encode())}
        file = http.post("/v1/files", files=files, data={"purpose": "batch"}).json()["id"]
        made = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}
        path = f"/v1/batches/{http.post('/v1/batches', json=made).json()['id']}"
        while (batch := http.get(path).json())["status"] not in _ENDED and time.monotonic() < deadline:
            for _ in range(10):
                worst = max(worst, next(snapshots))
                time.sleep(_PAUSE)
        listed = http.get("/v1/files", params={"purpose": "batch_output"}).json()["data"]
        size = sum(each["bytes"] for each in listed if each["id"] == batch["output_file_id"])
    return (batch["status"], size), worst


def _ask(server: Server, client_process: subprocess.Popen[str], path: str, body: str) -> tuple[tuple[int, int], float]:
    """Send a request. Returns status and bytes of its response, and the longest time of `/health` in seconds."""
    assert client_process.stdin is not None
    assert client_process.stdout is not None
    client_process.stdin.write(json.dumps({"port": server.port, "path": path, "body": body}) + "\n")
    client_process.stdin.flush()
    snapshots = _health_times(server)
    worst = next(snapshots)
    deadline = time.monotonic() + _LIMIT
    with _LineReader(client_process) as lines:
        while lines.line is None and time.monotonic() < deadline:
            worst = max(worst, next(snapshots))
            time.sleep(_PAUSE)
        status, size = json.loads(lines.line or "[0, 0]")
    return (status, size), worst


class _LineReader:
    """Waits in a thread for the client process's next line."""

    def __init__(self, client_process: subprocess.Popen[str]) -> None:
        self.line: str | None = None
        self._taker = client_process
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> _LineReader:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.line is None:
            self._taker.kill()
        self._thread.join()

    def _read(self) -> None:
        assert self._taker.stdout is not None
        self.line = self._taker.stdout.readline()


def _peak_memory(server: Server) -> float:
    """Peak memory of the server's own process in MiB; without `/proc` its current memory."""
    try:
        status = Path(f"/proc/{server.pid}/status").read_text(encoding="utf-8")
    except OSError:
        return server.memory
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**10


def _health_times(server: Server) -> Iterator[float]:
    """Request `/health` repeatedly on one connection and yield the seconds of each request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    while True:
        start = time.monotonic()
        connection.request("GET", "/health")
        connection.getresponse().read()
        yield time.monotonic() - start


def send_in_one_piece(patch: pytest.MonkeyPatch) -> None:
    async def return_immediately(*_: Any) -> None:
        pass

    patch.setattr(TimeSlices, "yield_after", return_immediately)
    patch.setattr(incremental, "chunked", lambda fragments: iter([b"".join(fragments)]))


GATE = Gate(
    name="G22",
    goal="beside any one request within the limits, /health takes at most 100 ms",
    unit="rounds",
    commit=1,
    nightly=5,
    run=run,
    fault=Fault("responses are serialized and sent in one piece", "server", send_in_one_piece),
    planted=1,
)
