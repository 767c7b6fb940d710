"""What `make serve` looks for before it sets anything up."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAKE = shutil.which("make")
pytestmark = pytest.mark.skipif(MAKE is None or sys.platform != "linux", reason="needs make, on Linux")


def serve(folder: Path, has_libgomp: bool, compiler: str, **environment: str) -> tuple[str, bool]:
    """What `make serve` prints, and whether it begins to make an environment, which then fails."""
    log, python = folder / "log", folder / "python"
    status = 0 if has_libgomp else 1
    python.write_text(
        f'#!/bin/sh\necho "$*" >> {log}\ncase "$*" in *libgomp*) exit {status};; *venv*) exit 9;; esac\n',
        encoding="utf-8",
    )
    python.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name not in ("AFTERWORD_LLAMA", "MAKEFLAGS")}
    command = [str(MAKE), "-C", str(ROOT), "serve", f"PYTHON={python}", f"VENV={folder / 'venv'}"]
    done = subprocess.run(
        command, env={**kept, "CXX": compiler, **environment}, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode != 0
    return done.stdout, "-m venv" in log.read_text(encoding="utf-8")


def test_without_libgomp_and_a_compiler_it_names_the_package_and_downloads_nothing(tmp_path: Path) -> None:
    printed, begun = serve(tmp_path, has_libgomp=False, compiler="no-such-compiler")
    assert (
        "needs the system's libgomp.so.1, which is missing.\nOn Debian and Ubuntu: apt-get install libgomp1." in printed
    )
    assert not begun


@pytest.mark.parametrize(
    ("has_libgomp", "compiler", "environment"),
    [
        (True, "no-such-compiler", {}),
        (False, "true", {}),  # the kernels bring the functions
        (False, "no-such-compiler", {"AFTERWORD_LLAMA": "/opt/libllama.so"}),  # another library may not need it
    ],
)
def test_it_sets_up_where_llamacpp_can_be_loaded(
    tmp_path: Path, has_libgomp: bool, compiler: str, environment: dict[str, str]
) -> None:
    printed, begun = serve(tmp_path, has_libgomp, compiler, **environment)
    assert "is missing" not in printed
    assert begun
