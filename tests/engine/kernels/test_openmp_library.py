"""The library that takes the place of libgomp.so.1 where the system has none."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import afterword
from afterword.engine.kernels import compiled, openmp_library
from afterword.engine.llama import library

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in openmp_library.ARCHITECTURES, reason="no library is made here"
)
MACHINES = sorted(openmp_library.ARCHITECTURES)
ARM_LIBRARIES = Path("/usr/aarch64-linux-gnu")  # Debian's, for the emulator


def tool(machine: str, name: str) -> str:
    """A program of GCC or of binutils for a machine. Skips the test where it is not installed."""
    found = shutil.which(name if machine == platform.machine() else f"{machine}-linux-gnu-{name}")
    return found or pytest.skip(f"there is no {name} for {machine}")


def runner(machine: str) -> Sequence[str]:
    """The command before that of a machine's program. Skips the test where the program cannot be run."""
    if machine == platform.machine():
        return ()
    emulator = shutil.which(f"qemu-{machine}")
    if machine != "aarch64" or emulator is None or not ARM_LIBRARIES.is_dir():
        pytest.skip(f"programs for {machine} cannot be run")
    return (emulator, "-L", str(ARM_LIBRARIES))


@pytest.mark.parametrize("machine", MACHINES)
def test_the_machine_code_is_that_of_the_instructions(tmp_path: Path, machine: str) -> None:
    functions = openmp_library.ARCHITECTURES[machine].functions
    assert list(functions) == list(openmp_library.VERSIONS)
    parts = [f".balign {openmp_library.SLOT}, 0\n{each.assembly}\n" for each in functions.values()]
    source, made, code = (tmp_path / f"code.{end}" for end in ("s", "o", "bin"))
    source.write_text(f"start:\n{''.join(parts)}.set lock, start + {openmp_library.LOCK}\n", encoding="utf-8")
    subprocess.run([tool(machine, "as"), "-o", made, source], check=True)
    subprocess.run([tool(machine, "objcopy"), "-O", "binary", "-j", ".text", made, code], check=True)
    size = openmp_library.SLOT
    found = [code.read_bytes()[i * size : (i + 1) * size].rstrip(b"\0").hex() for i in range(len(functions))]
    assert found == [each.machine_code.rstrip(b"\0").hex() for each in functions.values()]


# What GCC makes of these constructs are calls of the functions.
PROGRAM = """
#include <omp.h>

#include <cstdio>
#include <initializer_list>
#include <thread>

long team(long threads) {  // the size of the team and the executions of the region
    long executed = 0;
    #pragma omp parallel num_threads(threads)
    executed += 100 * omp_get_num_threads() + 10 * omp_get_thread_num() + 1;
    return executed;
}

long singles(long threads, long rounds) {
    long count = 0;
    #pragma omp parallel num_threads(threads)
    for (int i = 0; i < rounds; i++) {
        #pragma omp single
        count++;
        #pragma omp barrier
    }
    return count;
}

long loop(long threads, long from, long to, long step) {  // the iterations of two loops
    long sum = 0;
    #pragma omp parallel num_threads(threads)
    for (int again = 0; again < 2; again++) {
        #pragma omp for schedule(dynamic, 3)
        for (long i = from; i < to; i += step) sum += 1000000 + i;
        #pragma omp barrier
    }
    return sum;
}

long down(long threads, long from) {
    long sum = 0;
    #pragma omp parallel num_threads(threads)
    {
        #pragma omp for schedule(dynamic, 2)
        for (long i = from; i > 0; i -= 3) sum += i;
        #pragma omp barrier
    }
    return sum;
}

long double updated = 0;  // of a type for which GCC calls GOMP_atomic_start

void updates(long threads, long rounds) {
    #pragma omp parallel num_threads(threads)
    for (int i = 0; i < rounds; i++) {
        #pragma omp atomic
        updated += 1;
    }
}

struct Bounds {
    long from, to, step;
};

const Bounds BOUNDS[] = {{0, 0, 1}, {0, 1, 1}, {5, 400, 7}, {-30, 200, 1}, {3, 2, 1}};

void check() {
    for (long threads : {1L, 2L, 5L}) {
        if (team(threads) != 101 || singles(threads, 100) != 100) std::puts("wrong: a region");
        for (auto [from, to, step] : BOUNDS) {
            long sum = 0;
            for (long i = from; i < to; i += step) sum += 2 * (1000000 + i);
            if (loop(threads, from, to, step) != sum) std::puts("wrong: a loop");
        }
        if (down(threads, 100) != 1717) std::puts("wrong: a loop with a negative step");
    }
    updates(2, 100000);
}

int main() {
    std::thread first(check), second(check);  // regions of two threads
    first.join(), second.join();
    if (updated != 200000) std::puts("wrong: lost updates");
    std::puts("done");
}
"""


@pytest.mark.parametrize("machine", MACHINES)
def test_the_constructs_of_openmp_work_with_it(tmp_path: Path, machine: str) -> None:
    source, program = tmp_path / "program.cpp", tmp_path / "program"
    source.write_text(PROGRAM, encoding="utf-8")
    flags = ["-std=c++17", "-O1", "-fopenmp"]
    made = subprocess.run(
        [tool(machine, "g++"), *flags, "-o", program, source], check=False, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    (tmp_path / "libgomp.so.1").write_bytes(openmp_library.library(openmp_library.ARCHITECTURES[machine]))
    command = [*runner(machine), str(program)]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr, done.returncode) == ("done\n", "", 0)


def test_other_systems_get_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmp_library.platform, "machine", lambda: "riscv64")
    assert openmp_library.load() is None


def test_where_no_code_can_be_loaded_from_memory_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: str) -> int:
        raise PermissionError

    monkeypatch.setattr(openmp_library.os, "memfd_create", refuse)
    assert openmp_library.load() is None


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
assert "memfd:openmp_library" in maps and "libgomp" not in maps, maps
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
