"""The GPUs that the library can use. `python -m afterword.engine.llama.gpus` prints the bytes that they have left."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, cast

from afterword.engine.llama import library

_GPU = 1  # ggml's number for a device with memory of its own
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_size_t


def gpu_names() -> list[str]:
    """What they are called: part of what a number computed there depends on."""
    describe = _function("ggml_backend_dev_description", ctypes.c_char_p, _POINTER)
    return [describe(card).decode("utf-8", "replace") for card in _gpus()]


def free_memory() -> int:
    """Bytes that they have left, together."""
    ask = _function("ggml_backend_dev_memory", None, _POINTER, ctypes.POINTER(_SIZE), ctypes.POINTER(_SIZE))
    left, total, found = _SIZE(), _SIZE(), 0
    for card in _gpus():
        ask(card, ctypes.byref(left), ctypes.byref(total))
        found += left.value
    return found


def _gpus() -> list[int]:
    count = _function("ggml_backend_dev_count", _SIZE)()
    get, kind = (
        _function("ggml_backend_dev_get", _POINTER, _SIZE),
        _function("ggml_backend_dev_type", ctypes.c_int, _POINTER),
    )
    return [device for device in map(get, range(count)) if kind(device) == _GPU]


def _function(name: str, result: type | None, *arguments: type) -> Callable[..., Any]:
    # Through the library that is loaded, since another path to ggml would load a second copy.
    function = getattr(library.native._lib, name)
    function.restype, function.argtypes = result, list(arguments)
    return cast(Callable[..., Any], function)


if __name__ == "__main__":
    library.initialize(verbose=False)
    print(free_memory())
