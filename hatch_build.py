"""Compiles the engine's kernels when the package is built or installed from its source.

Each `src/afterword/engine/*/x.cpp` becomes `libx.so` beside it. Where that fails the package is installed without the
library, the build shows the compiler's messages, and slower code runs (src/afterword/engine/kernels/compiled.py).

Where the headers of ggml are installed beside llama-cpp-python, the declarations in ggml.hpp are compared with them.

Environment variables: CXX names another compiler. CXXFLAGS replaces -march=native, for a package that will run on
other machines.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = "src/afterword/engine"
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread")
HEADERS = Path(sysconfig.get_path("platlib"), "include")
SHOWN_LINES = 20  # of the compiler's standard error


class KernelsHook(BuildHookInterface):  # type: ignore[type-arg]
    """Called by hatchling before it makes a wheel or an editable install."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        for source in sorted(Path(self.root, FOLDER).glob("*/*.cpp")):
            target = source.with_name(f"lib{source.stem}.so")
            error = compile_library(source, target)
            if error is None:
                build_data["artifacts"].append(target.relative_to(self.root).as_posix())
                build_data["pure_python"] = False
                build_data["infer_tag"] = True
            else:
                self.app.display_warning(f"{source.name} could not be compiled; slower code will be used.\n{error}")


def compile_library(source: Path, target: Path) -> str | None:
    """Compile one source. Returns None, or the command that failed and the last lines of its standard error.

    A compiler may refuse the flags for this processor or for OpenMP, so they are left out one after the other. The
    returned error is the last one: the flags that remain then are those that every compiler knows.
    """
    compiler = os.environ.get("CXX", "c++")
    given = os.environ.get("CXXFLAGS")
    machines = [shlex.split(given)] if given is not None else [["-march=native"], ["-mcpu=native"], []]
    headers = ["-isystem", str(HEADERS), "-DAFTERWORD_GGML_HEADERS"] if (HEADERS / "ggml-backend.h").exists() else []
    target.unlink(missing_ok=True)
    error = ""
    for threads in (["-fopenmp"], []):
        for machine in machines:
            command = [compiler, *FLAGS, *headers, *machine, *threads, "-o", str(target), str(source)]
            try:
                done = subprocess.run(command, capture_output=True, check=False, text=True, errors="replace")
            except OSError as problem:
                return f"{compiler}: {problem.strerror}. Install a C++ compiler, or name one with CXX."
            if done.returncode == 0:
                return None
            lines = done.stderr.splitlines()[-SHOWN_LINES:]
            error = "\n".join([f"{shlex.join(command)} exited with status {done.returncode}:", *lines])
    return error
