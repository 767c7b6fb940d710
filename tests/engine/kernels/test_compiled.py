"""Which file of compiled kernels is loaded, and which levels of instructions a processor has."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from afterword.engine.kernels import compiled
from afterword.engine.llama import accelerator

CPUINFO = Path("/proc/cpuinfo")
SOURCE = compiled.KERNELS / "processor.cpp"
COMPILER = shutil.which("c++")
EMULATOR = next(filter(None, map(shutil.which, ("qemu-x86_64-static", "qemu-x86_64"))), None)
ON_X86 = platform.machine() == "x86_64"
V3 = {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"}  # as Linux names them
V4 = V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
NEEDED = {
    **{"x86-64-v3": V3, "x86-64-v3-avxvnni": V3 | {"avx_vnni"}},
    **{"x86-64-v4": V4, "x86-64-v4-avx512vnni": V4 | {"avx512_vnni"}},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for level in ("x86-64-v3", "x86-64-v4", "armv8.2-a-dotprod"):
        (tmp_path / f"libkernel.{level}.so").write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        (("x86-64-v3",), "libkernel.x86-64-v3.so"),
        (("x86-64-v3", "x86-64-v3-avxvnni"), "libkernel.x86-64-v3.so"),
        (("x86-64-v3", "x86-64-v4", "x86-64-v4-avx512vnni"), "libkernel.x86-64-v4.so"),
        (("armv8.2-a-dotprod",), "libkernel.armv8.2-a-dotprod.so"),
    ],
)
def test_the_best_file_that_the_processor_can_execute_is_chosen(
    folder: Path, monkeypatch: pytest.MonkeyPatch, levels: tuple[str, ...], expected: str
) -> None:
    monkeypatch.setattr(compiled, "processor_levels", lambda: levels)
    assert compiled.library(folder / "kernel.cpp") == folder / expected


def test_no_file_is_chosen_for_a_processor_without_any_level(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "processor_levels", lambda: ())
    assert not compiled.library(folder / "kernel.cpp").exists()


@pytest.mark.parametrize(
    ("files", "levels", "expected"),
    [
        ((), (), "the installation has none"),
        (("libprocessor.so",), ("x86-64-v3",), "the installation has none"),
        (("libprocessor.so",), (), "the installation has none for processors below x86-64-v3"),
    ],
)
def test_the_reason_tells_a_missing_file_from_an_old_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: tuple[str, ...], levels: tuple[str, ...], expected: str
) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"")
    monkeypatch.setattr(compiled, "KERNELS", tmp_path)
    monkeypatch.setattr(compiled, "processor_levels", lambda: levels)
    monkeypatch.setattr(compiled.platform, "machine", lambda: "x86_64")
    assert compiled.why_missing() == expected


def test_a_file_that_was_compiled_for_this_machine_comes_first(folder: Path) -> None:
    (folder / "libkernel.so").write_bytes(b"")
    assert compiled.library(folder / "kernel.cpp") == folder / "libkernel.so"


@pytest.mark.skipif(not (ON_X86 and CPUINFO.exists()), reason="needs an x86-64 processor and Linux")
@pytest.mark.skipif(not (compiled.KERNELS / "libprocessor.so").exists(), reason="the library was not compiled")
def test_the_levels_are_those_that_linux_reports() -> None:
    lines = CPUINFO.read_text(encoding="ascii").splitlines()
    flags = set(next(line.partition(":")[2] for line in lines if line.startswith("flags")).split())
    assert compiled.processor_levels() == tuple(level for level, needed in NEEDED.items() if needed <= flags)


@pytest.mark.skipif(not ON_X86 or COMPILER is None or EMULATOR is None, reason="needs a compiler and qemu for x86-64")
@pytest.mark.parametrize(("processor", "expected"), [("Nehalem", 0), ("IvyBridge", 0), ("Haswell", 1), ("EPYC", 1)])
def test_levels_of_emulated_processors(tmp_path: Path, processor: str, expected: int) -> None:
    main, program = tmp_path / "main.cpp", tmp_path / "levels"
    main.write_text('extern "C" unsigned processor_levels();\nint main() { return (int)processor_levels(); }\n')
    subprocess.run([str(COMPILER), "-static", "-o", program, main, SOURCE], check=True)
    done = subprocess.run([str(EMULATOR), "-cpu", processor, program], check=False, capture_output=True, timeout=60)
    assert done.returncode == expected


@pytest.mark.parametrize("alone", [False, True])
def test_a_loop_runs_on_the_threads_of_llama_cpp_or_on_the_pool(accelerator_library: ctypes.CDLL, alone: bool) -> None:
    assert accelerator_library
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int)
    run = ctypes.CFUNCTYPE(None, ctypes.c_int, call, ctypes.c_void_p)(accelerator.use_thread_pool(alone))
    threads: list[int] = []
    collect = call(lambda work, thread: threads.append(thread))
    try:
        run(3, collect, None)
        run(0, collect, None)
    finally:
        accelerator.use_thread_pool(alone=False)
    assert threads.count(0) == 1
    assert len(threads) == len(set(threads)) <= 3
    if not alone and accelerator._address("GOMP_parallel"):
        assert sorted(threads) == [0, 1, 2], "OpenMP waits for all threads"
