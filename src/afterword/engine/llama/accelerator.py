"""Registers Afterword's kernels (`kernels/accelerator.cpp`) with llama.cpp as a ggml back end.

The kernels add in an order that does not depend on the other sequences of a batch. They are registered only if every
checkable part of ggml's interface is as the C++ source declares it.
"""

from __future__ import annotations

import ctypes
from functools import cache

from afterword.engine.kernels.compiled import KERNELS, library
from afterword.engine.llama.library import native

LIBRARY = library(KERNELS / "accelerator.cpp")

_KNOWN_GGML = b"0.25."  # the back end interface is internal to ggml and may change with every version
_OBJECT_BYTES = 32  # `ggml_tensor_overhead` includes this header (`ggml_object`)
_ADDRESSES = (
    *("ggml_backend_cpu_buffer_type", "ggml_backend_buft_is_host", "ggml_backend_buffer_init"),
    *("ggml_graph_n_nodes", "ggml_graph_node", "ggml_op_name"),
)


@cache
def register() -> bool:
    """Register the kernels for every context that is created from now on. Returns False if that is not possible."""
    kernels = _kernels()
    if kernels is None:
        return False
    ggml = native._lib  # opening ggml by another path would load a second copy
    ggml.ggml_version.restype = ctypes.c_char_p
    ggml.ggml_tensor_overhead.restype = ctypes.c_size_t
    if not ggml.ggml_version().startswith(_KNOWN_GGML):
        return False
    if ggml.ggml_tensor_overhead() != kernels.accelerator_tensor_size() + _OBJECT_BYTES:
        return False
    addresses = (ctypes.c_void_p * len(_ADDRESSES))(
        *(ctypes.cast(getattr(ggml, name), ctypes.c_void_p).value for name in _ADDRESSES)
    )
    ggml.ggml_backend_register.argtypes = [ctypes.c_void_p]
    ggml.ggml_backend_register(kernels.accelerator_registry(addresses))
    return True


def start_recording() -> None:
    """Clear the record of operations that llama.cpp asks for, and record them from now on."""
    kernels = _kernels()
    if kernels is not None:
        kernels.accelerator_listen()


def computes_all_attention() -> bool:
    """Whether the kernels support every recorded attention operation, and there was at least one."""
    kernels = _kernels()
    return kernels is not None and bool(kernels.accelerator_attends())


def unsupported_types() -> frozenset[int]:
    """ggml's numbers of the matrix types whose recorded matmuls are left to the library."""
    kernels = _kernels()
    bits: int = kernels.accelerator_types_left() if kernels is not None else 0
    return frozenset(kind for kind in range(bits.bit_length()) if bits >> kind & 1)


def has_unsupported_products() -> bool:
    """Whether matmuls of two computed operands or of experts were recorded; these are left to the library."""
    kernels = _kernels()
    return kernels is not None and bool(kernels.accelerator_others_left())


def supports_quantized() -> bool:
    """Whether the kernels compute matmuls of quantized weights, which needs certain processor instructions."""
    kernels = _kernels()
    return kernels is not None and bool(kernels.accelerator_multiplies())


def configure(threads: int, keep_weights: bool) -> None:
    """Set the number of threads of the kernels.

    `keep_weights`: copy the weights of models that are loaded from now on into packed blocks for the kernels' matmuls.
    """
    kernels = _kernels()
    if kernels is not None:
        kernels.accelerator_prepare(threads, keep_weights)


def use_thread_pool(alone: bool) -> int | None:
    """Use the kernels' thread pool instead of OpenMP's threads, if `alone`: the library computes nothing expensive.

    Returns the address of the function that runs work in the pool (`Run` in `kernels/parallel.hpp`), None for OpenMP.
    """
    kernels = _kernels()
    run: int | None = None if kernels is None else kernels.accelerator_lead(alone)
    return run


@cache
def _kernels() -> ctypes.CDLL | None:
    if not LIBRARY.exists():
        return None
    kernels = ctypes.CDLL(str(LIBRARY))
    kernels.accelerator_tensor_size.restype = ctypes.c_size_t
    kernels.accelerator_registry.restype = ctypes.c_void_p
    kernels.accelerator_lead.restype = ctypes.c_void_p
    kernels.accelerator_types_left.restype = ctypes.c_uint64
    return kernels
