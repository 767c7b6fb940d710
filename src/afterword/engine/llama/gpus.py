"""Lists the GPUs that llama.cpp can use. `python -m afterword.engine.llama.gpus` prints their free memory in bytes."""

from __future__ import annotations

import ctypes

from afterword.engine.llama import library
from afterword.engine.llama.library import native


def gpu_names() -> list[str]:
    """The names of the GPUs; part of the fingerprint, because results depend on the GPU."""
    return [native.ggml_backend_dev_description(device).decode("utf-8", "replace") for device in _gpus()]


def free_memory() -> int:
    """The free memory of all GPUs together, in bytes."""
    free, total, free_bytes = ctypes.c_size_t(), ctypes.c_size_t(), 0
    for device in _gpus():
        native.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        free_bytes += free.value
    return free_bytes


def _gpus() -> list[int]:
    """The devices that have their own memory."""
    devices = map(native.ggml_backend_dev_get, range(native.ggml_backend_dev_count()))
    return [each for each in devices if native.ggml_backend_dev_type(each) == native.GGML_BACKEND_DEVICE_TYPE_GPU]


if __name__ == "__main__":
    library.initialize(verbose=False)
    print(free_memory())
