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

# What GCC makes of these constructs are calls of the functions. Each check returns a number that Python knows.
PROGRAM = """
#include <atomic>
#include <omp.h>

extern "C" long places(long threads) {  // each number of a thread once, and the size of the team
    std::atomic<long> seen{0};
    #pragma omp parallel num_threads(threads)
    seen += (1l << omp_get_thread_num()) + (omp_get_num_threads() == threads ? 0 : 1l << 40);
    return seen;
}

extern "C" long singles(long threads, long rounds) {  // each of them is executed by one thread, and all see its result
    long count = 0;
    std::atomic<long> wrong{0};
    #pragma omp parallel num_threads(threads)
    for (int i = 1; i <= rounds; i++) {
        #pragma omp single
        count++;
        if (count != i) wrong++;
        #pragma omp barrier
    }
    return wrong ? -wrong : count;
}

extern "C" long loop(long threads, long from, long to, long step) {  // the iterations of two loops
    std::atomic<long> sum{0};
    #pragma omp parallel num_threads(threads)
    for (int again = 0; again < 2; again++) {
        long mine = 0;
        #pragma omp for schedule(dynamic, 3)
        for (long i = from; i < to; i += step) mine += 1000000 + i;
        sum += mine;
        #pragma omp barrier
    }
    return sum;
}

extern "C" long down(long threads, long from) {
    std::atomic<long> sum{0};
    #pragma omp parallel num_threads(threads)
    #pragma omp for schedule(dynamic, 2)
    for (long i = from; i > 0; i -= 3) sum += i;
    return sum;
}

extern "C" long updates(long threads) {  // a type for which GCC calls GOMP_atomic_start
    long double sum = 0;
    #pragma omp parallel num_threads(threads)
    for (int i = 0; i < 500; i++) {
        #pragma omp atomic
        sum += 1;
    }
    return (long)sum;
}

extern "C" long nested(long threads) {  // an inner region has one thread, and the outer place is there again afterwards
    std::atomic<long> right{0};
    #pragma omp parallel num_threads(threads)
    {
        const int outer = omp_get_thread_num();
        #pragma omp parallel num_threads(3)
        if (omp_get_thread_num() == 0 && omp_get_num_threads() == 1) right++;
        if (omp_get_thread_num() == outer) right++;
    }
    return right + omp_get_num_threads() * 1000;
}
"""

CHECK = """
import ctypes, sys, threading
ctypes.CDLL(sys.argv[1])
program = ctypes.CDLL(sys.argv[2])
for name, count in {"places": 1, "singles": 2, "loop": 4, "down": 2, "updates": 1, "nested": 1}.items():
    function = getattr(program, name)
    function.restype, function.argtypes = ctypes.c_long, [ctypes.c_long] * count

def check():
    for threads in (1, 2, 5, 3, 8, 1, 2):
        for _ in range(20):
            assert program.places(threads) == (1 << threads) - 1
        assert program.singles(threads, 100) == 100
        for bounds in ((0, 0, 1), (0, 1, 1), (5, 400, 7), (-30, 200, 1)):
            assert program.loop(threads, *bounds) == 2 * sum(1000000 + i for i in range(*bounds)), bounds
        assert program.down(threads, 100) == sum(range(100, 0, -3))
        assert program.updates(threads) == 500 * threads
        assert program.nested(threads) == 2 * threads + 1000

check()
failed = []
threading.excepthook = lambda told: failed.append(told.exc_value)
both = [threading.Thread(target=check) for _ in range(2)]  # regions of two threads
for each in both: each.start()
for each in both: each.join()
assert not failed, failed
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


LOAD = """
import ctypes, sys
found = ctypes.CDLL
def without_libgomp(name, *more):
    if name == "libgomp.so.1":
        raise OSError("libgomp.so.1: cannot open shared object file: No such file or directory")
    return found(name, *more)
ctypes.CDLL = without_libgomp
from afterword.engine.llama.library import native
assert native.llama_version()
maps = open("/proc/self/maps").read()
assert "libopenmp_runtime" in maps and "libgomp" not in maps, maps
print("right")
"""


def test_the_prebuilt_library_loads_with_it_where_the_system_has_no_libgomp() -> None:
    prebuilt = [file for folder in library._package("xllamacpp") for file in folder.glob("xllamacpp*.so")]
    if not prebuilt or not compiled.processor_levels():
        pytest.skip("there is no prebuilt library for this processor")
    environment = {**os.environ, library.VARIABLE: str(prebuilt[0])}
    command = [sys.executable, "-c", LOAD]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120, env=environment)
    assert done.stdout == "right\n", done.stderr


SITE = """
import ctypes, pathlib, sys
if "afterword.engine.llama" in sys.orig_argv:  # the worker
    if {openmp!r}:
        ctypes.CDLL({openmp!r})
    from afterword.engine.llama import accelerator
    accelerator.LIBRARY = pathlib.Path("none")  # so that llama.cpp computes everything, on several threads
"""


@pytest.mark.slow
@pytest.mark.timeout(480)
def test_the_model_writes_the_same_text_with_it(tmp_path: Path) -> None:
    texts = []
    for openmp in ("", str(compiled.OPENMP)):
        (tmp_path / "sitecustomize.py").write_text(SITE.format(openmp=openmp), encoding="utf-8")
        sources = str(Path(afterword.__file__).parent.parent)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), sources])}
        options = ["--threads", "2", "--temperature", "0", "--max-tokens", "12"]
        command = [sys.executable, "-m", "afterword", "complete", *options, "Once upon a time"]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=240, env=environment)
        assert done.returncode == 0, done.stderr
        assert "kernels are not used" in done.stderr
        texts.append(done.stdout)
    assert texts[0] == texts[1]
    assert len(texts[0]) > 20
