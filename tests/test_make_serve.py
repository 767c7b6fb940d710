"""What `make serve` needs before it sets anything up."""

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


def serve(folder: Path, python: str) -> tuple[str, bool]:
    """What `make serve` prints without a compiler, and whether it begins to make an environment, which then fails.

    `python`: a command of the shell that the interpreter is; "$*" are its arguments.
    """
    log, interpreter = folder / "log", folder / "python"
    interpreter.write_text(
        f'#!/bin/sh\necho "$*" >> {log}\ncase "$*" in *venv*) exit 9;; esac\n{python}\n', encoding="utf-8"
    )
    interpreter.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name not in ("AFTERWORD_LLAMA", "MAKEFLAGS")}
    command = [str(MAKE), "-C", str(ROOT), "serve", f"PYTHON={interpreter}", f"VENV={folder / 'venv'}"]
    environment = {**kept, "CXX": "no-such-compiler"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode != 0
    return done.stdout + done.stderr, "-m venv" in log.read_text(encoding="utf-8")


def test_it_sets_up_without_a_compiler_and_without_libgomp(tmp_path: Path) -> None:
    _, begun = serve(tmp_path, 'case "$*" in *libgomp*) exit 1;; esac')
    assert begun


def test_an_interpreter_that_is_too_old_gets_a_sentence(tmp_path: Path) -> None:
    printed, begun = serve(tmp_path, f"""{sys.executable} -c 'import sys; sys.version_info = (3, 10); '"$2" """)
    assert "Afterword needs Python 3.11 or later: make serve PYTHON=python3.12" in printed
    assert not begun
