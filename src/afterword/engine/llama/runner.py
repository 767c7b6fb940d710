"""Implements the core's `Runner` with a llama.cpp model and context. The worker's main thread owns both.

Each slot has its own part of the KV cache (`kv_unified=false`). The kinds of attention that are used here were measured
to compute the same bits for a token with any other sequences in the batch (docs/decisions.md).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from afterword.engine.core.forward_batch import BatchEntry, ForwardBatch, Logits
from afterword.engine.kernels.compiled import memory_on_demand
from afterword.engine.llama import accelerator
from afterword.engine.llama.adapter import apply_adapter
from afterword.engine.llama.bindings import LlamaBatch, ProgressCallback
from afterword.engine.llama.fixed_shape import pad_to_fixed_shape
from afterword.engine.llama.kv_cache import KvCache, NativeContext
from afterword.engine.llama.library import check_architecture, last_error, metadata, native
from afterword.engine.llama.model_files import ModelFiles
from afterword.engine.llama.slot_states import SlotStates
from afterword.engine.messages import LoadModel
from afterword.engine.protocol import Promise
from afterword.errors import EngineError, SettingError
from afterword.system.resources import available_memory

_PLAIN, _FLASH = native.LLAMA_FLASH_ATTN_TYPE_DISABLED, native.LLAMA_FLASH_ATTN_TYPE_ENABLED
_FLASH_IF_SUPPORTED = native.LLAMA_FLASH_ATTN_TYPE_AUTO
_F16, _F32, _BF16 = native.GGML_TYPE_F16, native.GGML_TYPE_F32, native.GGML_TYPE_BF16
_ATTENTION = {"f16": (_PLAIN, _F16, _F16), "f32": (_PLAIN, _F32, _F32)}
_KERNEL_ATTENTION = (_FLASH, _F16, _F16)
_GPU_ATTENTION = (_FLASH_IF_SUPPORTED, _F16, _F16)
# For keys and values of different types llama.cpp has a single kernel for all shapes, which computes query by query. It
# refuses two types for models whose values are a part of the keys (MLA).
_PER_QUERY_ATTENTION = (_FLASH, _F16, _BF16)
_LIBRARY_TYPES = frozenset(
    (
        *(native.GGML_TYPE_Q2_K, native.GGML_TYPE_Q3_K, native.GGML_TYPE_Q4_K, native.GGML_TYPE_Q5_K),
        *(native.GGML_TYPE_Q6_K, native.GGML_TYPE_Q4_1, native.GGML_TYPE_Q5_0, native.GGML_TYPE_Q5_1),
    )
)
"""ggml's numbers of `config.LIBRARY_TYPES`: the library's matmuls of these types, not repacked, are reproducible."""

RESERVED_BYTES = 128 << 20
"""Memory of the machine that is left to others."""


class LlamaRunner:
    """Owns the native model and context. Raises `SettingError` if they cannot be created."""

    min_shared_tokens = 16

    def __init__(self, settings: LoadModel, report_progress: Callable[[float], None] = lambda _: None) -> None:
        """`report_progress` is called with the loaded share of the model, from 0 to 1."""
        self.accelerated = not settings.gpu_layers and accelerator.register()
        self._settings = settings = _within_memory(settings, self.accelerated)
        self.slots = settings.sequences
        self.capacity = settings.capacity
        self.chunk = settings.chunk
        self.uses_kernels = self.accelerated and settings.use_kernels and accelerator.supports_quantized()
        accelerator.configure(settings.threads, keep_weights=self.uses_kernels and settings.pack_weights)
        # Open the files before loading, so that a change during the load is detected.
        parts = settings.parts or (settings.path,)
        self.files = ModelFiles((*parts, settings.adapter) if settings.adapter else parts)
        self.model = _load(settings, settings.repack and not self.uses_kernels, report_progress)
        accelerator.start_recording()
        created = _context(self.model, settings, self.accelerated)
        self._context, self.uses_own_attention = created.address, created.own_attention
        self._depends_on_batch = created.depends_on_batch
        if not native.llama_get_memory(self._context):
            raise SettingError(f"{settings.path} is not a text-completion model: it has no KV cache.")
        if settings.adapter:
            apply_adapter(self.model, self._context, settings)
        self._unsupported_types = accelerator.unsupported_types()
        self._has_unsupported_products = accelerator.has_unsupported_products()
        self._has_unsupported_experts = accelerator.has_unsupported_experts()
        self.vocabulary = int(native.llama_vocab_n_tokens(native.llama_model_get_vocab(self.model)))
        recurrent = native.llama_model_is_recurrent(self.model) or native.llama_model_is_hybrid(self.model)
        self.can_truncate = not recurrent
        self._recurrent = recurrent
        complete = not (self._unsupported_types or self._has_unsupported_products or self._has_unsupported_experts)
        complete = complete and not accelerator.has_unsupported_recurrences()
        self.computes_all = self.uses_kernels and self.uses_own_attention and complete
        self.thread_pool = accelerator.use_thread_pool(alone=self.computes_all)
        if self.computes_all:
            native.llama_set_n_threads(self._context, 1, 1)
        self.fixed_shape = settings.fixed_shape and self.can_truncate
        self.grid = 1 if self.promise == "exact" else settings.grid
        self.joins_prompts = settings.joins_prompts and self.computes_all and self.grid == 1
        self._arrays = _BatchArrays(_most_tokens(settings))
        self._kv_cache = KvCache(
            created,
            self.slots + self.fixed_shape,
            settings.context,
            self._decode,
            multiplies_masked=recurrent or settings.kv_type != "exact" or settings.gpu_layers != 0,
        )
        self.cached_tokens = self._kv_cache.cached_tokens
        self.max_snapshots = self._most_snapshots(settings.snapshot_bytes) if recurrent else 0
        if self.fixed_shape:
            self._fill_last(settings)

    def run(self, batch: ForwardBatch) -> Logits:
        """Execute a batch; see `core.forward_batch.Runner.run`."""
        for operation in batch.slot_operations:
            self._kv_cache.apply(operation)
        if not batch.entries:
            self._kv_cache.release_between_passes()
            return np.empty((0, self.vocabulary), np.float32)
        if not self.fixed_shape:
            return self._compute(batch.entries)
        padded = pad_to_fixed_shape(batch.entries, [self.cached_tokens(slot) for slot in range(self.slots + 1)])
        logits = self._compute(padded.entries)
        if len(padded.wanted) < len(logits):
            logits = logits[list(padded.wanted)]  # a copy: `KvCache.apply` may run a pass that overwrites the logits
        for truncation in padded.truncations:
            self._kv_cache.apply(truncation)
        return logits

    @property
    def promise(self) -> Promise:
        """The promise that holds for the loaded model, given which operations the kernels compute."""
        if self.fixed_shape != self._settings.fixed_shape or self._depends_on_batch:
            return "none"
        if self._settings.gpu_layers or not self.uses_kernels:
            # The library's products with the matrices of an adapter were not tested.
            untested = self._recurrent or self._settings.adapter
            return "none" if untested else self._settings.promise_without_kernels
        # Without flash attention the library computes attention as products of two computed operands.
        expects_products = self._settings.kv_type != "exact"
        if self._recurrent and (self._unsupported_types or expects_products):
            return "none"  # the library multiplies the tokens of one sequence and of several by different kernels
        holds = (
            self._unsupported_types <= _LIBRARY_TYPES
            and (not self._has_unsupported_products or expects_products)
            and not self._has_unsupported_experts
        )
        return self._settings.promise if holds else "none"

    def configure_kernels(self, *, alone: bool) -> None:
        """Give the kernels' settings, which the models of a process share, the values of this one again.

        `alone`: whether the kernels compute all operations of the others.
        """
        settings = self._settings
        accelerator.configure(settings.threads, keep_weights=self.uses_kernels and settings.pack_weights)
        self.thread_pool = accelerator.use_thread_pool(alone=self.computes_all and alone)

    def slot_states(self) -> SlotStates | None:
        """Access to the states of slots; None if prefixes of the model cannot be stored. Clears all slots."""
        reusable = self.can_truncate or self.max_snapshots > 0
        return self._kv_cache.slot_states() if reusable and not self.fixed_shape else None

    def free_tokens(self) -> int | None:
        """See `core.forward_batch.Runner.free_tokens`."""
        size = self._settings.token_bytes
        return (available_memory() - RESERVED_BYTES) // size if size else None

    def _most_snapshots(self, size: int) -> int:
        """How many snapshots fit into `size` bytes. The state of windowed attention layers is not made for it."""
        if not size or native.llama_model_n_swa(self.model) > 0:
            return 0
        return size // self._kv_cache.snapshot_size()

    def _fill_last(self, settings: LoadModel) -> None:
        """Fill one additional slot with a whole context, so that it is always the longest sequence of a pass."""
        for start in range(0, settings.context, settings.chunk):
            tokens = (0,) * min(settings.chunk, settings.context - start)
            self._decode((BatchEntry(settings.sequences, start, tokens, 0),))

    def _compute(self, entries: tuple[BatchEntry, ...]) -> Logits:
        logits = self._decode(entries)
        self._kv_cache.check_computed(entries, logits)
        return logits

    def _decode(self, entries: tuple[BatchEntry, ...]) -> Logits:
        status = native.llama_decode(self._context, self._arrays.fill(entries))
        self._kv_cache.release_truncated()
        if status != 0:
            raise EngineError(f"llama_decode failed with status {status}: {last_error()}")
        outputs = sum(entry.outputs for entry in entries)
        if not outputs:
            native.llama_synchronize(self._context)
            return np.empty((0, self.vocabulary), np.float32)
        first = native.llama_get_logits(self._context).contents
        return _matrix_at(ctypes.addressof(first), outputs, self.vocabulary)


class _BatchArrays:
    """The C arrays of a `llama_batch` as numpy arrays, reused for every pass. `size`: tokens of the largest batch."""

    def __init__(self, size: int) -> None:
        self._token = np.zeros(size, np.int32)
        self._position = np.zeros(size, np.int32)
        self._slot = np.zeros(size, np.int32)
        self._output = np.zeros(size, np.int8)
        self._ones = np.ones(size, np.int32)
        first = self._slot.ctypes.data
        self._slots = (ctypes.POINTER(ctypes.c_int32) * size)(
            *(ctypes.cast(first + 4 * i, ctypes.POINTER(ctypes.c_int32)) for i in range(size))
        )
        self._batch = LlamaBatch(
            n_tokens=0,
            token=_pointer(self._token, ctypes.c_int32),
            embd=None,
            pos=_pointer(self._position, ctypes.c_int32),
            n_seq_id=_pointer(self._ones, ctypes.c_int32),
            seq_id=self._slots,
            logits=_pointer(self._output, ctypes.c_int8),
        )

    def fill(self, entries: tuple[BatchEntry, ...]) -> object:
        """The entries as a `llama_batch`, valid until the next call."""
        tokens = [token for entry in entries for token in entry.tokens]
        end = len(tokens)
        self._token[:end] = tokens
        self._position[:end] = [entry.position + i for entry in entries for i in range(len(entry.tokens))]
        self._slot[:end] = [entry.slot for entry in entries for _ in entry.tokens]
        self._output[:end] = [
            i >= len(entry.tokens) - entry.outputs for entry in entries for i in range(len(entry.tokens))
        ]
        self._batch.n_tokens = end
        return self._batch


@lru_cache
def _matrix_at(address: int, rows: int, columns: int) -> Logits:
    """The floats at an address as a matrix. Cached, because creating the view is slow compared with its use."""
    return np.ctypeslib.as_array((ctypes.c_float * (rows * columns)).from_address(address)).reshape(rows, columns)


def _pointer(array: NDArray[np.int32] | NDArray[np.int8], kind: type[ctypes.c_int32 | ctypes.c_int8]) -> object:
    return array.ctypes.data_as(ctypes.POINTER(kind))


def _within_memory(settings: LoadModel, accelerated: bool) -> LoadModel:
    """The settings, with fewer sequences if their memory would be taken at once although it is less than all need."""
    if accelerated and memory_on_demand():
        return settings
    if settings.capacity is None:
        return structs.replace(settings, token_bytes=0)
    sequences = min(settings.sequences, max(1, settings.capacity // settings.context))
    return structs.replace(settings, sequences=sequences, capacity=None, token_bytes=0)


def _load(settings: LoadModel, repack: bool, report_progress: Callable[[float], None]) -> object:
    if settings.gpu_layers and not native.llama_supports_gpu_offload():
        raise SettingError("--gpu-layers needs a llama.cpp with GPU support, but the installed one has none.")
    params = native.llama_model_default_params()
    params.n_gpu_layers = settings.gpu_layers
    null = ctypes.c_void_p()
    if not settings.gpu_layers:  # otherwise llama.cpp computes the matmuls of long passes on an existing GPU
        params.devices = ctypes.addressof(null)  # an empty list: it ends with a null pointer
    params.use_extra_bufts = repack

    @ProgressCallback  # type: ignore[untyped-decorator]
    def on_progress(share: float, _: object) -> bool:
        report_progress(share)
        return True

    params.progress_callback = on_progress
    model = native.llama_model_load_from_file(os.fsencode(settings.path), params)
    if not model:
        raise SettingError(f"llama.cpp cannot load {settings.path}: {last_error()}")
    if not native.llama_model_has_decoder(model) or native.llama_model_has_encoder(model):
        raise SettingError(f"{settings.path} is not a text-completion model: only decoder-only models can be served.")
    check_architecture(settings.path, metadata(model, b"general.architecture"))
    return model


def _most_tokens(settings: LoadModel) -> int:
    """The most tokens of one pass: a chunk of a prompt, or one token of every slot including the additional one."""
    return max(settings.chunk, settings.sequences + settings.fixed_shape)


def _context(model: object, settings: LoadModel, accelerated: bool) -> NativeContext:
    """Create a context. Afterword's kernels compute its attention only if they support all attention operations."""
    if settings.gpu_layers and settings.kv_type == "f16":
        return NativeContext(_create_context(model, settings, _GPU_ATTENTION))
    if settings.kv_type != "exact":
        return NativeContext(_create_context(model, settings, _ATTENTION[settings.kv_type]))
    with_memory = accelerator.with_kv_memory if accelerated else _without_kv_memory
    create = partial(_create_context, model, settings)
    if accelerated:
        context, memory = with_memory(partial(create, _KERNEL_ATTENTION))
        if accelerator.computes_all_attention():
            return NativeContext(context, memory, own_attention=True)
        native.llama_free(context)
        accelerator.start_recording()
    try:
        created = NativeContext(*with_memory(partial(create, _PER_QUERY_ATTENTION)))
    except SettingError:
        created = NativeContext(*with_memory(partial(create, _KERNEL_ATTENTION)), depends_on_batch=True)
    if accelerated and not accelerator.offers_attention():
        # the library computes some architectures without flash attention (Grok)
        native.llama_free(created.address)
        accelerator.start_recording()
        return NativeContext(_create_context(model, settings, _ATTENTION["f16"]))
    return created


def _without_kv_memory(create: Callable[[], object]) -> tuple[object, None]:
    return create(), None


def _create_context(model: object, settings: LoadModel, attention: tuple[int, int, int]) -> object:
    """`attention`: whether to use flash attention, the type of keys, the type of values."""
    params = native.llama_context_default_params()
    params.n_seq_max = settings.sequences + settings.fixed_shape
    params.n_ctx = (settings.context + settings.fixed_shape) * params.n_seq_max
    params.n_batch = params.n_ubatch = _most_tokens(settings)
    params.n_threads = params.n_threads_batch = settings.threads
    params.flash_attn_type, params.type_k, params.type_v = attention
    params.kv_unified = False
    params.swa_full = True  # otherwise layers with a sliding window lose the keys and values that a truncation needs
    params.no_perf = True
    context = native.llama_init_from_model(model, params)
    if not context:
        raise SettingError(
            f"llama.cpp cannot allocate {settings.sequences} sequences of {settings.context} tokens: {last_error()}"
        )
    return context
