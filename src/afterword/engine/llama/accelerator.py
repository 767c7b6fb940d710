"""Registers the kernels of accelerator.cpp with ggml: attention, products and elementwise operations.

Their results for a token do not depend on the other tokens of the pass. They are registered only with a version of ggml
whose interface is known, and only if the size of a tensor is the one that ggml.hpp declares. Else llama.cpp computes
everything, and one line on standard error states the losses.

State: the loaded library's, which belongs to the worker's main thread. `register` runs once per process.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from afterword.engine.kernels.compiled import KERNELS, library, why_missing
from afterword.engine.llama.library import native, openmp_is_serial

LIBRARY = library(KERNELS / "accelerator.cpp")

_KNOWN_GGML = {b"0.25.": 2, b"0.26.": 3}  # beginnings of versions, and the version of their interface (ggml.hpp)
_OBJECT_BYTES = 32  # sizeof(struct ggml_object), which ggml_tensor_overhead adds to the size of a tensor
_ADDRESSES = (
    *("ggml_backend_cpu_buffer_type", "ggml_backend_buft_is_host", "ggml_backend_buffer_init"),
    *("ggml_graph_n_nodes", "ggml_graph_node", "ggml_op_name"),
)
_OTHER_LLAMA = "Use the llama.cpp that Afterword depends on."
_OPENMP = ("GOMP_parallel", "omp_get_thread_num")  # in the order of `OpenMp` in openmp.hpp


@cache
def register() -> bool:
    """Register the kernels for every context that is created from now on. Returns whether that was possible."""
    kernels = _kernels()
    if kernels is None:
        return _refuse(
            why_missing(),
            "Install Afterword from a wheel, or with a C++ compiler.",
        )
    version = native.ggml_version()
    interface = next((_KNOWN_GGML[each] for each in _KNOWN_GGML if version.startswith(each)), None)
    if interface is None:
        known = ", ".join(f"{each.decode()}x" for each in _KNOWN_GGML)
        return _refuse(
            f"ggml {version.decode('utf-8', 'replace')} is not a version that they know ({known})", _OTHER_LLAMA
        )
    registry = native.ggml_backend_reg_by_name(b"CPU")  # the registry of a GPU may have no device
    if not registry:
        return _refuse("this llama.cpp has no back end for the processor", _OTHER_LLAMA)
    found = kernels.accelerator_interface(registry, native.ggml_backend_reg_dev_get(registry, 0))
    if found != interface:
        return _refuse(f"this ggml has another interface ({found}) than its version ({interface})", _OTHER_LLAMA)
    tensor, declared = native.ggml_tensor_overhead() - _OBJECT_BYTES, kernels.accelerator_tensor_size()
    if tensor != declared:
        return _refuse(f"a tensor of this ggml has {tensor} bytes and not {declared}", _OTHER_LLAMA)
    found_addresses = list(map(_address, _ADDRESSES))
    if None in found_addresses:
        return _refuse("this ggml lacks functions that they call", _OTHER_LLAMA)
    addresses = (ctypes.c_void_p * len(_ADDRESSES))(*found_addresses)
    native.ggml_backend_register(kernels.accelerator_registry(addresses, interface))
    return True


def _address(name: str) -> int | None:
    """The address of a function of ggml, or of a library that ggml uses; None if there is none."""
    function = getattr(native.handle, name, None)
    return ctypes.cast(function, ctypes.c_void_p).value if function else None


def _refuse(reason: str, advice: str) -> bool:
    print(
        f"Afterword's kernels are not used: {reason}. llama.cpp computes all operations, which is slower, and fewer "
        f"models have reproducible numbers. {advice}",
        file=sys.stderr,
        flush=True,
    )
    return False


def start_recording() -> None:
    """Set the counts of the operations that llama.cpp offers to zero."""
    kernels = _kernels()
    if kernels is not None:
        kernels.accelerator_start_recording()


def computes_all_attention() -> bool:
    """Whether llama.cpp offered attention, and the kernels compute all of it."""
    kernels = _kernels()
    return kernels is not None and bool(kernels.accelerator_computes_all_attention())


def offers_attention() -> bool:
    """Whether llama.cpp offered flash attention."""
    kernels = _kernels()
    return kernels is not None and bool(kernels.accelerator_offers_attention())


def unsupported_types() -> frozenset[int]:
    """The types, by ggml's numbers, of the weight matrices that llama.cpp multiplies."""
    kernels = _kernels()
    bits: int = kernels.accelerator_unsupported_types() if kernels is not None else 0
    return frozenset(kind for kind in range(bits.bit_length()) if bits >> kind & 1)


def has_unsupported_products() -> bool:
    """Whether llama.cpp computes products of two computed matrices."""
    kernels = _kernels()
    return kernels is not None and bool(kernels.accelerator_unsupported_products())


def has_unsupported_experts() -> bool:
    """Whether llama.cpp computes products of the matrices of selected experts."""
    kernels = _kernels()
    return kernels is not None and bool(kernels.accelerator_unsupported_experts())


def has_unsupported_recurrences() -> bool:
    """Whether llama.cpp computes operations over the tokens of sequences, such as Mamba's, which need its threads."""
    kernels = _kernels()
    return kernels is not None and bool(kernels.accelerator_unsupported_recurrences())


def supports_quantized() -> bool:
    """Whether the kernels compute products of quantized weights. They need AVX2 and FMA, or Arm's dot products."""
    kernels = _kernels()
    return kernels is not None and bool(kernels.accelerator_supports_quantized())


def configure(threads: int, keep_weights: bool) -> None:
    """Set the number of threads, and whether weights of models that are loaded from now on are packed.

    Packed weights are copies in large pages, in the order in which the kernels read them.
    """
    kernels = _kernels()
    if kernels is not None:
        kernels.accelerator_configure(threads, keep_weights)


def use_thread_pool(alone: bool) -> int | None:
    """Compute with the kernels' thread pool if `alone`, else with the threads of llama.cpp's OpenMP, if it has one.

    `alone` must be false where llama.cpp computes operations with several threads: two groups of spinning threads slow
    each other down. Returns the address of the chosen `Run` (parallel.hpp), None without kernels.
    """
    if not alone and openmp_is_serial():
        _say_that_openmp_is_serial()
        alone = True
    kernels = _kernels()
    run: int | None = None if kernels is None else kernels.accelerator_use_thread_pool(alone)
    return run


@cache
def _say_that_openmp_is_serial() -> None:
    print(
        "The system has no libgomp.so.1, so llama.cpp computes on one thread the operations of this model that "
        "Afterword's kernels do not have. On Debian and Ubuntu: apt-get install libgomp1",
        file=sys.stderr,
        flush=True,
    )


@dataclass(frozen=True, slots=True)
class KvPlace:
    """Where the keys or the values of one layer are. `type`: ggml's number. `cache`: see kv_buffers.hpp."""

    address: int
    cell_bytes: int
    slot_bytes: int
    type: int
    cache: int
    are_values: bool


class _NativeKvPlace(ctypes.Structure):
    """`CellsPlace` of kv_buffers.hpp."""

    _fields_ = (
        ("address", ctypes.c_void_p),
        ("cell_bytes", ctypes.c_size_t),
        ("slot_bytes", ctypes.c_size_t),
        ("type", ctypes.c_int32),
        ("cache", ctypes.c_int32),
        ("are_values", ctypes.c_int32),
    )


class KvMemory:
    """The memory of one context's KV cache: pages are taken as tokens are written and given back by `release`.

    Cells are numbered by the positions of their tokens.
    """

    def __init__(self, kernels: ctypes.CDLL, address: int) -> None:
        self._kernels = kernels
        self._address = address
        self._has_copies = False  # whether copies were limited since the last pass

    def limit_copy(self, slot: int, cells: int) -> None:
        """Copy only the first `cells` cells to `slot`. llama.cpp copies whole slots when the next pass begins."""
        self._has_copies = True
        self._kernels.accelerator_kv_limit_copy(self._address, slot, cells)

    def copied(self) -> None:
        """Note that a pass was computed, so that all copies are made."""
        if self._has_copies:
            self._has_copies = False
            self._kernels.accelerator_kv_copied(self._address)

    def release(self, slot: int, first: int) -> None:
        """Give back the memory of the cells from `first` on. No copies may be left to be made."""
        self._kernels.accelerator_kv_release(self._address, slot, first)

    def places(self) -> list[KvPlace]:
        """Where all keys and values are, in llama.cpp's order."""
        count = self._kernels.accelerator_kv_places(self._address, None, 0)
        found = (_NativeKvPlace * count)()
        self._kernels.accelerator_kv_places(self._address, found, count)
        return [
            KvPlace(each.address, each.cell_bytes, each.slot_bytes, each.type, each.cache, bool(each.are_values))
            for each in found
        ]


def with_kv_memory(create: Callable[[], object]) -> tuple[object, KvMemory | None]:
    """Create a context whose KV cache takes memory as tokens are written.

    The memory is given back only if llama.cpp offered flash attention since `start_recording`. Some models never use
    it; their values are stored transposed, so that a cell is not one range of bytes.
    """
    kernels = _kernels()
    if kernels is None:
        return create(), None
    kernels.accelerator_kv_open()
    try:
        context = create()
    finally:
        address: int | None = kernels.accelerator_kv_close()
    return context, KvMemory(kernels, address) if address and offers_attention() else None


@cache
def _kernels() -> ctypes.CDLL | None:
    if not LIBRARY.exists():
        return None
    kernels = ctypes.CDLL(str(LIBRARY))
    kernels.accelerator_tensor_size.restype = ctypes.c_size_t
    kernels.accelerator_registry.restype = ctypes.c_void_p
    kernels.accelerator_interface.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    kernels.accelerator_use_thread_pool.restype = ctypes.c_void_p
    kernels.accelerator_unsupported_types.restype = ctypes.c_uint64
    kernels.accelerator_kv_close.restype = ctypes.c_void_p
    kernels.accelerator_kv_limit_copy.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    kernels.accelerator_kv_copied.argtypes = [ctypes.c_void_p]
    kernels.accelerator_kv_release.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    kernels.accelerator_kv_places.restype = ctypes.c_size_t
    kernels.accelerator_kv_places.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    openmp = [_address(name) for name in _OPENMP]
    if None not in openmp:
        kernels.accelerator_set_openmp((ctypes.c_void_p * len(openmp))(*openmp))
    kernels.accelerator_use_thread_pool(False)
    return kernels
