"""Tests of the list of GPUs and of the process that reports their free memory. They need no GPU."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from afterword.engine.llama import gpus
from afterword.engine.llama.library import native
from afterword.engine.parent import worker_process

DEVICES = {1: ("Large", 1, 700), 2: ("Small", 1, 30), 3: ("The processor", 0, 999)}


@pytest.fixture
def fake_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    def memory(device: int, free: Any, total: Any) -> None:
        free._obj.value = total._obj.value = DEVICES[device][2]

    functions = {
        "ggml_backend_dev_count": lambda: len(DEVICES),
        "ggml_backend_dev_get": lambda index: index + 1,
        "ggml_backend_dev_type": lambda device: DEVICES[device][1],
        "ggml_backend_dev_description": lambda device: DEVICES[device][0].encode(),
        "ggml_backend_dev_memory": memory,
    }
    for name, function in functions.items():
        monkeypatch.setattr(native, name, function)


@pytest.mark.usefixtures("fake_devices")
def test_only_gpus_are_listed() -> None:
    assert gpus.gpu_names() == ["Large", "Small"]
    assert gpus.free_memory() == 730


def test_the_functions_of_the_library_can_be_called() -> None:
    assert bool(gpus.gpu_names()) == bool(gpus.free_memory())
    assert native.ggml_backend_dev_type(native.ggml_backend_dev_get(0)) in range(5)


@pytest.mark.parametrize(
    ("program", "found"),
    [
        ("print(12345)", 12345),
        ("print(0)", None),
        ("raise SystemExit(3)", None),
        ("print('no GPU')", None),
        ("print(5); raise SystemExit(1)", None),
    ],
)
def test_the_process_output_is_parsed(monkeypatch: pytest.MonkeyPatch, program: str, found: int | None) -> None:
    monkeypatch.setattr(worker_process, "GPU_MEMORY_COMMAND", (sys.executable, "-c", program))
    worker_process.gpu_memory.cache_clear()
    try:
        assert worker_process.gpu_memory() == found
    finally:
        worker_process.gpu_memory.cache_clear()


def test_the_real_process_reports_the_free_memory() -> None:
    assert (worker_process.gpu_memory() or 0) == pytest.approx(gpus.free_memory(), rel=0.2)
