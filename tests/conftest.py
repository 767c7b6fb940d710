"""Fixtures for tests that use HTTP: a real server, `afterword serve` in its own process."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx
import openai
import pytest

from afterword.engine.kernels import compiled
from real_model import FILE as REAL_MODEL

KEY = "sk-test-0123456789abcdef"


def pytest_configure(config: pytest.Config) -> None:
    """Isolate the tests from the settings, data and ignored signals of the user who runs them."""
    home = tempfile.TemporaryDirectory()
    config.add_cleanup(home.cleanup)
    os.environ["XDG_CONFIG_HOME"] = os.environ["XDG_DATA_HOME"] = home.name
    for name in [name for name in os.environ if is_setting(name)]:
        del os.environ[name]
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell has started pytest in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests get an hour: beside other programs one of 20 seconds can exceed the time limit of the others."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(3600))


def is_setting(name: str) -> bool:
    """Whether an environment variable is a setting. Others name the libraries with which the tests run."""
    return name.startswith("AFTERWORD_") and name not in (
        "AFTERWORD_LLAMA",
        "AFTERWORD_RAY_PYTHON",
        "AFTERWORD_VLLM_PYTHON",
    )


Serve = Callable[..., AbstractContextManager["Server"]]


@dataclass(frozen=True, slots=True)
class Server:
    """A running server. `key`: its API key; None if it was started without one."""

    url: str
    key: str | None
    model: str
    pid: int

    def http(self, key: str | None = None) -> httpx.Client:
        """An HTTP client that sends the server's API key, or the given one."""
        key = key or self.key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False)


@contextmanager
def running(
    *args: str, key: str | None = KEY, stderr: Path | None = None, before: tuple[str, ...] = ()
) -> Iterator[Server]:
    """Run `afterword serve` with these arguments on a free port. The server must exit with status 0 after SIGTERM.

    `before`: a command that is put in front of the server's command line.
    """
    keys = ("--api-key", key) if key else ()
    command = [sys.executable, "-m", "afterword", "serve", "--port", "0", *keys, *args]
    environment = {name: value for name, value in os.environ.items() if not is_setting(name)}
    with stderr.open("w+") if stderr else tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([*before, *command], env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
        with process:
            try:
                yield _wait_until_ready(process, log, key)
                process.send_signal(signal.SIGTERM)
                assert process.wait(60) == 0
            finally:
                process.kill()
        assert "Traceback" not in _read(log)


def _wait_until_ready(process: subprocess.Popen[str], log: IO[str], key: str | None) -> Server:
    assert process.stdout is not None
    output = ""
    for line in process.stdout:
        output += line
        if found := re.search(r"serves (\S+) .*\s(http://\S+)\n", output, re.DOTALL):
            return Server(found[2], key, found[1], process.pid)
    pytest.fail(f"The server did not start: {_read(log)}")


def _read(log: IO[str]) -> str:
    log.seek(0)
    return log.read()


@pytest.fixture(scope="session")
def serve() -> Serve:
    """For tests that start their own server: `with serve(*arguments, key=...) as server`."""
    return running


@pytest.fixture(scope="session")
def compiled_kernels() -> None:
    """For tests of what only the compiled kernels do. They are skipped where no compiler has built the kernels."""
    if not compiled.library(compiled.KERNELS / "accelerator.cpp").exists():
        assert shutil.which("c++") is None, "the kernels are missing although a C++ compiler is installed"
        pytest.skip("the kernels were not built: no C++ compiler")


@pytest.fixture(scope="session")
def kernel_products(compiled_kernels: None) -> None:
    """For tests of what the kernels' products of weights make possible, such as most promises."""
    from afterword.engine.llama import accelerator  # loads llama.cpp, which most tests do without

    if not accelerator.supports_quantized():
        pytest.skip("this processor lacks the instructions for products of bytes")


@pytest.fixture(scope="session")
def real_model() -> Path:
    """The file of SmolLM2-135M-Instruct. Tests are skipped without it."""
    if not REAL_MODEL.exists():
        pytest.skip("the real model is not downloaded: make model")
    return REAL_MODEL


@pytest.fixture(scope="session")
def server(serve: Serve) -> Iterator[Server]:
    """A server with the built-in model and an API key."""
    with serve("--parallel", "8") as server:
        yield server


@pytest.fixture(scope="session")
def http(server: Server) -> Iterator[httpx.Client]:
    with server.http() as client:
        yield client


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with (
        openai.DefaultHttpxClient(trust_env=False) as transport,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, http_client=transport) as client,
    ):
        yield client
