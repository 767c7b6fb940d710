"""The Dockerfiles: their words held to the repository, and what they start as a real process. No Docker is needed."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import httpx
import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILES = ["Dockerfile", "Dockerfile.cuda"]


def instructions(name: str) -> list[tuple[str, str]]:
    """A Dockerfile's instructions and their arguments, continued lines joined."""
    text = re.sub(r"(?m)^\s*#.*\n", "", (ROOT / name).read_text(encoding="utf-8")).replace("\\\n", " ")
    parts = (line.strip().partition(" ") for line in text.splitlines() if line)
    return [(word, rest.strip()) for word, _, rest in parts]


def all_of(name: str, word: str) -> list[str]:
    return [rest for found, rest in instructions(name) if found == word]


WHEELS = "dist/*.whl"  # what `make wheel` writes
COPIED = {
    "Dockerfile": {"requirements.txt", WHEELS},
    "Dockerfile.cuda": {
        *("requirements.txt", "requirements-native.txt", "pyproject.toml", "hatch_build.py", "README.md", "LICENSE"),
        "src",
    },
}


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_is_copied_exists_and_is_sent(name: str) -> None:
    sent = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    sources = [source for rest in all_of(name, "COPY") if "--from" not in rest for source in rest.split()[:-1]]
    assert set(sources) == COPIED[name]
    for source in sources:
        assert source == WHEELS or (ROOT / source).exists()
        assert f"!{source}" in sent


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_image_is_for_no_root(name: str) -> None:
    user = all_of(name, "USER")[-1]
    assert f"useradd --uid 10001 --create-home {user} " in "".join(all_of(name, "RUN"))
    words = [word for word, _ in instructions(name)]
    assert words.index("USER") > len(words) - words[::-1].index("FROM"), "in the last stage"
    assert words.index("USER") < words.index("ENTRYPOINT")


def test_the_image_for_gpus_is_for_other_machines() -> None:
    given = "".join(all_of("Dockerfile.cuda", "ARG"))
    assert "-DGGML_NATIVE=OFF" in given
    assert "-march=native" not in given


def test_the_image_for_cpus_is_installed_without_a_compiler() -> None:
    text = " ".join(all_of("Dockerfile", "RUN"))
    assert not re.search(r"build-essential|g\+\+|cmake|CXX|pip wheel", text)


@pytest.mark.parametrize("word", ["USER", "WORKDIR", "VOLUME", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT"])
def test_both_images_are_used_alike(word: str) -> None:
    first, second = (all_of(name, word) for name in DOCKERFILES)
    assert first[-1] == second[-1]
    # That of CUDA compiles in a folder of its own.
    assert (len(first), len(second)) == (1, 2 if word == "WORKDIR" else 1)


# ---- how it is installed


def write_wheel(folder: Path, tag: str) -> None:
    """A wheel of Afterword with a module that names the tag of its file."""
    about = "afterword-0.1.0.dist-info"
    contents = {
        "which_wheel.py": f"TAG = {tag!r}\n",
        f"{about}/METADATA": "Metadata-Version: 2.1\nName: afterword\nVersion: 0.1.0\n",
        f"{about}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: false\nTag: {tag}\n",
    }
    contents[f"{about}/RECORD"] = "".join(f"{name},,\n" for name in (*contents, f"{about}/RECORD"))
    with zipfile.ZipFile(folder / f"afterword-0.1.0-{tag}.whl", "w") as wheel:
        for name, text in contents.items():
            wheel.writestr(name, text)


@pytest.mark.timeout(300)
@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="there are no wheels for this processor")
def test_the_steps_of_the_first_stage_install_the_wheel_of_this_architecture(tmp_path: Path) -> None:
    """The commands themselves in other folders, with wheels of two architectures and no packages from a registry."""
    wheels, target = tmp_path / "wheels", tmp_path / "afterword"
    wheels.mkdir()
    (wheels / "requirements.txt").write_text("")
    for machine in ("x86_64", "aarch64"):
        write_wheel(wheels, f"py3-none-manylinux_2_28_{machine}")
    command = all_of("Dockerfile", "RUN")[0].replace("/opt/afterword", str(target)).replace("/wheels", str(wheels))
    for line in ("COPY requirements.txt /wheels/", "COPY dist/*.whl /wheels/"):
        assert line in (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    environment = {"PATH": f"{Path(sys.base_prefix, 'bin')}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    done = subprocess.run(["sh", "-ec", command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    code = "import which_wheel; print(which_wheel.TAG)"
    printed = subprocess.run([target / "bin/python", "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == f"py3-none-manylinux_2_28_{platform.machine()}\n"


# ---- what it starts


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, str]:
    """The environment of a container, its folders moved."""
    named = dict(pair.split("=", 1) for pair in shlex.split(all_of("Dockerfile", "ENV")[-1]))
    moved = {name: re.sub("^/(data|models)", str(tmp_path), value) for name, value in named.items() if name != "PATH"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AFTERWORD_", "XDG_", "HF_"))}
    return kept | moved


def entrypoint() -> list[str]:
    words: list[str] = json.loads(all_of("Dockerfile", "ENTRYPOINT")[-1])
    assert words[0] == "afterword"
    return [sys.executable, "-m", *words]


def test_without_a_key_it_says_what_is_missing_and_ends(settings: dict[str, str]) -> None:
    done = subprocess.run(entrypoint(), env=settings, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "--allow-open" in done.stderr


def test_with_a_key_the_container_is_healthy_requires_the_key_and_ends_at_sigterm(settings: dict[str, str]) -> None:
    given = settings | {"AFTERWORD_API_KEY": "choose-a-long-one"}
    with subprocess.Popen([*entrypoint(), "--port", "0"], env=given, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = (re.search(r"http://0\.0\.0\.0:(\d+)$", line) for line in process.stdout)
            port = next(int(match[1]) for match in found if match)
            assert health(port) == 0
            assert httpx.get(f"http://127.0.0.1:{port}/v1/models", trust_env=False).status_code == 401
            process.terminate()
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert health(port) != 0


def test_the_health_check_fails_where_health_does() -> None:
    class Sick(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(503)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Sick) as server:
        thread = Thread(target=server.handle_request)
        thread.start()
        assert health(server.server_port) == 1
        thread.join()


def health(port: int) -> int:
    """The status of the image's health check, at another port."""
    words: list[str] = json.loads(all_of("Dockerfile", "HEALTHCHECK")[-1].partition("CMD ")[2])
    assert words[0] == "python"
    command = [sys.executable, *(word.replace("8000", str(port)) for word in words[1:])]
    return subprocess.run(command, capture_output=True, timeout=30, check=False).returncode
