"""Applies a LoRA adapter to a llama.cpp context: its low-rank products are added to those of the model's weights.

A context has one adapter for its whole life, so nothing that was computed with another one can be in its KV cache.
"""

from __future__ import annotations

import ctypes
import os

from afterword.engine.llama.library import last_error, native
from afterword.engine.messages import LoadModel
from afterword.errors import SettingError


def apply_adapter(model: object, context: object, settings: LoadModel) -> None:
    """Load the adapter of the settings, and use it in all passes of the context. Raises `SettingError`.

    One pass is computed, because llama.cpp reserves the graph with the adapter's operations when a pass begins. The
    accelerator's record of supported operations includes them from then on. The cache is empty afterwards.
    """
    adapter = native.llama_adapter_lora_init(model, os.fsencode(settings.adapter))
    if not adapter:
        raise SettingError(f"llama.cpp cannot load the adapter {settings.adapter}: {last_error()}")
    if native.llama_adapter_get_alora_n_invocation_tokens(adapter):
        raise SettingError(
            f"{settings.adapter} is an activated LoRA, which is used from certain tokens on only. Afterword applies "
            "adapters to all tokens."
        )
    scale = ctypes.c_float(settings.adapter_scale)
    native.llama_set_adapters_lora(context, (ctypes.c_void_p * 1)(adapter), 1, ctypes.byref(scale))
    _compute_one_token(context)


def _compute_one_token(context: object) -> None:
    batch = native.llama_batch_init(1, 0, 1)
    batch.n_tokens = 1
    batch.token[0], batch.pos[0], batch.n_seq_id[0], batch.seq_id[0][0], batch.logits[0] = 0, 0, 1, 0, 1
    status = native.llama_decode(context, batch)
    native.llama_batch_free(batch)
    if status != 0:
        raise SettingError(f"llama.cpp cannot compute with the adapter: {last_error()}")
    native.llama_memory_clear(native.llama_get_memory(context), True)
