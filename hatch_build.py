"""Compiles the engine's kernels when the package is built or installed from its source.

Without a C++ compiler the package is installed all the same, and slower ways are used
(afterword/engine/kernels/compiled.py). CXX names another compiler. CXXFLAGS replace -march=native, for a package that
is to run on other machines.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = "src/afterword/engine"


class KernelsHook(BuildHookInterface):  # type: ignore[type-arg]
    """Puts `libx.so` beside each `x.cpp`."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before a wheel or an editable install is made."""
        for source in sorted(Path(self.root, FOLDER).glob("*/*.cpp")):
            target = source.with_name(f"lib{source.stem}.so")
            if compiled(source, target):
                build_data["artifacts"].append(target.relative_to(self.root).as_posix())
                build_data["pure_python"] = False
                build_data["infer_tag"] = True
            else:
                self.app.display_warning(f"No C++ compiler could build {source.name}: slower ways will be used.")


def compiled(source: Path, target: Path) -> bool:
    """Whether it could be compiled, with threads where the compiler has OpenMP."""
    compiler = os.environ.get("CXX", "c++")
    given = os.environ.get("CXXFLAGS")
    machines = [shlex.split(given)] if given is not None else [["-march=native"], ["-mcpu=native"], []]
    target.unlink(missing_ok=True)
    for threads in (["-fopenmp"], []):
        for machine in machines:
            flags = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread", *machine, *threads]
            command = [compiler, *flags, "-o", str(target), str(source)]
            try:
                done = subprocess.run(command, capture_output=True, check=False)
            except OSError:
                return False
            if done.returncode == 0:
                return True
    return False
