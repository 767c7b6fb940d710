"""`make wheel`: build Afterword's wheel for other machines, and show that it works where no compiler is.

    python scripts/make_wheel.py [--machine x86_64|aarch64] [--out dist] [--cold] [--bits]

1. An environment for tools gets the packages of requirements-wheel.txt: Zig, hatchling and auditwheel. Zig compiles for
   the version of glibc that `GLIBC` names, whatever the version of this machine is.
2. hatch_build.py compiles the kernels for each level of instructions.
3. auditwheel compares the symbols that the libraries need with the platform in the wheel's name.
4. `pip install WHEEL` in another new environment gets the wheel and what it depends on, with no program on the path.
   The server starts there and must answer a request, without a line about missing kernels.

The wheel is copied to `--out` only after all of this. Step 4 is left out for another machine. With `--cold` pip has no
package cache, so the printed seconds contain the downloads. With `--bits` the results of the kernels, compiled by Zig
for each level that this processor has, are compared with one another and with those of the installed compilers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import venv
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GLIBC = "2.28"  # of RHEL 8 and Debian 10
MACHINES = ("x86_64", "aarch64")
COMPILERS = ("c++", "g++", "clang++", "cc", "gcc", "clang", "cmake")
REQUEST = {"prompt": "Once upon a time", "max_tokens": 16, "temperature": 0, "stream": True}
MISSING = "kernels are not used"  # of the line that accelerator.py prints
SECONDS = 120  # in which the server must start and answer


class Failure(Exception):
    """A step failed; the text says which one and why."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", choices=MACHINES, default=platform.machine(), help="for which the wheel is")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="the folder that gets the wheel")
    parser.add_argument("--cold", action="store_true", help="install the wheel without pip's package cache")
    parser.add_argument("--bits", action="store_true", help="compare the kernels' results at all levels")
    options = parser.parse_args()
    if sys.platform != "linux" or options.machine not in MACHINES:
        parser.error(f"wheels are made on Linux, for {' and '.join(MACHINES)}")
    try:
        make(options.machine, options.out, options.cold, options.bits)
    except Failure as failure:
        print(failure, file=sys.stderr)
        return 1
    return 0


def make(machine: str, out: Path, cold: bool, bits: bool) -> None:
    """Do all steps. Raises `Failure`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        requirements = ROOT / "requirements-wheel.txt"
        tools = make_environment(folder / "tools")
        command = (tools, "-m", "pip", "install", "--quiet", "--require-hashes", "-r", requirements)
        run(*command, failure="the tools of requirements-wheel.txt could not be installed")
        with timed("build"):
            wheel = build(tools, machine, folder / "built")
        print(f"{audit(tools, wheel)}: {wheel.name}, {megabytes(wheel)} MB", flush=True)
        if machine == platform.machine():
            try_out(wheel, folder / "fresh", ["--no-cache-dir"] if cold else [])
        if bits:
            compare_bits(tools)
        out.mkdir(exist_ok=True)
        made = shutil.copy(wheel, out)
    print(made)


def make_environment(folder: Path) -> Path:
    """Make an environment with nothing but pip. Returns its interpreter."""
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


def build(tools: Path, machine: str, out: Path) -> Path:
    """Build the wheel of this folder's sources with Zig's compiler. Returns its file. Raises `Failure`."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != "CXXFLAGS"},
        "CXX": f"{tools} {ROOT / 'scripts' / 'zig_compiler.py'} {machine}-linux-gnu.{GLIBC}",
        "AFTERWORD_PLATFORM": f"manylinux_{GLIBC.replace('.', '_')}_{machine}",
    }
    command = (tools, "-m", "hatchling", "build", "-t", "wheel", "-d", out)
    printed = run(*command, env=environment, cwd=ROOT, failure="the wheel could not be built")
    if "could not be compiled" in printed:
        raise Failure(f"the kernels could not be compiled for {machine}:\n{printed}")
    (wheel,) = out.glob("*.whl")
    return wheel


def audit(tools: Path, wheel: Path) -> str:
    """The oldest platform on which the wheel runs. Raises `Failure` if it is newer than the one in the wheel's name."""
    named = wheel.stem.rsplit("-", 1)[1]
    report = run(tools, "-m", "auditwheel", "show", wheel, failure=f"auditwheel cannot read {wheel.name}")
    found = re.search(r'consistent\s+with\s+the\s+following\s+platform\s+tag:\s+"([^"]+)"', report)
    if found is None or glibc_of(found[1]) > glibc_of(named):
        raise Failure(f"{wheel.name} does not run on every {named}. auditwheel says:\n{report}")
    return found[1]


def glibc_of(platform_tag: str) -> tuple[int, ...]:
    """The version of glibc that a platform tag names. A tag that names none sorts behind all others."""
    found = re.fullmatch(r"manylinux_(\d+)_(\d+)_\w+", platform_tag)
    return tuple(map(int, found.groups())) if found else (sys.maxsize,)


def compare_bits(tools: Path) -> None:
    """Compute with the kernels of every level, compiled by Zig and by others. Raises `Failure` if results differ."""
    environment = {name: value for name, value in os.environ.items() if name != "CXX"}
    command = (tools, "-m", "tests.kernels", "bits")
    failure = "the kernels' results could not be shown to be equal"
    print(run(*command, env=environment, cwd=ROOT, failure=failure), end="", flush=True)


def try_out(wheel: Path, folder: Path, options: list[str]) -> None:
    """Install the wheel in a new environment with no program on the path, and ask its server. Raises `Failure`."""
    python = make_environment(folder)
    environment = without_compilers(folder / "empty")
    before = size_of(folder)
    with timed("pip install, what it depends on included"):
        command = (python, "-m", "pip", "install", "--quiet", *options, wheel)
        run(*command, env=environment, failure=f"{wheel.name} cannot be installed where no compiler is")
    print(f"{(size_of(folder) - before) / 1e6:.0f} MB on the disk", flush=True)
    ask(folder / "bin" / "afterword", environment, folder)


def without_compilers(path: Path) -> dict[str, str]:
    """This process's environment without settings of Afterword and Python, and with an empty folder as the path."""
    path.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AFTERWORD_", "PYTHON"))}
    found = [each for name in COMPILERS if (each := shutil.which(name, path=str(path)))]
    if found:
        raise Failure(f"a compiler is on the path: {found[0]}")
    return {**kept, "PATH": str(path)}


def ask(program: Path, environment: Mapping[str, str], folder: Path) -> None:
    """Start the server with the built-in model and read a completion. Raises `Failure`."""
    start = time.monotonic()
    messages = folder / "messages.txt"
    command = [program, "serve", "--port", "0"]
    with (
        messages.open("wb") as errors,
        subprocess.Popen(command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=errors) as server,
    ):
        limit = threading.Timer(SECONDS, server.kill)
        limit.start()
        try:
            text, seconds = _completion(server, start)
        except (OSError, ValueError) as error:
            raise Failure(f"the server did not answer: {error}\n{messages.read_text(errors='replace')}") from None
        finally:
            limit.cancel()
            server.terminate()
    printed = messages.read_text(errors="replace")
    if MISSING in printed or not text.strip():
        raise Failure(f"the server answered {text!r} and printed:\n{printed}")
    print(f"server start to the first token: {seconds:.1f} s. It answered {text!r}", flush=True)


def _completion(server: subprocess.Popen[bytes], start: float) -> tuple[str, float]:
    """The text of a completion, and the seconds from `start` to its first token.

    Raises `OSError` if the connection fails, `ValueError` if the server ends without its address.
    """
    assert server.stdout is not None
    addresses = (re.search(rb"http://127\.0\.0\.1:\d+", line) for line in server.stdout)
    address = next((found[0].decode() for found in addresses if found), None)
    if address is None:
        raise ValueError("it ended without an address")
    body = json.dumps(REQUEST).encode()
    request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        events = (line.removeprefix(b"data: ") for line in response if line.startswith(b"data: {"))
        texts = [json.loads(next(events))["choices"][0]["text"]]
        seconds = time.monotonic() - start
        texts += [json.loads(each)["choices"][0]["text"] for each in events]
    return "".join(texts), seconds


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    print(f"{what}: {time.monotonic() - start:.0f} s", flush=True)


def size_of(folder: Path) -> int:
    """The bytes of all files in a folder."""
    return sum(each.lstat().st_size for each in folder.rglob("*") if each.is_file())


def megabytes(file: Path) -> str:
    return f"{file.stat().st_size / 1e6:.1f}"


def run(*command: str | Path, failure: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
    """Run a command. Returns what it printed. Raises `Failure` with `failure` and what it printed if it fails."""
    done = subprocess.run(list(map(str, command)), env=env, cwd=cwd, capture_output=True, text=True, check=False)
    printed = f"{done.stdout}{done.stderr}"
    if done.returncode:
        raise Failure(f"{failure}:\n{printed}")
    return printed


if __name__ == "__main__":
    sys.exit(main())
