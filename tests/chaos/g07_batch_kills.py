"""G7: a batch is killed at random moments and resumed; its output has the bytes of an undisturbed run.

Every second run sends its lines to a server instead of running the model; the output must be the same. The batch has
2,000 lines with twenty kills or more, else 300.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from afterword.batch.input_lines import BatchRequest

from . import ROOT
from .gate import Fault, Gate, Result, Trial
from .server import Server

_TIMEOUT = 600  # seconds for one command
_SHAPE = ("--parallel", "8", "--context", "128")
_DONE_EARLY = 4  # upper bound of starts per kill
_CREATED = "1700000000"


def run(trial: Trial) -> Result:
    rows = 2000 if trial.size >= 20 else 300
    random = Random(trial.seed)
    with tempfile.TemporaryDirectory() as temporary, trial.serve(*_SHAPE) as server:
        folder = Path(temporary)
        source = folder / "in.jsonl"
        source.write_text("".join(f"{_row(random, row)}\n" for row in range(rows)))
        start = time.monotonic()
        _finished(_start(trial, source, folder / "whole.jsonl", None))
        whole = time.monotonic() - start
        want = (folder / "whole.jsonl").read_bytes()
        seen, jobs = _killed(trial, source, folder, server, whole)
        outputs = [(folder / f"{job}.jsonl").read_bytes() for job in range(jobs)]
    lines = [output.splitlines() for output in outputs]
    lost = sum(rows - len(set(each)) for each in lines)
    repeated = sum(len(each) - len(set(each)) for each in lines)
    other = sum(output != want for output in outputs)
    return Result(
        not (lost or repeated or other) and seen.total() == trial.size,
        {
            "rows": rows,
            "jobs": jobs,
            "killed before, during, after the lines": "{}, {}, {}".format(
                *(seen[at] for at in ("start", "rows", "end"))
            ),
            "lost": lost,
            "repeated": repeated,
            "different outputs": other,
            "s undisturbed": whole,
        },
    )


def _killed(trial: Trial, source: Path, folder: Path, server: Server, whole: float) -> tuple[Counter[str], int]:
    """Kill a batch `trial.size` times. Returns the phases of the kills, and the number of batches that ran."""
    random, seen, job = Random(trial.seed), Counter[str](), 0
    share = max(0.5, 2 * whole / max(trial.size, 1))  # upper bound of its life in seconds, after it began
    for number in range(_DONE_EARLY * trial.size):
        trial.say(f"G7 {number}")
        output = folder / f"{job}.jsonl"
        journal = output.with_name(output.name + ".journal")
        before = _changed(journal)
        process = _start(trial, source, output, server if number % 2 else None)
        if number % 3:  # every third time it may be killed before the first line
            _until(lambda process=process, journal=journal, before=before: _busy(process, journal, before))
        try:
            process.wait(random.uniform(0, share))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            ended = output.exists() or output.with_name(output.name + ".part").exists()
            seen["end" if ended else "rows" if _changed(journal) != before else "start"] += 1
            if seen.total() == trial.size:
                break
        else:
            assert process.returncode == 0, process.communicate()[1]
            job += 1
    _finished(_start(trial, source, folder / f"{job}.jsonl", None))
    return seen, job + 1


def _changed(journal: Path) -> int:
    """The time of the last change of the journal, in nanoseconds; 0 without a journal."""
    return journal.stat().st_mtime_ns if journal.exists() else 0


def _busy(process: subprocess.Popen[str], journal: Path, before: int) -> bool:
    return process.poll() is not None or _changed(journal) != before


def _until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + _TIMEOUT
    while not holds():
        assert time.monotonic() < end, "a batch hangs"
        time.sleep(0.01)


def _start(trial: Trial, source: Path, output: Path, server: Server | None) -> subprocess.Popen[str]:
    flags = ["--planted", trial.planted] if trial.planted else []
    where = ["--url", server.url] if server else list(_SHAPE)
    command = [sys.executable, "-m", "tests.chaos.serve", *flags, "batch", str(source), "-o", str(output), *where]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AFTERWORD_")}
    environment |= {"SOURCE_DATE_EPOCH": _CREATED, "NO_PROXY": "127.0.0.1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def _finished(process: subprocess.Popen[str]) -> None:
    try:
        _, stderr_bytes = process.communicate(timeout=_TIMEOUT)
    finally:
        process.kill()
    assert process.returncode == 0, stderr_bytes


def _row(random: Random, row: int) -> str:
    """A line of input: with or without a seed, with or without the batch envelope, some invalid in several ways."""
    beginning = random.choice(("Once upon a time there was", "def read(path):", "The sea was"))
    body = {"prompt": f"{beginning} {random.getrandbits(16)}", "max_tokens": random.randint(2, 8), "n": 1}
    if row % 3 == 0:
        body["seed"] = random.getrandbits(31)
    match row % 25:
        case 7:
            return "{no"
        case 11:
            body["n"] = 0
        case 13:
            body |= {"n": 2, "logprobs": 1}
    if row % 2:
        return json.dumps(body)
    name = "again" if row % 50 == 20 else f"row {row}"
    return json.dumps({"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body})


def draw_random_seeds(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BatchRequest, "seed", property(lambda _: int.from_bytes(os.urandom(3))))


GATE = Gate(
    name="G7",
    goal="a batch that is killed at random moments and resumed has each line once and an undisturbed run's bytes",
    unit="kills",
    commit=5,
    nightly=200,
    run=run,
    fault=Fault("a line without a seed gets a random one", "server", draw_random_seeds),
    planted=1,
)
