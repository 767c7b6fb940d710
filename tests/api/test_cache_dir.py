"""`--cache-dir` of a real server: prefixes after its death, namespaces of keys, metrics, refused folders."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import httpx
import psutil
import pytest

PROMPT = Random(1).choices(range(300, 3000), k=600)
KEYS = ("sk-first-key-of-the-command-line", "sk-another-key-at-its-position")


def cached(http: httpx.Client, **fields: object) -> int:
    body = {"prompt": PROMPT, "max_tokens": 2, "temperature": 0, "logprobs": 1, **fields}
    response = http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return int(response.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def wait_for_parts(folder: Path, count: int) -> None:
    deadline = time.monotonic() + 30
    while len(list(folder.glob("*.part"))) < count:
        assert time.monotonic() < deadline, "nothing was written"
        time.sleep(0.02)


@pytest.fixture
def where(kernel_products, tmp_path):
    return ("--parallel", "2", "--context", "1024", "--cache-dir", str(tmp_path / "cache"))


def test_another_key_at_the_same_position_finds_nothing(serve, where, tmp_path):
    with serve(*where, key=KEYS[0]) as server, server.http() as http:
        assert cached(http) == 0
        wait_for_parts(tmp_path / "cache", 2)
    with serve(*where, key=KEYS[1]) as server, server.http() as http:
        assert cached(http) == 0
    with serve(*where, key=KEYS[0]) as server, server.http() as http:
        assert cached(http, cache_salt="other") == 0
        assert cached(http) == 512


def test_a_prefix_is_found_after_the_death_of_the_worker(serve, where, tmp_path):
    with serve(*where, key=None) as server, server.http() as http:
        assert cached(http) == 0
        wait_for_parts(tmp_path / "cache", 2)
        for child in psutil.Process(server.pid).children():
            os.kill(child.pid, signal.SIGKILL)
        assert cached(http) == 512
        deadline = time.monotonic() + 30
        while not re.search(r"prefix_store_hits_total\{.*\} 1.0\n", text := http.get("/metrics").text):
            assert time.monotonic() < deadline, text
            time.sleep(0.1)
        assert re.search(r"prefix_store_hit_tokens_total\{.*\} 512.0\n", text)


@pytest.mark.usefixtures("kernel_products")
def test_a_folder_of_another_program_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    command = [sys.executable, "-m", "afterword", "serve", "--port", "0", "--cache-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "--cache-dir" in done.stderr
    assert os.listdir(tmp_path) == ["notes.txt"]
