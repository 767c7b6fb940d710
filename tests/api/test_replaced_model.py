"""A model's file is replaced by the file of another model while a server has it loaded."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from completion_requests import complete, wait_until

from afterword.models.gguf_facts import parts, read_facts
from oracle.tiny import write_tiny

LONG = {"prompt": "a", "max_tokens": 400, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The first files of two different split models."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("old", "new"):
        (folder / name).mkdir()
    old, new = (write_tiny(folder / name / "tiny.gguf", seed=seed, split=8) for seed, name in enumerate(("old", "new")))
    return old, new


@pytest.fixture
def served(serve: Any, models: tuple[Path, Path], tmp_path: Path) -> Iterator[tuple[Any, Path]]:
    """A server with a copy of the first model, and the path of the copy."""
    shutil.copytree(models[0].parent, tmp_path / "served")
    path = tmp_path / "served" / models[0].name
    with serve(str(path), "--parallel", "2", key=None) as server:
        yield server, path


def overwrite(path: Path, other: Path, _: Any) -> None:
    """Overwrite the file in place, as `cp` does."""
    path.write_bytes(other.read_bytes())


def replace(path: Path, other: Path, server: Any) -> None:
    """Replace the file by another one with its name, and kill the worker."""
    shutil.copy(other, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)
    for child in psutil.Process(server.pid).children():
        os.kill(child.pid, signal.SIGKILL)


def fingerprint(http: httpx.Client) -> str:
    (model,) = http.get("/v1/models").json()["data"]
    found: str = model["system_fingerprint"]
    return found


@pytest.mark.parametrize("change", [overwrite, replace])
def test_a_stream_does_not_continue_with_a_replaced_model(
    served: tuple[Any, Path], models: tuple[Path, Path], change: Callable[[Path, Path, Any], None]
) -> None:
    server, path = served
    last = parts(path, read_facts(path))[-1]
    with server.http() as http:
        before = fingerprint(http)
        with http.stream("POST", "/v1/completions", json=LONG) as response:
            lines = response.iter_lines()
            assert before in next(lines)
            change(last, models[1].with_name(last.name), server)
            rest = [line for line in lines if line]
        assert rest[-1] != "data: [DONE]"
        assert '"error"' in rest[-1]
        wait_until(lambda: http.get("/ready").status_code == 200)
        after = fingerprint(http)
        assert after != before
        answer = complete(http, prompt="a", max_tokens=1)
        assert answer["system_fingerprint"] == after
