"""Servers whose model is run by vLLM. Without an environment that has vLLM, all tests here are skipped: `make vllm`."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from vllm_server import ENVIRONMENT, PYTHON, WRITE_MODEL, arguments

from tests.child_process import living

pytest.register_assert_rewrite("cases", "probe")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests without vLLM, and give them the time that vLLM takes to start."""
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        if not PYTHON:
            reason = "AFTERWORD_VLLM_PYTHON names no interpreter of an environment with vLLM: make vllm"
            item.add_marker(pytest.mark.skip(reason=reason))
        item.add_marker(pytest.mark.timeout(600))


@pytest.fixture(scope="session", autouse=True)
def environment() -> Iterator[None]:
    """Set the environment of servers."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small random model with a byte-level tokenizer."""
    path = tmp_path_factory.mktemp("models") / "random-llama"
    subprocess.run([PYTHON, str(WRITE_MODEL), str(path)], check=True)
    return path


@pytest.fixture(scope="session")
def server(serve: Any, folder: Path) -> Iterator[Any]:
    """A server with all extension fields, whose answers can have the log probabilities of the whole vocabulary."""
    with serve(*arguments(folder, "--parallel", "8", "--max-logprobs", "1000")) as server:
        processes = psutil.Process(server.pid).children(recursive=True)
        yield server
    assert processes
    assert not living(processes), "the server has ended and left processes of vLLM"


@pytest.fixture
def http(server: Any) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {server.key}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=300, trust_env=False) as client:
        yield client
