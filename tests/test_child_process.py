"""Tests of how processes that tests start end with them."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import suppress
from subprocess import PIPE

import psutil
import pytest

PARENT = """
import subprocess, sys
from tests.child_process import ending_with_tests

child = subprocess.Popen(ending_with_tests(["sleep", "100"]), start_new_session=True)
print(child.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is a call of Linux")
def test_a_process_in_its_own_session_ends_when_the_tests_are_killed(pytestconfig):
    command = [sys.executable, "-c", PARENT]
    with subprocess.Popen(command, cwd=pytestconfig.rootpath, stdin=PIPE, stdout=PIPE, text=True) as parent:
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    deadline = time.monotonic() + 60
    with suppress(psutil.NoSuchProcess):
        while child.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.01)
