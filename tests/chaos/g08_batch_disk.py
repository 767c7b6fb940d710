"""G8: a batch has the same output after a crash at, or a failure of, any call that changes a file.

The command runs in a process whose file calls are logged (`disk.c`). From the log of one run `disk.py` computes the
possible states of the disk after each call, and the same command resumes from each of these states. Then each call
fails in turn: with a disk that is full and stays full, and with an error that occurs once.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest

from afterword.batch import batch_job, journal
from afterword.batch.output_lines import SendRequest, ServerReply
from afterword.cli import batch_run

from . import ROOT
from .disk import Contents, Disk, build, read_calls
from .gate import Fault, Gate, Result, Trial

_LIMIT = 3000  # seconds for the whole gate
_CREATED = 1_700_000_000
_FAULTY = (b"{no", b"", b'{"prompt": "a", "stream": true}')
OPTIONS = {"url": None, "plan": False, "restart": False, "as_json": True, "concurrency": 3, "alias": None}


def run(trial: Trial) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        library = build(Path(folder))
        words = [str(trial.size), str(trial.seed), trial.planted or ""]
        environment = {**os.environ, "LD_PRELOAD": str(library), "SOURCE_DATE_EPOCH": str(_CREATED)}
        done = subprocess.run(
            [sys.executable, "-m", "tests.chaos.g08_batch_disk", *words],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            timeout=_LIMIT,
            check=True,
        )
    seen = json.loads(done.stdout)
    return Result(not seen["wrong"], seen)


# ---- in the process whose file calls are logged


@dataclass
class Bench:
    """Runs the same batch repeatedly, in a folder in memory if the system has one."""

    source: Path
    folder: Path
    disk: Any
    want: bytes = b""
    wrong: list[str] = field(default_factory=list)

    @property
    def output(self) -> Path:
        return self.folder / "out.jsonl"

    def clear(self, contents: Contents) -> None:
        """Replace all files of the folder by `contents`."""
        for path in self.folder.iterdir():
            path.unlink()
        for name, content in contents.items():
            Path(name).write_bytes(content)

    def go(self) -> int | str:
        """The command's exit status, or the exception that it raised."""
        try:
            return batch_run.batch(self.source, None, OPTIONS | {"output": self.output})
        except Exception as problem:
            return f"{type(problem).__name__}: {problem}"

    def finish(self, where: str) -> None:
        """Run the command from the current files, and record an error unless its output is complete and correct."""
        status = self.go()
        left = sorted(path.name for path in self.folder.iterdir())
        if status != 0 or left != ["out.jsonl"] or self.output.read_bytes() != self.want:
            self.wrong.append(f"{where}: {status}, {left}")


def main() -> None:
    rows, seed, planted = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    patch = pytest.MonkeyPatch()
    patch.setattr(batch_run, "_open_client", echoing)
    patch.setattr(batch_run.click, "echo", lambda *_, **__: None)
    patch.setattr(batch_run.click, "secho", lambda *_, **__: None)
    patch.setattr(batch_job, "_PAUSE", 0)
    if planted:
        GATE.fault.plant(patch)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory() as temporary, tempfile.TemporaryDirectory(dir=memory) as folder:
        source = Path(temporary, "in.jsonl")
        source.write_bytes(b"\n".join(lines(rows, Random(seed))))
        bench = Bench(source, Path(folder), ctypes.CDLL(None))
        states = crashes(bench, Path(temporary, "log"), Random(seed))
        failures = Counter(
            full=failing(bench, errno.ENOSPC, on=True),
            io=failing(bench, errno.EIO, on=False),
        )
    first = {"first": bench.wrong[0][:300]} if bench.wrong else {}
    figures = {"states of the disk": states, "full disks": failures["full"], "failing calls": failures["io"]}
    print(json.dumps({**figures, "wrong": len(bench.wrong), **first}))


def lines(rows: int, random: Random) -> list[bytes]:
    """Input lines, some of them invalid."""
    wanted = (json.dumps({"prompt": f"{random.getrandbits(40)}", "n": row % 4}).encode() for row in range(rows))
    return [_FAULTY[row // 7 % 3] if row % 7 == 6 else line for row, line in enumerate(wanted)]


@asynccontextmanager
async def echoing(_: object) -> AsyncIterator[SendRequest]:
    """A server that responds at once, refuses some requests, and echoes the request body with its seed."""

    async def ask(method: str, path: str, body: bytes) -> ServerReply:
        await asyncio.sleep(0)
        if method == "GET":
            return ServerReply(200, b'{"data": [{"id": "m", "system_fingerprint": "f"}], "sequences": 2}')
        if json.loads(body)["n"] == 0:
            return ServerReply(400, b'{"error": {"message": "n", "type": "invalid_request_error"}}')
        usage = {"prompt_tokens": 2, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 1}}
        return ServerReply(200, json.dumps({"id": "x", "created": 5, "was": json.loads(body), "usage": usage}).encode())

    yield ask


def crashes(bench: Bench, log: Path, random: Random) -> int:
    """Resume from each possible state of the disk. Returns the number of states."""
    with log.open("wb") as file:
        bench.disk.disk_watch(str(bench.folder).encode(), file.fileno())
        assert bench.go() == 0
        bench.disk.disk_watch(b"/nowhere", -1)
    bench.want = bench.output.read_bytes()
    disk = Disk(str(bench.folder))
    states: list[tuple[str, Contents]] = []
    for number, call in enumerate(read_calls(log.read_bytes())):
        disk.do(call)
        where = f"after call {number} ({call.what} {Path(call.path).name})"
        kinds = {
            "killed": disk.killed(),
            "without power": disk.powerless(),
            "with new names": disk.renamed(),
            "torn": disk.torn(random),
        }
        states += [(f"{kind} {where}", contents) for kind, contents in kinds.items()]
    for where, contents in states:
        bench.clear(contents)
        bench.finish(where)
    return len(states)


def failing(bench: Bench, error: int, on: bool) -> int:
    """Let each call fail in turn, and then resume without failures. Returns the number of calls."""
    number = 0
    while True:
        bench.clear({})
        bench.disk.disk_watch(str(bench.folder).encode(), -1)
        bench.disk.disk_fail(number, error, on)
        status = bench.go()
        over = bench.disk.disk_calls() <= number
        bench.disk.disk_watch(b"/nowhere", -1)
        where = f"{errno.errorcode[error]} at call {number}"
        if status not in (0, 2, batch_run.EXIT_RETRY_LATER) and "SettingError" not in str(status):
            bench.wrong.append(f"{where}: {status}")
        bench.finish(f"after {where}")
        if over:
            return number
        number += 1


def flush_without_fsync(patch: pytest.MonkeyPatch) -> None:
    flushed: Callable[[Any], None] = lambda file: file.flush()  # noqa: E731
    patch.setattr(journal, "_fsync", flushed)


GATE = Gate(
    name="G8",
    goal="a batch: crashed after any call that changes a file, power lost, disk full, calls failing: the same bytes",
    unit="rows",
    commit=20,
    nightly=200,
    run=run,
    fault=Fault("the output is renamed before its contents are durable", "gate", flush_without_fsync),
    planted=6,
)

if __name__ == "__main__":
    main()
