"""Compiles the engine's kernels when the package is built or installed from its source.

An editable installation gets one library for each `src/afterword/engine/*/x.cpp`: `libx.so` beside it, compiled for
this machine. A wheel may be installed on another machine. It gets one library for each level of instructions of this
machine's architecture (`LEVEL_FLAGS`), from which the best one is chosen when the package is used
(src/afterword/engine/kernels/compiled.py). On other systems it gets one library for the compiler's oldest processor.

Where a compilation fails the package is installed without the library, the build shows the compiler's messages, and
slower code runs. Where the headers of ggml are installed beside llama-cpp-python, the declarations in ggml.hpp are
compared with them.

Environment variables:

- CXX: another compiler, with its first options.
- CXXFLAGS: one library for each source, compiled with these options instead of those for the processor or the levels.
- AFTERWORD_PLATFORM: the platform in the wheel's name, such as manylinux_2_28_x86_64. The libraries must run
  there, which `auditwheel show` tells.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

Choices = Sequence[Sequence[str]]
Job = tuple[Path, Path, Choices]
"""The arguments of `compile_library`."""

FOLDER = "src/afterword/engine"
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread")
# A machine without a compiler may have no C++ library, or an older one.
STATIC = ("-static-libstdc++", "-static-libgcc", "-Wl,-s")
LEVEL_FLAGS = {  # by machine: the names of levels in compiled.py, and the compiler's options
    "x86_64": {
        "x86-64-v3": ("-march=x86-64-v3",),
        "x86-64-v3-avxvnni": ("-march=x86-64-v3", "-mavxvnni"),
        "x86-64-v4": ("-march=x86-64-v4",),
        "x86-64-v4-avx512vnni": ("-march=x86-64-v4", "-mavx512vnni"),
    },
    "aarch64": {"armv8.2-a-dotprod": ("-march=armv8.2-a+dotprod",)},
}
NATIVE: Choices = (("-march=native",), ("-mcpu=native",), ())  # a compiler may refuse the first ones
PROCESSOR = "processor.cpp"  # tells the levels of a processor, so it must run on all
HEADERS = Path(sysconfig.get_path("platlib"), "include")
SHOWN_LINES = 20  # of the compiler's standard error


class KernelsHook(BuildHookInterface):  # type: ignore[type-arg]
    """Called by hatchling before it makes a wheel (`version` is "standard") or an editable install ("editable")."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        sources = sorted(Path(self.root, FOLDER).glob("*/*.cpp"))
        editable = version == "editable"
        # The source folder may hold the libraries of an editable install, so those of a wheel are made elsewhere.
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        jobs = [
            job for source in sources for job in (for_this_machine(source) if editable else for_wheel(source, folder))
        ]
        with ThreadPoolExecutor(os.cpu_count()) as compilers:
            errors = list(compilers.map(lambda job: compile_library(*job), jobs))
        for (source, target, _), error in zip(jobs, errors, strict=True):
            if error is not None:
                self.app.display_warning(f"{source.name} could not be compiled; slower code will be used.\n{error}")
            elif not editable:
                place = source.relative_to(Path(self.root, "src")).with_name(target.name)
                build_data["force_include"][str(target)] = place.as_posix()
        if None in errors:
            build_data["pure_python"] = False
            # The libraries do not use Python's interface.
            system = os.environ.get("AFTERWORD_PLATFORM") or sysconfig.get_platform()
            build_data["tag"] = f"py3-none-{system.replace('-', '_').replace('.', '_')}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        self._folder.cleanup()


def for_this_machine(source: Path) -> list[Job]:
    """The library of a source in an editable installation."""
    given = os.environ.get("CXXFLAGS")
    return [(source, source.with_name(f"lib{source.stem}.so"), NATIVE if given is None else [shlex.split(given)])]


def for_wheel(source: Path, folder: Path) -> list[Job]:
    """The libraries of a source in a wheel, made in `folder`."""
    given = os.environ.get("CXXFLAGS")
    levels = LEVEL_FLAGS.get(machine(), {}) if sys.platform == "linux" and given is None else {}
    if not levels or source.name == PROCESSOR:
        flags = shlex.split(given or "")
        return [(source, folder / f"lib{source.stem}.so", [[*flags, *STATIC], flags] if levels else [flags])]
    return [  # some systems have no static C++ library
        (source, folder / f"lib{source.stem}.{level}.so", [[*flags, *STATIC], flags]) for level, flags in levels.items()
    ]


def machine() -> str:
    """The architecture for which a wheel is made: that of AFTERWORD_PLATFORM, or this machine's."""
    system = os.environ.get("AFTERWORD_PLATFORM", "")
    return next((each for each in LEVEL_FLAGS if system.endswith(each)), platform.machine())


def compile_library(source: Path, target: Path, choices: Choices = NATIVE) -> str | None:
    """Compile one source. Returns None, or the last command that failed and the last lines of its standard error.

    `choices`: options that are tried in this order until the compiler accepts some.
    """
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    headers = ["-isystem", str(HEADERS), "-DAFTERWORD_GGML_HEADERS"] if (HEADERS / "ggml-backend.h").exists() else []
    target.unlink(missing_ok=True)
    error = ""
    for choice in choices:
        command = [*compiler, *FLAGS, *headers, *choice, "-o", str(target), str(source)]
        try:
            done = subprocess.run(command, capture_output=True, check=False, text=True, errors="replace")
        except OSError as problem:
            return f"{compiler[0]}: {problem.strerror}. Install a C++ compiler, or name one with CXX."
        if done.returncode == 0:
            return None
        lines = done.stderr.splitlines()[-SHOWN_LINES:]
        error = "\n".join([f"{shlex.join(command)} exited with status {done.returncode}:", *lines])
    return error
