"""A llama.cpp model and context behind the core's `Runner`.

Each sequence has its own part of the key-value memory (`kv_unified=false`), and attention is computed in ways that were
measured to give a token the same bits whoever else is being computed (docs/decisions.md).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from afterword.engine.core.forward_batch import BatchEntry, ForwardBatch, Logits
from afterword.engine.llama import accelerator
from afterword.engine.llama.fixed_shape import pad_to_fixed_shape
from afterword.engine.llama.kv_cache import KvCache
from afterword.engine.llama.library import last_error, native
from afterword.engine.llama.model_files import ModelFiles
from afterword.engine.messages import LoadModel
from afterword.engine.protocol import Promise
from afterword.errors import EngineError, SettingError

_BF16 = 30  # ggml's number, which the bindings do not name
_PLAIN, _FLASH = native.LLAMA_FLASH_ATTN_TYPE_DISABLED, native.LLAMA_FLASH_ATTN_TYPE_ENABLED
_FLASH_IF_THERE = native.LLAMA_FLASH_ATTN_TYPE_AUTO
_F16, _F32 = native.GGML_TYPE_F16, native.GGML_TYPE_F32
_ATTENTION = {"f16": (_PLAIN, _F16, _F16), "f32": (_PLAIN, _F32, _F32)}
_KERNEL_ATTENTION = (_FLASH, _F16, _F16)
_GPU_ATTENTION = (_FLASH_IF_THERE, _F16, _F16)
# For keys and values of unequal types llama.cpp has one kernel for every shape, which takes query by query.
_PER_QUERY_ATTENTION = (_FLASH, _F16, _BF16)
_LIBRARY_TYPES = frozenset(
    (
        *(native.GGML_TYPE_Q2_K, native.GGML_TYPE_Q3_K, native.GGML_TYPE_Q4_K, native.GGML_TYPE_Q5_K),
        *(native.GGML_TYPE_Q6_K, native.GGML_TYPE_Q4_1, native.GGML_TYPE_Q5_0, native.GGML_TYPE_Q5_1),
    )
)
"""As in config.py: matrices as they lie in the file whose products may be the library's."""


class LlamaRunner:
    """Owner of the native model and context. Raises `SettingError` when they cannot be made."""

    min_shared_tokens = 16

    def __init__(self, settings: LoadModel, tell: Callable[[float], None] = lambda _: None) -> None:
        """`tell` hears the share of the model that has been loaded."""
        self._settings = settings
        self.slots = settings.sequences
        self.chunk = settings.chunk
        self.accelerated = not settings.gpu_layers and accelerator.register()
        self.uses_kernels = self.accelerated and settings.use_kernels and accelerator.supports_quantized()
        accelerator.configure(settings.threads, keep_weights=self.uses_kernels)
        self.files = ModelFiles(settings.parts or (settings.path,))  # opened first, so that a change shows
        self.model = _load(settings, settings.repack and not self.uses_kernels, tell)
        accelerator.start_recording()
        self._context, self.uses_own_attention = _context(self.model, settings, self.accelerated)
        if not native.llama_get_memory(self._context):
            raise SettingError(f"{settings.path} is not a text-completion model: it keeps no state of a text.")
        self._unsupported_types, self._others_left = (
            accelerator.unsupported_types(),
            accelerator.has_unsupported_products(),
        )
        self._vocabulary = native.llama_vocab_n_tokens(native.llama_model_get_vocab(self.model))
        recurrent = native.llama_model_is_recurrent(self.model) or native.llama_model_is_hybrid(self.model)
        self.can_truncate = not recurrent and native.llama_model_n_swa(self.model) <= 0
        self._recurrent = recurrent
        ours = self.uses_kernels and self.uses_own_attention and not self._unsupported_types and not self._others_left
        self.computes_all = ours and self.can_truncate
        self.thread_pool = accelerator.use_thread_pool(alone=self.computes_all)
        if self.computes_all:
            native.llama_set_n_threads(self._context, 1, 1)
        self.fixed_shape = settings.fixed_shape and self.can_truncate
        self.grid = 1 if self.promise == "exact" else settings.grid
        self._arrays = _BatchArrays(_most_tokens(settings))
        self._kv_cache = KvCache(
            self._context,
            self.slots + self.fixed_shape,
            settings.context,
            self._decode,
            multiplies_masked=recurrent or settings.kv_type != "exact" or settings.gpu_layers != 0,
        )
        self.cached_tokens = self._kv_cache.cached_tokens
        if self.fixed_shape:
            self._fill_last(settings)

    def run(self, batch: ForwardBatch) -> Logits:
        """Execute a batch; see `core.batch.Runner.run`."""
        for move in batch.slot_operations:
            self._kv_cache.apply(move)
        if not self.fixed_shape:
            return self._compute(batch.entries)
        filled = pad_to_fixed_shape(batch.entries, [self.cached_tokens(slot) for slot in range(self.slots + 1)])
        logits = self._compute(filled.rows)
        if len(filled.wanted) < len(logits):
            logits = logits[list(filled.wanted)]  # a copy: to cut can mean to compute
        for cut in filled.truncations:
            self._kv_cache.apply(cut)
        return logits

    @property
    def promise(self) -> Promise:
        """What is known of the numbers, given how they turned out to be computed."""
        if self.fixed_shape != self._settings.fixed_shape or self._recurrent:
            return "none"
        if self._settings.gpu_layers or not self.uses_kernels:
            return self._settings.promise_without_kernels
        # Without flash attention the library multiplies keys and values as it does what was computed.
        sound = self._unsupported_types <= _LIBRARY_TYPES and (
            not self._others_left or self._settings.kv_type != "exact"
        )
        return self._settings.promise if sound else "none"

    def _fill_last(self, settings: LoadModel) -> None:
        """One slot beyond those that are used holds a whole context, so that no sequence is ever the longest."""
        for start in range(0, settings.context, settings.chunk):
            tokens = (0,) * min(settings.chunk, settings.context - start)
            self._decode((BatchEntry(settings.sequences, start, tokens, 0),))

    def _compute(self, rows: tuple[BatchEntry, ...]) -> Logits:
        logits = self._decode(rows)
        self._kv_cache.check_computed(rows, logits)
        return logits

    def _decode(self, rows: tuple[BatchEntry, ...]) -> Logits:
        status = native.llama_decode(self._context, self._arrays.fill(rows))
        if status != 0:
            raise EngineError(f"llama_decode failed with status {status}: {last_error()}")
        outputs = sum(row.outputs for row in rows)
        if not outputs:
            native.llama_synchronize(self._context)
            return np.empty((0, self._vocabulary), np.float32)
        first = native.llama_get_logits(self._context).contents
        return _matrix_at(ctypes.addressof(first), outputs, self._vocabulary)


class _BatchArrays:
    """The C arrays of a `llama_batch`, seen as numpy arrays and used again for every pass."""

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
        self._batch = native.llama_batch(
            n_tokens=0,
            token=_pointer(self._token, ctypes.c_int32),
            embd=None,
            pos=_pointer(self._position, ctypes.c_int32),
            n_seq_id=_pointer(self._ones, ctypes.c_int32),
            seq_id=self._slots,
            logits=_pointer(self._output, ctypes.c_int8),
        )

    def fill(self, rows: tuple[BatchEntry, ...]) -> object:
        """The rows as a `llama_batch`; valid until the next call."""
        tokens = [token for row in rows for token in row.tokens]
        end = len(tokens)
        self._token[:end] = tokens
        self._position[:end] = [row.position + i for row in rows for i in range(len(row.tokens))]
        self._slot[:end] = [row.slot for row in rows for _ in row.tokens]
        self._output[:end] = [i >= len(row.tokens) - row.outputs for row in rows for i in range(len(row.tokens))]
        self._batch.n_tokens = end
        return self._batch


@lru_cache
def _matrix_at(address: int, rows: int, columns: int) -> Logits:
    """What stands there, seen as a matrix. To make such a view takes long, compared with what else is done."""
    return np.ctypeslib.as_array((ctypes.c_float * (rows * columns)).from_address(address)).reshape(rows, columns)


def _pointer(array: NDArray[np.int32] | NDArray[np.int8], kind: type[ctypes.c_int32 | ctypes.c_int8]) -> object:
    return array.ctypes.data_as(ctypes.POINTER(kind))


def _load(settings: LoadModel, repack: bool, tell: Callable[[float], None]) -> object:
    if settings.gpu_layers and not native.llama_supports_gpu_offload():
        raise SettingError("--gpu-layers: this llama.cpp was built without GPU support.")
    params = native.llama_model_default_params()
    params.n_gpu_layers = settings.gpu_layers
    nothing = ctypes.c_void_p()
    if not settings.gpu_layers:  # or products of long passes would be lent to a GPU that is there
        params.devices = ctypes.addressof(nothing)  # a list that ends at once
    params.use_extra_bufts = repack

    @native.llama_progress_callback  # type: ignore[untyped-decorator]
    def going_on(share: float, _: object) -> bool:
        tell(share)
        return True

    params.progress_callback = going_on
    model = native.llama_model_load_from_file(os.fsencode(settings.path), params)
    if not model:
        raise SettingError(f"llama.cpp cannot load {settings.path}: {last_error()}")
    if not native.llama_model_has_decoder(model) or native.llama_model_has_encoder(model):
        raise SettingError(f"{settings.path} is not a text-completion model: only decoder-only models can be served.")
    return model


def _most_tokens(settings: LoadModel) -> int:
    """Of one pass: a chunk of a prompt or a token of each sequence, with company."""
    return max(settings.chunk, settings.sequences + settings.fixed_shape)


def _context(model: object, settings: LoadModel, accelerated: bool) -> tuple[object, bool]:
    """A context, and whether its attention is our own: only where that can compute all that the model has."""
    if settings.gpu_layers and settings.kv_type == "f16":
        return _made(model, settings, _GPU_ATTENTION), False
    if settings.kv_type != "exact":
        return _made(model, settings, _ATTENTION[settings.kv_type]), False
    if accelerated:
        context = _made(model, settings, _KERNEL_ATTENTION)
        if accelerator.computes_all_attention():
            return context, True
        native.llama_free(context)
        accelerator.start_recording()
    return _made(model, settings, _PER_QUERY_ATTENTION), False


def _made(model: object, settings: LoadModel, kind: tuple[int, int, int]) -> object:
    params = native.llama_context_default_params()
    params.n_seq_max = settings.sequences + settings.fixed_shape
    params.n_ctx = (settings.context + settings.fixed_shape) * params.n_seq_max
    params.n_batch = params.n_ubatch = _most_tokens(settings)
    params.n_threads = params.n_threads_batch = settings.threads
    params.flash_attn_type, params.type_k, params.type_v = kind
    params.kv_unified = False
    params.no_perf = True
    context = native.llama_init_from_model(model, params)
    if not context:
        raise SettingError(
            f"llama.cpp cannot make room for {settings.sequences} sequences of {settings.context} tokens: "
            f"{last_error()}"
        )
    return context
