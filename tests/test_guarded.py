"""Tests of the guard around vLLM's server in `make vllm`, with other commands in its place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.with_vllm.guarded import guarded

LEAVES = ("/bin/sh", "-c", "sleep 100000 & echo $!")
STARTS = ("/bin/sh", "-c", "sleep 100000 & echo $!; wait")
ENDS_IN_ORDER = ("/bin/sh", "-c", "trap 'echo ended; exit' TERM; echo begun; while :; do sleep 0.01; done")
PARENT = f"""
import time
from tests.with_vllm.guarded import guarded
with guarded({STARTS}):
    time.sleep(100000)
"""

pytestmark = [pytest.mark.timeout(60), pytest.mark.skipif(os.name != "posix", reason="needs process groups")]


def wait_ended(pid: int) -> None:
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)


def test_nothing_is_left_when_the_parent_is_killed() -> None:
    root = Path(__file__).parents[1]
    with subprocess.Popen([sys.executable, "-c", PARENT], cwd=root, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        os.kill(parent.pid, signal.SIGKILL)
        wait_ended(pid)


def test_nothing_is_left_by_a_command_that_has_ended() -> None:
    with guarded(LEAVES, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        wait_ended(pid)


def test_a_command_ends_in_order() -> None:
    with guarded(ENDS_IN_ORDER, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        process.send_signal(signal.SIGTERM)  # the guard alone ignores it
        os.killpg(process.pid, signal.SIGTERM)
        assert process.stdout.readline() == b"ended\n"


def test_the_failure_of_a_command_is_not_hidden() -> None:
    """vLLM's server may end before it answers: then the test says what the server has said."""
    with pytest.raises(LookupError, match="did not start"):
        fail_after_the_end_of([sys.executable, "-c", ""])


def fail_after_the_end_of(command: list[str]) -> None:
    with guarded(command) as process:
        process.wait()
        raise LookupError("it did not start")
