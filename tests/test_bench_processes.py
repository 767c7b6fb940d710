"""The servers that measurements start are ended with all that they have started, and never hide an error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent))

from bench.process_tree import ending

PARENT = "import subprocess, sys; print(subprocess.Popen(['sleep', '100']).pid, flush=True); sys.stdin.read()"


def test_a_process_is_ended_with_those_that_it_has_started() -> None:
    command = [sys.executable, "-c", PARENT]
    with ending(psutil.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)) as process:
        child = psutil.Process(int(process.stdout.readline()))
        assert child.is_running()
    assert process.returncode is not None
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_a_process_that_has_died_does_not_hide_the_error() -> None:
    def fails() -> None:
        with ending(psutil.Popen([sys.executable, "-c", "raise SystemExit(1)"])) as process:
            process.wait()
            raise RuntimeError("did not answer")

    with pytest.raises(RuntimeError, match="did not answer"):
        fails()
