"""Lists the GPUs that llama.cpp can use. `python -m afterword.engine.llama.gpus` prints their free memory in bytes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, cast

from afterword.engine.llama import library

_GPU = 1  # GGML_BACKEND_DEVICE_TYPE_GPU: a device with its own memory
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_size_t


def gpu_names() -> list[str]:
    """The names of the GPUs; part of the fingerprint, because results depend on the GPU."""
    describe = _function("ggml_backend_dev_description", ctypes.c_char_p, _POINTER)
    return [describe(device).decode("utf-8", "replace") for device in _gpus()]


def free_memory() -> int:
    """The free memory of all GPUs together, in bytes."""
    memory = _function("ggml_backend_dev_memory", None, _POINTER, ctypes.POINTER(_SIZE), ctypes.POINTER(_SIZE))
    free, total, free_bytes = _SIZE(), _SIZE(), 0
    for device in _gpus():
        memory(device, ctypes.byref(free), ctypes.byref(total))
        free_bytes += free.value
    return free_bytes


def _gpus() -> list[int]:
    count = _function("ggml_backend_dev_count", _SIZE)()
    get, kind = (
        _function("ggml_backend_dev_get", _POINTER, _SIZE),
        _function("ggml_backend_dev_type", ctypes.c_int, _POINTER),
    )
    return [device for device in map(get, range(count)) if kind(device) == _GPU]


def _function(name: str, result: type | None, *arguments: type) -> Callable[..., Any]:
    # Use the loaded library's handle: opening ggml by another path would load a second copy.
    function = getattr(library.native._lib, name)
    function.restype, function.argtypes = result, list(arguments)
    return cast(Callable[..., Any], function)


if __name__ == "__main__":
    library.initialize(verbose=False)
    print(free_memory())
