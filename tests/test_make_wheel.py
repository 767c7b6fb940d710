"""scripts/make_wheel.py: its checks, with substitutes for pip, auditwheel and the server; slow: a real wheel."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import hatch_build
from afterword.engine.kernels import compiled
from tests.kernels import __main__ as kernel_checks

ROOT = Path(__file__).resolve().parent.parent


def load(name: str) -> ModuleType:
    """A module of the folder scripts, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script, zig_compiler = load("make_wheel"), load("zig_compiler")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

WHEEL = "afterword-1.0-py3-none-manylinux_2_28_x86_64.whl"
REPORT = """
{WHEEL} is
consistent with the following platform tag:
"{tag}".
"""
SERVER = r"""
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        for text in {texts}:
            event = json.dumps({{"choices": [{{"text": text}}]}})
            self.wfile.write(f"data: {{event}}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_):
        pass

server = HTTPServer(("127.0.0.1", 0), Handler)
print({said!r}, file=sys.stderr, flush=True)
print(f"serves a model at http://127.0.0.1:{{server.server_port}}", flush=True)
server.serve_forever()
"""


def program(path: Path, text: str) -> Path:
    """A program with this Python code."""
    path.write_text(f"#!{sys.executable}\n{text}", encoding="utf-8")
    path.chmod(0o755)
    return path


# ---- the platform


@pytest.mark.parametrize("tag", ["manylinux_2_28_x86_64", "manylinux_2_17_x86_64"])
def test_a_wheel_that_runs_on_its_platform_is_accepted(tmp_path: Path, tag: str) -> None:
    tools = program(tmp_path / "python", f"print({REPORT.format(WHEEL=WHEEL, tag=tag)!r})")
    assert script.audit(tools, Path(WHEEL)) == tag


@pytest.mark.parametrize("tag", ["manylinux_2_29_x86_64", "manylinux_3_0_x86_64", "linux_x86_64"])
def test_a_wheel_that_needs_a_newer_platform_is_refused(tmp_path: Path, tag: str) -> None:
    tools = program(tmp_path / "python", f"print({REPORT.format(WHEEL=WHEEL, tag=tag)!r})")
    with pytest.raises(script.Failure, match="does not run on every manylinux_2_28_x86_64") as failure:
        script.audit(tools, Path(WHEEL))
    assert tag in str(failure.value)


def test_a_report_without_a_platform_refuses_the_wheel(tmp_path: Path) -> None:
    tools = program(tmp_path / "python", "print('This does not look like a platform wheel')")
    with pytest.raises(script.Failure, match="does not look like a platform wheel"):
        script.audit(tools, Path(WHEEL))


# ---- the build


def test_the_build_names_compiler_and_platform_and_no_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXXFLAGS", "-march=native")
    out = tmp_path / "built"
    names = ("CXX", "CXXFLAGS", "AFTERWORD_PLATFORM")
    text = f"import os, pathlib; out = pathlib.Path({str(out)!r}); out.mkdir()"
    write = f"(out / {WHEEL!r}).write_text(repr([os.environ.get(key) for key in {names}]))"
    tools = program(tmp_path / "python", f"{text}\n{write}")
    wheel = script.build(tools, "aarch64", out)
    compiler = f"{tools} {ROOT / 'scripts/zig_compiler.py'} aarch64-linux-gnu.2.28"
    assert wheel.read_text() == repr([compiler, None, "manylinux_2_28_aarch64"])


def test_a_wheel_without_kernels_is_refused(tmp_path: Path) -> None:
    tools = program(tmp_path / "python", "print('accelerator.cpp could not be compiled; slower code will be used.')")
    with pytest.raises(script.Failure, match=r"could not be compiled for x86_64:\naccelerator\.cpp could not"):
        script.build(tools, "x86_64", tmp_path)


def test_a_step_that_fails_is_named_with_its_output(tmp_path: Path) -> None:
    broken = program(tmp_path / "python", "print('no such package'); raise SystemExit(3)")
    with pytest.raises(script.Failure, match=r"^the tools could not be installed:\nno such package"):
        script.run(broken, failure="the tools could not be installed")


# ---- Zig's compiler


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["-O3"], ["-O3"]),
        (["-O3", "-march=x86-64-v3"], ["-O3", "-mcpu=x86_64_v3"]),
        (["-march=x86-64-v4", "-mavx512vnni", "-fPIC"], ["-fPIC", "-mcpu=x86_64_v4+avx512vnni"]),
        (["-march=armv8.2-a+dotprod"], ["-mcpu=generic+v8_2a+dotprod"]),
    ],
)
def test_levels_are_named_as_zig_names_them(options: list[str], expected: list[str]) -> None:
    assert zig_compiler.translated(options) == expected


def test_zig_has_a_processor_for_every_level() -> None:
    flags = [flag for levels in hatch_build.LEVEL_FLAGS.values() for each in levels.values() for flag in each]
    named = {flag.removeprefix("-march=") for flag in flags if flag.startswith("-march=")}
    assert named == set(zig_compiler.PROCESSORS)


def test_a_source_is_compiled_for_its_level_and_linked_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    fake = program(tmp_path / "python", f"import sys; open({str(log)!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')")
    monkeypatch.setattr(zig_compiler.sys, "executable", str(fake))
    flags = ["-O3", "-shared", "-march=x86-64-v3", "-static-libgcc", "-Wl,-s", "-o", "out.so", "x.cpp"]
    assert zig_compiler.main(["x86_64-linux-gnu.2.28", *flags]) == 0
    compiling, linking = log.read_text().splitlines()
    zig = "-m ziglang c++ -target x86_64-linux-gnu.2.28 -fno-sanitize=undefined"
    assert re.fullmatch(rf"{re.escape(zig)} -O3 -mcpu=x86_64_v3 x\.cpp -c -o \S+\.o", compiling)
    assert re.fullmatch(rf"{re.escape(zig)} -pthread -Wl,-s -shared -o out\.so \S+\.o", linking)


def test_a_program_of_several_sources_is_linked_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    fake = program(tmp_path / "python", f"import sys; open({str(log)!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')")
    monkeypatch.setattr(zig_compiler.sys, "executable", str(fake))
    assert zig_compiler.main(["x86_64-linux-gnu.2.28", "-O3", "-o", "out", "a.cpp", "b.cpp"]) == 0
    first, second, linking = log.read_text().splitlines()
    assert " a.cpp -c " in first
    assert " b.cpp -c " in second
    objects = [each.rpartition(" ")[2] for each in (first, second)]
    assert linking.endswith(f" -pthread -Wl,-s -o out {' '.join(objects)}")
    assert "-shared" not in linking


def test_a_source_that_zig_refuses_is_not_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = program(tmp_path / "python", "import sys; sys.exit(5 if '-c' in sys.argv else 0)")
    monkeypatch.setattr(zig_compiler.sys, "executable", str(fake))
    assert zig_compiler.main(["x86_64-linux-gnu.2.28", "-o", "out.so", "x.cpp"]) == 5


# ---- the bits


def test_results_that_differ_between_levels_refuse_the_wheel(tmp_path: Path) -> None:
    tools = program(tmp_path / "python", "print('bits: zig x86-64-v4: 9 results; other than g++'); raise SystemExit(1)")
    with pytest.raises(script.Failure, match=r"could not be shown to be equal:\nbits: zig x86-64-v4: 9 results"):
        script.compare_bits(tools)


def test_the_check_of_the_bits_knows_zig_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(kernel_checks, "on_x86", lambda: True)
    for found in (None, object()):
        monkeypatch.setattr(kernel_checks, "find_spec", lambda _, found=found: found)
        builds = [each for each in kernel_checks.builds() if each.name.startswith("zig ")]
        assert {each.name for each in builds} == {f"zig {level}" for level in kernel_checks.LEVELS}
        assert all(("no ziglang" in each.missing) == (found is None) for each in builds)
        assert all(Path(each.compiler[1]).samefile(ROOT / "scripts" / "zig_compiler.py") for each in builds)
        assert all(each.compiler[2].endswith(f".{script.GLIBC}") for each in builds)


# ---- the environment without a compiler


def test_the_environment_has_no_program_and_no_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AFTERWORD_LLAMA", "AFTERWORD_SERVE_PORT", "PYTHONPATH"):
        monkeypatch.setenv(name, "x")
    environment = script.without_compilers(tmp_path / "empty")
    assert not [name for name in environment if name.startswith(("AFTERWORD_", "PYTHON"))]
    assert list(Path(environment["PATH"]).iterdir()) == []


def test_a_server_that_answers_is_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = program(tmp_path / "afterword", SERVER.format(texts=[", ", "there"], said="Loading."))
    script.ask(server, os.environ, tmp_path)
    assert re.search(r"to the first token: \d+\.\d s\. It answered ', there'", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("texts", "said"),
    [([""], "Loading."), ([" and"], "Afterword's kernels are not used: the installation has none. llama.cpp")],
)
def test_a_server_without_kernels_or_without_a_text_is_refused(tmp_path: Path, texts: list[str], said: str) -> None:
    server = program(tmp_path / "afterword", SERVER.format(texts=texts, said=said))
    with pytest.raises(script.Failure, match="the server answered") as failure:
        script.ask(server, os.environ, tmp_path)
    assert said in str(failure.value)


def test_a_server_that_ends_is_refused_with_its_messages(tmp_path: Path) -> None:
    server = program(tmp_path / "afterword", "import sys; sys.exit('libgomp.so.1: cannot open shared object file')")
    with pytest.raises(script.Failure, match=r"did not answer: it ended without an address\nlibgomp\.so\.1"):
        script.ask(server, os.environ, tmp_path)


def test_the_searched_line_is_the_one_that_the_worker_prints() -> None:
    source = (ROOT / "src/afterword/engine/llama/accelerator.py").read_text(encoding="utf-8")
    assert script.MISSING in source


# ---- what the wheel depends on


def test_the_group_and_the_extra_for_a_compiled_library_are_equal() -> None:
    assert PROJECT["dependency-groups"]["native"] == PROJECT["project"]["optional-dependencies"]["native"]


def test_wheels_are_made_for_the_machines_that_have_levels() -> None:
    assert set(script.MACHINES) == set(compiled.LEVELS)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_wheel_serves_in_an_environment_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The wheel is compiled with the installed compiler, and its dependencies are those of this environment."""
    command = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT)
    subprocess.run(list(map(str, command)), check=True)
    (wheel,) = tmp_path.glob("*.whl")
    python = script.make_environment(tmp_path / "fresh")
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel], check=True)
    (site,) = (tmp_path / "fresh").glob("lib/*/site-packages")
    # Links in the folder that is named are not followed, so an editable installation in it is not found.
    (site / "more.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    script.ask(python.with_name("afterword"), script.without_compilers(tmp_path / "empty"), tmp_path)
    assert "It answered" in capsys.readouterr().out
