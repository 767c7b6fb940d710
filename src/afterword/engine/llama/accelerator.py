"""Attention and products of our own (accelerator.cpp), offered to llama.cpp: sums that are the same in any company.

It is registered only where all that can be checked of ggml's interface is as the source declares it.
"""

from __future__ import annotations

import ctypes
from functools import cache

from afterword.engine.kernels.compiled import KERNELS, library
from afterword.engine.llama.library import native

LIBRARY = library(KERNELS / "accelerator.cpp")

_KNOWN_GGML = b"0.25."  # the interface is ggml's own affair and may change with any other
_OBJECT_BYTES = 32  # what ggml adds to a tensor to keep it in a list
_ADDRESSES = (
    *("ggml_backend_cpu_buffer_type", "ggml_backend_buft_is_host", "ggml_backend_buffer_init"),
    *("ggml_graph_n_nodes", "ggml_graph_node", "ggml_op_name"),
)


@cache
def register() -> bool:
    """Register it with llama.cpp, for every context made from now on. False where that cannot be done."""
    kernels = _kernels()
    if kernels is None:
        return False
    ggml = native._lib  # through it, since other paths to ggml would load a second copy
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
    """From here on is counted what llama.cpp asks about."""
    kernels = _kernels()
    if kernels is not None:
        kernels.accelerator_listen()


def computes_all_attention() -> bool:
    """Whether all attention that was asked about can be computed, and there was some."""
    kernels = _kernels()
    return kernels is not None and bool(kernels.accelerator_attends())


def unsupported_types() -> frozenset[int]:
    """The types, by ggml's numbers, of the model's matrices whose products were asked about and are the library's."""
    kernels = _kernels()
    bits: int = kernels.accelerator_types_left() if kernels is not None else 0
    return frozenset(kind for kind in range(bits.bit_length()) if bits >> kind & 1)


def has_unsupported_products() -> bool:
    """Whether there were products of two computed operands, or of experts: they are the library's."""
    kernels = _kernels()
    return kernels is not None and bool(kernels.accelerator_others_left())


def supports_quantized() -> bool:
    """Whether it computes products of quantized weights: on processors that have the instructions for it."""
    kernels = _kernels()
    return kernels is not None and bool(kernels.accelerator_multiplies())


def configure(threads: int, keep_weights: bool) -> None:
    """How many threads compute, and whether models that are loaded from now on have their weights copied.

    Those that are multiplied with here: to memory of our own, where they lie as is best for that.
    """
    kernels = _kernels()
    if kernels is not None:
        kernels.accelerator_prepare(threads, keep_weights)


def use_thread_pool(alone: bool) -> int | None:
    """Compute with a team of threads of our own, if nothing is left to the library that takes long.

    Returns the address of what runs work in them (`Run` in parallel.hpp), None where they are OpenMP's.
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
