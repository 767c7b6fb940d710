"""Afterword's OpenMP functions, which take the place of libgomp.so.1 where the system has none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import afterword
from afterword.engine.kernels import compiled
from afterword.engine.llama import library

COMPILER = shutil.which(os.environ.get("CXX") or "c++")
pytestmark = pytest.mark.skipif(not compiled.OPENMP.exists(), reason="the library was not compiled")

# What GCC makes of these constructs are calls of the functions.
PROGRAM = """
#include <omp.h>

extern "C" long team(long threads) {  // the size of the team and the executions of the region
    long executed = 0;
    #pragma omp parallel num_threads(threads)
    executed += 100 * omp_get_num_threads() + 10 * omp_get_thread_num() + 1;
    return executed;
}

extern "C" long singles(long threads, long rounds) {
    long count = 0;
    #pragma omp parallel num_threads(threads)
    for (int i = 0; i < rounds; i++) {
        #pragma omp single
        count++;
        #pragma omp barrier
    }
    return count;
}

extern "C" long loop(long threads, long from, long to, long step) {  // the iterations of two loops
    long sum = 0;
    #pragma omp parallel num_threads(threads)
    for (int again = 0; again < 2; again++) {
        #pragma omp for schedule(dynamic, 3)
        for (long i = from; i < to; i += step) sum += 1000000 + i;
        #pragma omp barrier
    }
    return sum;
}

extern "C" long down(long threads, long from) {
    long sum = 0;
    #pragma omp parallel num_threads(threads)
    {
        #pragma omp for schedule(dynamic, 2)
        for (long i = from; i > 0; i -= 3) sum += i;
        #pragma omp barrier
    }
    return sum;
}

extern "C" long updates(long threads, long rounds) {  // a type for which GCC calls GOMP_atomic_start
    static long double sum = 0;
    #pragma omp parallel num_threads(threads)
    for (int i = 0; i < rounds; i++) {
        #pragma omp atomic
        sum += 1;
    }
    return (long)sum;
}
"""

CHECK = """
import ctypes, sys, threading
ctypes.CDLL(sys.argv[1])
program = ctypes.CDLL(sys.argv[2])
for name, count in {"team": 1, "singles": 2, "loop": 4, "down": 2, "updates": 2}.items():
    function = getattr(program, name)
    function.restype, function.argtypes = ctypes.c_long, [ctypes.c_long] * count

failed = []
def check():
    try:
        for threads in (1, 2, 5):
            assert program.team(threads) == 101
            assert program.singles(threads, 100) == 100
            for bounds in ((0, 0, 1), (0, 1, 1), (5, 400, 7), (-30, 200, 1), (3, 2, 1)):
                assert program.loop(threads, *bounds) == 2 * sum(1000000 + i for i in range(*bounds)), bounds
            assert program.down(threads, 100) == sum(range(100, 0, -3))
        program.updates(2, 100_000)
    except Exception as error:
        failed.append(error)

threads = [threading.Thread(target=check) for _ in range(2)]  # regions of two threads
for each in threads: each.start()
for each in threads: each.join()
assert not failed, failed
assert program.updates(2, 0) == 200_000
maps = open("/proc/self/maps").read()
assert "libgomp" not in maps and "libopenmp_runtime" in maps
print("right")
"""


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_the_constructs_of_openmp_work_with_it(tmp_path: Path) -> None:
    source, program = tmp_path / "program.cpp", tmp_path / "program.so"
    source.write_text(PROGRAM, encoding="utf-8")
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-fopenmp"]
    made = subprocess.run([str(COMPILER), *flags, "-o", program, source], check=False, capture_output=True, text=True)
    if made.returncode or b"libgomp.so.1" not in program.read_bytes():
        pytest.skip("the compiler does not use libgomp")
    command = [sys.executable, "-c", CHECK, str(compiled.OPENMP), str(program)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.stdout == "right\n", done.stderr


WITHOUT_LIBGOMP = """
import ctypes
found = ctypes.CDLL
def without_libgomp(name, *more):
    if name == "libgomp.so.1":
        raise OSError("libgomp.so.1: cannot open shared object file: No such file or directory")
    return found(name, *more)
ctypes.CDLL = without_libgomp
"""

LOAD = """
from afterword.engine.llama.library import native
assert native.llama_version()
maps = open("/proc/self/maps").read()
assert "libopenmp_runtime" in maps and "libgomp" not in maps, maps
print("right")
"""


def with_prebuilt() -> dict[str, str]:
    """The environment of a process that loads the prebuilt library. Skips the test if there is none."""
    prebuilt = [file for folder in library._package("xllamacpp") for file in folder.glob("xllamacpp*.so")]
    if not prebuilt or not compiled.processor_levels():
        pytest.skip("there is no prebuilt library for this processor")
    return {**os.environ, library.VARIABLE: str(prebuilt[0])}


def test_the_prebuilt_library_loads_with_it_where_the_system_has_no_libgomp() -> None:
    command = [sys.executable, "-c", WITHOUT_LIBGOMP + LOAD]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120, env=with_prebuilt())
    assert done.stdout == "right\n", done.stderr


SITE = """
import pathlib, sys
if "afterword.engine.llama" in sys.orig_argv:  # the worker
    from afterword.engine.llama import accelerator
    accelerator.LIBRARY = pathlib.Path("none")  # so that llama.cpp computes everything
"""


def test_a_model_writes_the_same_text_and_the_start_says_what_is_missing(tmp_path: Path) -> None:
    texts = []
    for before in ("", WITHOUT_LIBGOMP):
        (tmp_path / "sitecustomize.py").write_text(before + SITE, encoding="utf-8")
        sources = str(Path(afterword.__file__).parent.parent)
        environment = {**with_prebuilt(), "PYTHONPATH": os.pathsep.join([str(tmp_path), sources])}
        options = ["--threads", "3", "--temperature", "0", "--max-tokens", "40"]
        command = [sys.executable, "-m", "afterword", "complete", *options, "Once upon a time"]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=240, env=environment)
        assert done.returncode == 0, done.stderr
        assert ("apt-get install libgomp1" in done.stderr) == bool(before)
        texts.append(done.stdout)
    assert texts[0] == texts[1]
    assert len(texts[0]) > 60
