"""The build hook: a compiler's messages reach the build's output, and a library appears only where it succeeds."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import hatch_build
from afterword.engine.kernels import compiled
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
    refusing = 'for flag in "$@"; do case $flag in -march=*) echo refused >&2; exit 1;; esac; done; echo "$@" > '
    monkeypatch.setenv("CXX", script(tmp_path / "cxx", refusing + str(tmp_path / "flags")))
    assert hatch_build.compile_library(source, tmp_path / "libkernel.so") is None
    flags = (tmp_path / "flags").read_text().split()
    assert "-mcpu=native" in flags
    assert "-Werror" not in flags, "a build on a user's machine must not fail because of a warning"


def test_a_compiler_may_be_named_with_options(tmp_path, source, monkeypatch):
    monkeypatch.setenv("CXX", script(tmp_path / "cxx", f'echo "$@" > {tmp_path / "flags"}') + " --target=here")
    assert hatch_build.compile_library(source, tmp_path / "libkernel.so") is None
    assert (tmp_path / "flags").read_text().startswith("--target=here ")


class Hook(hatch_build.KernelsHook):
    """The hook without hatchling."""

    def __init__(self, root: Path) -> None:
        self._root = str(root)
        self.shown: list[str] = []

    @property
    def root(self) -> str:
        return self._root

    @property
    def app(self) -> Any:
        return SimpleNamespace(display_warning=self.shown.append)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a kernel and the source for all processors; its compiler writes its arguments to the library."""
    folder = tmp_path / hatch_build.FOLDER / "kernels"
    folder.mkdir(parents=True)
    for name in ("kernel.cpp", hatch_build.PROCESSOR):
        (folder / name).write_text("")
    prints = 'all="$*"; while [ "$1" != -o ]; do shift; done; echo "$all" > "$2"'
    monkeypatch.setenv("CXX", script(tmp_path / "cxx", prints))
    for name in ("CXXFLAGS", "AFTERWORD_PLATFORM"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def build(project: Path, version: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Run the hook. Returns its decisions about the wheel, and the flags of each library by its place in the wheel."""
    data: dict[str, Any] = {"artifacts": [], "force_include": {}}
    hook = Hook(project)
    hook.initialize(version, data)
    included = {place: Path(file).read_text() for file, place in data["force_include"].items()}
    hook.finalize(version, data, "")
    assert hook.shown == []
    return data, included


def test_an_editable_install_has_one_library_for_this_machine(project: Path) -> None:
    data, included = build(project, "editable")
    folder = project / hatch_build.FOLDER / "kernels"
    assert included == {}
    assert {path.name for path in folder.glob("*.so")} == {"libkernel.so", "libprocessor.so"}
    assert "-march=native" in (folder / "libkernel.so").read_text()
    assert data["tag"].startswith("py3-none-")


@pytest.mark.parametrize("machine", list(hatch_build.LEVEL_FLAGS))
def test_a_wheel_has_a_library_for_each_level_and_none_for_this_machine_only(
    project: Path, monkeypatch: pytest.MonkeyPatch, machine: str
) -> None:
    monkeypatch.setenv("AFTERWORD_PLATFORM", f"manylinux_2_28_{machine}")
    data, included = build(project, "standard")
    folder = "afterword/engine/kernels"
    levels = hatch_build.LEVEL_FLAGS[machine]
    for_all = f"{folder}/libprocessor.so"
    assert list(included) == [*(f"{folder}/libkernel.{level}.so" for level in levels), for_all]
    for level, flags in levels.items():
        assert set(flags) < set(included[f"{folder}/libkernel.{level}.so"].split())
    assert "-march" not in included[for_all], "it runs on every processor"
    assert not any("native" in flags for flags in included.values())
    assert data["tag"] == f"py3-none-manylinux_2_28_{machine}"
    assert not list((project / hatch_build.FOLDER).rglob("*.so"))


@pytest.mark.parametrize("version", ["editable", "standard"])
def test_given_flags_replace_those_of_the_processor(
    project: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setenv("CXXFLAGS", "-march=armv9-a -O2")
    _, included = build(project, version)
    folder = project / hatch_build.FOLDER / "kernels"
    flags = included["afterword/engine/kernels/libkernel.so"] if included else (folder / "libkernel.so").read_text()
    assert "-march=armv9-a -O2" in flags
    assert "native" not in flags


def test_another_system_gets_a_library_for_its_oldest_processors(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hatch_build.sys, "platform", "darwin")
    _, included = build(project, "standard")
    assert list(included) == [f"afterword/engine/kernels/lib{name}.so" for name in ("kernel", "processor")]
    assert not any("-march" in flags or "-mcpu" in flags for flags in included.values())


@pytest.mark.parametrize("version", ["editable", "standard"])
def test_the_hook_shows_the_messages_and_goes_on(project: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setenv("CXX", script(project / "cxx", "echo 'kernel.cpp:1: error: it is broken' >&2; exit 1"))
    data: dict[str, Any] = {"artifacts": [], "force_include": {}}
    hook = Hook(project)
    hook.initialize(version, data)
    hook.finalize(version, data, "")
    assert data == {"artifacts": [], "force_include": {}}
    assert hook.shown[0].startswith("kernel.cpp could not be compiled; slower code will be used.\n")
    assert all("error: it is broken" in each for each in hook.shown)


def test_the_kernels_checks_compile_with_the_flags_of_the_build():
    checked = set(kernel_checks.SHIPPED) - set(kernel_checks.STRICT)
    assert checked == set(hatch_build.FLAGS) - {"-fPIC", "-shared"}, "the checks' drivers are programs, not libraries"


def test_the_build_the_package_and_the_kernels_checks_have_the_same_levels():
    assert {machine: tuple(levels) for machine, levels in hatch_build.LEVEL_FLAGS.items()} == compiled.LEVELS
    assert {level: flags for level, (flags, _) in kernel_checks.LEVELS.items()} == hatch_build.LEVEL_FLAGS["x86_64"]
    assert hatch_build.LEVEL_FLAGS["aarch64"]["armv8.2-a-dotprod"] == kernel_checks.ARM_FLAGS[:1]
