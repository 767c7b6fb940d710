"""The build hook: a compiler's messages reach the build's output, and a library appears only where it succeeds."""

from __future__ import annotations

from pathlib import Path

import pytest

import hatch_build
from tests.kernels import __main__ as kernel_checks


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "kernel.cpp"
    path.write_text('extern "C" int one() { return 1; }\n')
    return path


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_failure_reports_the_command_and_the_last_lines_of_standard_error(tmp_path, source, monkeypatch):
    monkeypatch.setenv("CXX", script(tmp_path / "cxx", "seq 1 99 >&2; echo 'no such instruction' >&2; exit 3"))
    target = tmp_path / "libkernel.so"
    target.write_bytes(b"of an older build")
    error = hatch_build.compile_library(source, target)
    assert error is not None
    first, *lines = error.splitlines()
    assert first.startswith(str(tmp_path / "cxx")), first
    assert first.endswith("exited with status 3:")
    assert lines == [str(i) for i in range(81, 100)] + ["no such instruction"]
    assert not target.exists()


def test_a_compiler_that_is_not_installed_is_named(tmp_path, source, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    error = hatch_build.compile_library(source, tmp_path / "libkernel.so")
    assert error == "no-such-compiler: No such file or directory. Install a C++ compiler, or name one with CXX."


def test_flags_that_a_compiler_refuses_are_left_out(tmp_path, source, monkeypatch):
    refusing = (
        'for flag in "$@"; do case $flag in -fopenmp|-march=*) echo refused >&2; exit 1;; esac; done; echo "$@" > '
    )
    monkeypatch.setenv("CXX", script(tmp_path / "cxx", refusing + str(tmp_path / "flags")))
    monkeypatch.delenv("CXXFLAGS", raising=False)
    assert hatch_build.compile_library(source, tmp_path / "libkernel.so") is None
    flags = (tmp_path / "flags").read_text().split()
    assert "-mcpu=native" in flags
    assert "-fopenmp" not in flags
    assert "-Werror" not in flags, "a build on a user's machine must not fail because of a warning"


def test_the_hook_shows_the_messages_and_goes_on(tmp_path, monkeypatch):
    folder = tmp_path / hatch_build.FOLDER / "kernels"
    folder.mkdir(parents=True)
    (folder / "kernel.cpp").write_text("")
    monkeypatch.setenv("CXX", script(tmp_path / "cxx", "echo 'kernel.cpp:1: error: it is broken' >&2; exit 1"))
    shown: list[str] = []

    class Hook(hatch_build.KernelsHook):
        def __init__(self) -> None:
            pass

        root = str(tmp_path)
        app = type("App", (), {"display_warning": staticmethod(shown.append)})()

    artifacts: dict[str, object] = {"artifacts": []}
    Hook().initialize("standard", artifacts)
    assert artifacts == {"artifacts": []}
    assert len(shown) == 1
    assert shown[0].startswith("kernel.cpp could not be compiled; slower code will be used.\n")
    assert "error: it is broken" in shown[0]


def test_the_kernels_checks_compile_with_the_flags_of_the_build():
    checked = set(kernel_checks.SHIPPED) - set(kernel_checks.STRICT)
    assert checked == set(hatch_build.FLAGS) - {"-fPIC", "-shared"}, "the checks' drivers are programs, not libraries"
