"""The kernels' thread pool: its runs come one after the other."""

from __future__ import annotations

import subprocess
import sys

from afterword.engine.llama import accelerator

NESTED = """
import ctypes, sys
kernels = ctypes.CDLL(sys.argv[1])
kernels.accelerator_use_thread_pool.restype = ctypes.c_void_p
Call = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.c_int)
run = ctypes.CFUNCTYPE(None, ctypes.c_int, Call, ctypes.c_void_p)(kernels.accelerator_use_thread_pool(1))
inner = Call(lambda work, thread: 0)
outer = Call(lambda work, thread: run(1, inner, None) or 0)
run(1, inner, None)
run(1, inner, None)
print("two runs after each other", flush=True)
run(1, outer, None)
"""


def test_a_run_inside_another_one_ends_the_process(accelerator_library):
    command = [sys.executable, "-c", NESTED, str(accelerator.LIBRARY)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "two runs after each other\n"
    assert done.returncode < 0
    assert "a run of the thread pool began before the previous one had ended" in done.stderr
