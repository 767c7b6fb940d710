"""Checks of the C++ kernels that need compilers: `python -m tests.kernels warnings | headers | sanitize | bits`.

- `warnings` compiles the sources with -Wall -Wextra -Werror for each installed compiler and several processors, and
  runs clang-tidy with the checks of `.clang-tidy`.
- `headers` compares ggml.hpp with the headers of ggml, which `make native` installs (ggml_checks.hpp).
- `sanitize` runs the drivers with the address, undefined-behaviour and thread sanitizers.
- `bits` runs the drivers compiled by each compiler for each processor and compares the hashes of all results. Where
  this Python has ziglang, Zig is one of the compilers: wheels are compiled with it (`make wheel ARGS=--bits`).

Missing programs are skipped, with a line that names them. The exit status is 1 where a check fails.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

DRIVERS = sorted(Path(__file__).parent.glob("*.cpp"))
KERNELS = Path(__file__).parent.parent.parent / "src/afterword/engine/kernels"
FLAGS = ("-std=c++17", "-pthread", "-ffp-contract=fast")
STRICT = ("-Wall", "-Wextra", "-Werror")
HEADERS = Path(sysconfig.get_path("platlib"), "include")  # of ggml, beside llama-cpp-python
CHECKED = ("-isystem", str(HEADERS), "-DAFTERWORD_GGML_HEADERS") if (HEADERS / "ggml-backend.h").exists() else ()
SHIPPED = (*FLAGS, *STRICT, "-O3")  # as hatch_build.py compiles them
TIMEOUT = 900  # seconds, of one command
_V3 = {"avx2", "fma", "f16c"}
_V4 = {*_V3, "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd"}
LEVELS = {  # as in hatch_build.py: the options, and what /proc/cpuinfo must list, so that this machine can run it
    "x86-64-v3": (("-march=x86-64-v3",), _V3),
    "x86-64-v3-avxvnni": (("-march=x86-64-v3", "-mavxvnni"), _V3 | {"avx_vnni"}),
    "x86-64-v4": (("-march=x86-64-v4",), _V4),
    "x86-64-v4-avx512vnni": (("-march=x86-64-v4", "-mavx512vnni"), _V4 | {"avx512_vnni"}),
}
ARM_COMPILER, ARM_FLAGS = "aarch64-linux-gnu-g++", ("-march=armv8.2-a+dotprod", "-static")
ARM_EMULATORS = ("qemu-aarch64-static", "qemu-aarch64")
ZIG = (sys.executable, str(KERNELS.parents[3] / "scripts" / "zig_compiler.py"), "x86_64-linux-gnu.2.28")
NATIVE = ("-march=native",) if platform.machine() in ("x86_64", "AMD64") else ()
SANITIZERS = {
    "address and undefined behaviour": ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    "threads": ("-fsanitize=thread",),
}
ABORTED = "a run of the thread pool began before the previous one had ended"


@dataclass(frozen=True)
class Build:
    """A way to compile and run the drivers. `missing` names missing programs, and is empty where it can run."""

    name: str
    compiler: tuple[str, ...]
    flags: tuple[str, ...]
    runner: tuple[str, ...] = ()
    missing: str = ""


def on_x86() -> bool:
    return platform.machine() in ("x86_64", "AMD64")


def processor_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return set(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def compilers() -> list[str]:
    """CXX alone if it is set, else GCC and Clang where they are installed."""
    named = os.environ.get("CXX")
    return [name for name in ([named] if named else ["g++", "clang++"]) if shutil.which(name)]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=TIMEOUT)


def failure(command: list[str], done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stdout + done.stderr).splitlines()[-40:]
    return "\n".join([f"exit status {done.returncode}: {shlex.join(command)}", *lines])


# ---- warnings


def warnings() -> bool:
    sources = [str(path) for path in sorted(KERNELS.glob("*.cpp"))]
    machines = [flags for flags, _ in LEVELS.values()] if on_x86() else [()]
    attempts = [(name, flags) for name in compilers() for flags in machines]
    if shutil.which(ARM_COMPILER):
        attempts.append((ARM_COMPILER, ARM_FLAGS[:1]))
    if not attempts:
        print("warnings: skipped, since no C++ compiler is installed")
    correct = True
    for compiler, flags in attempts:
        command = [compiler, *FLAGS, *STRICT, *CHECKED, *flags, "-fsyntax-only", *sources]
        done = run(command)
        correct = correct and done.returncode == 0
        print(f"warnings: {compiler} {' '.join(flags)}: {'none' if done.returncode == 0 else failure(command, done)}")
    return clang_tidy(sources, machines[0]) and correct


def clang_tidy(sources: list[str], machine: tuple[str, ...]) -> bool:
    if not shutil.which("clang-tidy"):
        print("warnings: clang-tidy: skipped, since it is not installed")
        return True
    command = ["clang-tidy", "--quiet", *sources, "--", *FLAGS, *machine]
    done = run(command)
    print(f"warnings: clang-tidy: {'none' if done.returncode == 0 else failure(command, done)}")
    return done.returncode == 0


# ---- headers


def headers() -> bool:
    compiler = next(iter(compilers()), None)
    if compiler is None or not CHECKED:
        print(
            f"headers: skipped, since {'the headers of ggml are' if compiler else 'no C++ compiler is'} not installed"
        )
        return True
    command = [compiler, *FLAGS, *CHECKED, *NATIVE, "-fsyntax-only", str(KERNELS / "accelerator.cpp")]
    done = run(command)
    print(f"headers: {'as declared in ggml.hpp' if done.returncode == 0 else failure(command, done)}")
    return done.returncode == 0


# ---- sanitizers


def sanitize(folder: Path, rounds: int) -> bool:
    correct = True
    compiler = next(iter(compilers()), None)
    for name, flags in SANITIZERS.items():
        if compiler is None or not works(compiler, flags, folder):
            print(
                f"sanitize: {name}: skipped, since {compiler or 'no C++ compiler'} cannot build and run with {flags[0]}"
            )
            continue
        binary = str(folder / flags[0].strip("-"))
        # -O0: optimized code would take several times as long to compile. OpenMP is left out: its library is not
        # instrumented, so the thread sanitizer would report its synchronization as races.
        build = [compiler, *FLAGS, *NATIVE, "-O0", "-g", *flags, "-o", binary, *map(str, DRIVERS)]
        for command in (build, [binary, "3", str(rounds)]):
            done = run(command)
            if done.returncode:
                print(f"sanitize: {name}: {failure(command, done)}")
                correct = False
                break
        else:
            nested = run([binary, "2", "1", "nested"])
            refused = nested.returncode != 0 and ABORTED in nested.stderr
            correct = correct and refused
            count = len(done.stdout.splitlines())
            print(f"sanitize: {name}: no errors in {count} computations with 1 to 3 threads, {rounds} rounds")
            if not refused:
                print("sanitize: a nested run of the thread pool was not refused")
    return correct


def works(compiler: str, flags: tuple[str, ...], folder: Path) -> bool:
    source, binary = folder / "empty.cpp", str(folder / "empty")
    source.write_text("int main() {}\n", encoding="utf-8")
    return run([compiler, *flags, "-o", binary, str(source)]).returncode == 0 and run([binary]).returncode == 0


# ---- bits


def builds() -> list[Build]:
    made = []
    here = processor_flags()
    for compiler, (command, absent) in commands().items():
        if on_x86():
            for level, (flags, needed) in LEVELS.items():
                lacks = ", ".join(sorted(needed - here))
                missing = absent or (f"this processor lacks {lacks}" if lacks else "")
                made.append(Build(f"{compiler} {level}", command, flags, missing=missing))
        else:
            made.append(Build(f"{compiler} native", command, ("-mcpu=native",), missing=absent))
    if on_x86():
        emulator = next(filter(shutil.which, ARM_EMULATORS), None)
        absent = [name for name in (ARM_COMPILER, emulator or "qemu-user") if not shutil.which(name)]
        missing = f"{' and '.join(absent)} not installed" if absent else ""
        runner = (emulator or "", "-cpu", "max")
        made.append(Build("g++ armv8.2-a+dotprod under qemu", (ARM_COMPILER,), ARM_FLAGS, runner, missing))
    return made


def commands() -> dict[str, tuple[tuple[str, ...], str]]:
    """The compilers of `bits` by name: the command, and why it cannot be used, or ""."""
    installed = compilers()
    names = installed if os.environ.get("CXX") else ["g++", "clang++"]
    found = {name: ((name,), "" if name in installed else f"{name} is not installed") for name in names}
    if on_x86() and not os.environ.get("CXX"):
        found["zig"] = (ZIG, "" if find_spec("ziglang") else "this Python has no ziglang")
    return found


def bits(folder: Path) -> bool:
    hashes: dict[str, dict[str, str]] = {}
    correct = True
    for number, build in enumerate(builds()):
        if build.missing:
            print(f"bits: {build.name}: skipped, since {build.missing}")
            continue
        binary = str(folder / f"driver-{number}")
        compile_command = [*build.compiler, *SHIPPED, *build.flags, "-o", binary, *map(str, DRIVERS)]
        for command in (compile_command, [*build.runner, binary, "2", "1"]):
            done = run(command)
            if done.returncode:
                print(f"bits: {build.name}: {failure(command, done)}")
                correct = False
                break
        else:
            found = hashes[build.name] = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())
            first, expected = next(iter(hashes.items()))
            names = [name for name in expected | found if expected.get(name) != found.get(name)]
            correct = correct and not names
            print(f"bits: {build.name}: {len(found)} results" + (f"; other than {first}:" if names else ""), flush=True)
            for name in names:
                print(f"  {name}: {found.get(name, 'none')}, not {expected.get(name, 'none')}")
    if correct and hashes:
        print(f"bits: all equal ({len(hashes)} builds)" if len(hashes) > 1 else "bits: nothing to compare (1 build)")
    return correct


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kernels", description=__doc__)
    parser.add_argument("check", choices=("warnings", "headers", "sanitize", "bits"))
    parser.add_argument("--rounds", type=int, default=3, help="how often each computation is repeated by `sanitize`")
    options = parser.parse_args()
    if options.check in ("warnings", "headers"):
        return not (warnings() if options.check == "warnings" else headers())
    with tempfile.TemporaryDirectory() as folder:
        return not (sanitize(Path(folder), options.rounds) if options.check == "sanitize" else bits(Path(folder)))


if __name__ == "__main__":
    sys.exit(main())
