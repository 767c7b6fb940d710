"""The Dockerfiles: their words held to the repository, and what they start as a real process. No Docker is needed."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
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


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_is_copied_exists_and_is_sent(name: str) -> None:
    sent = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    sources = [source for rest in all_of(name, "COPY") if "--from" not in rest for source in rest.split()[:-1]]
    needed = {"requirements.txt", "requirements-native.txt", "pyproject.toml", "hatch_build.py", "README.md", "LICENSE"}
    assert {*needed, "src"} == set(sources)
    for source in sources:
        assert (ROOT / source).exists()
        assert f"!{source}" in sent


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_image_is_for_other_machines_and_for_no_root(name: str) -> None:
    given = "".join(all_of(name, "ARG"))
    assert "-DGGML_NATIVE=OFF" in given
    assert "-march=native" not in given
    user = all_of(name, "USER")[-1]
    assert f"useradd --uid 10001 --create-home {user} " in "".join(all_of(name, "RUN"))
    words = [word for word, _ in instructions(name)]
    assert words.index("USER") > len(words) - words[::-1].index("FROM"), "in the last stage"
    assert words.index("USER") < words.index("ENTRYPOINT")


@pytest.mark.parametrize("word", ["USER", "WORKDIR", "VOLUME", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT"])
def test_both_images_are_used_alike(word: str) -> None:
    assert all_of(DOCKERFILES[0], word) == all_of(DOCKERFILES[1], word)
    assert len(all_of(DOCKERFILES[0], word)) == (2 if word == "WORKDIR" else 1)


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
