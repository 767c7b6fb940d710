"""Declares the part of llama.cpp's and ggml's C interface that Afterword uses, for ctypes.

The declarations are those of llama.h and ggml.h of `LLAMA_VERSIONS`. A call with a structure of another layout would
read and write wrong memory, so `open_library` compares a library with the declarations. It checks that

1. every function exists,
2. the version is one of `LLAMA_VERSIONS`,
3. the values that the library writes to its structures by default are the expected ones, field by field.

tests/engine/llama/test_bindings.py compares all declarations with what a compiler says about the headers. No state.
Must not import other modules of the package but the errors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from afterword.errors import SettingError

_ADDRESS, _TEXT, _NUMBER = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32
_UNSIGNED, _FLOAT, _SIZE, _BOOL = ctypes.c_uint32, ctypes.c_float, ctypes.c_size_t, ctypes.c_bool
_NUMBERS, _BYTES = ctypes.POINTER(ctypes.c_int32), ctypes.POINTER(ctypes.c_uint8)

LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, _TEXT, _ADDRESS)
"""`ggml_log_callback`: the level of a line, the line, the argument of `llama_log_set`."""
ProgressCallback = ctypes.CFUNCTYPE(_BOOL, _FLOAT, _ADDRESS)
"""`llama_progress_callback`: the loaded share, from 0 to 1. False ends the load."""


class LlamaBatch(ctypes.Structure):
    """`llama_batch`: the tokens of one forward pass, in arrays of `n_tokens` elements."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", _NUMBERS),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", _NUMBERS),
        ("n_seq_id", _NUMBERS),
        ("seq_id", ctypes.POINTER(_NUMBERS)),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


class ModelParameters(ctypes.Structure):
    """`llama_model_params`."""

    _fields_ = (
        *((name, _ADDRESS) for name in ("devices", "tensor_buft_overrides")),
        *((name, _NUMBER) for name in ("n_gpu_layers", "split_mode", "load_mode", "lazy_mode", "main_gpu")),
        ("tensor_split", _ADDRESS),
        ("progress_callback", ProgressCallback),
        *((name, _ADDRESS) for name in ("progress_callback_user_data", "kv_overrides")),
        *((name, _BOOL) for name in ("vocab_only", "check_tensors", "use_extra_bufts")),
        *((name, _BOOL) for name in ("no_host", "no_alloc", "load_mtp")),
    )


_CONTEXT_FIELDS: tuple[Any, ...] = (
    *((name, _UNSIGNED) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq")),
    *((name, _UNSIGNED) for name in ("n_outputs_max", "n_outputs_max_per_seq")),
    *((name, _NUMBER) for name in ("n_threads", "n_threads_batch")),
    *((name, _NUMBER) for name in ("ctx_type", "rope_scaling_type", "pooling_type", "attention_type")),
    ("flash_attn_type", _NUMBER),
    *((name, _FLOAT) for name in ("rope_freq_base", "rope_freq_scale")),
    *((name, _FLOAT) for name in ("yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow")),
    ("yarn_orig_ctx", _UNSIGNED),
    ("defrag_thold", _FLOAT),
    *((name, _ADDRESS) for name in ("cb_eval", "cb_eval_user_data")),
    *((name, _NUMBER) for name in ("type_k", "type_v")),
)
_FURTHER_CONTEXT_FIELDS: tuple[Any, ...] = (
    *((name, _ADDRESS) for name in ("abort_callback", "abort_callback_data")),
    *((name, _BOOL) for name in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified")),
    ("samplers", _ADDRESS),
    ("n_samplers", _SIZE),
    ("ctx_other", _ADDRESS),
)


class ContextParameters(ctypes.Structure):
    """`llama_context_params` of llama.cpp 0.5."""

    _fields_ = (*_CONTEXT_FIELDS, *_FURTHER_CONTEXT_FIELDS)


class ContextParameters06(ctypes.Structure):
    """`llama_context_params` of llama.cpp 0.6."""

    _fields_ = (*_CONTEXT_FIELDS, ("moe_cache_size", _SIZE), *_FURTHER_CONTEXT_FIELDS)


LLAMA_VERSIONS: Mapping[str, type[ctypes.Structure]] = MappingProxyType(
    {"0.5.": ContextParameters, "0.6.": ContextParameters06}
)
"""The beginnings of the versions of llama.cpp that have the interface declared here, and their `llama_context_params`.
"""


STRUCTURES: Mapping[str, type[ctypes.Structure]] = MappingProxyType(
    {
        "llama_batch": LlamaBatch,
        "llama_model_params": ModelParameters,
        "llama_context_params": ContextParameters,
    }
)
"""The structures by their C names."""

CONSTANTS: Mapping[str, int] = MappingProxyType(
    {
        **{"LLAMA_VOCAB_TYPE_SPM": 1, "LLAMA_VOCAB_TYPE_BPE": 2},
        **{"LLAMA_TOKEN_ATTR_UNKNOWN": 1 << 0, "LLAMA_TOKEN_ATTR_CONTROL": 1 << 3},
        **{"LLAMA_TOKEN_ATTR_USER_DEFINED": 1 << 4, "LLAMA_TOKEN_ATTR_LSTRIP": 1 << 7},
        "LLAMA_TOKEN_ATTR_RSTRIP": 1 << 8,
        **{"LLAMA_FLASH_ATTN_TYPE_AUTO": -1, "LLAMA_FLASH_ATTN_TYPE_DISABLED": 0, "LLAMA_FLASH_ATTN_TYPE_ENABLED": 1},
        "LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY": 1,
        **{"GGML_TYPE_F32": 0, "GGML_TYPE_F16": 1, "GGML_TYPE_Q4_1": 3, "GGML_TYPE_Q5_0": 6, "GGML_TYPE_Q5_1": 7},
        **{"GGML_TYPE_Q2_K": 10, "GGML_TYPE_Q3_K": 11, "GGML_TYPE_Q4_K": 12, "GGML_TYPE_Q5_K": 13},
        **{"GGML_TYPE_Q6_K": 14, "GGML_TYPE_BF16": 30},
        **{"GGML_LOG_LEVEL_ERROR": 4, "GGML_BACKEND_DEVICE_TYPE_GPU": 1},
    }
)
"""The constants that are used, by their C names."""

_MODEL = _ADAPTER = _CONTEXT = _VOCABULARY = _MEMORY = _DEVICE = _ADDRESS
FUNCTIONS: Mapping[str, tuple[Any, tuple[Any, ...]]] = MappingProxyType(
    {
        # the library
        "llama_backend_init": (None, ()),
        "llama_log_set": (None, (LogCallback, _ADDRESS)),
        "llama_print_system_info": (_TEXT, ()),
        "llama_supports_gpu_offload": (_BOOL, ()),
        "llama_version": (_TEXT, ()),
        # models
        "llama_model_default_params": (ModelParameters, ()),
        "llama_model_free": (None, (_MODEL,)),
        "llama_model_get_vocab": (_VOCABULARY, (_MODEL,)),
        "llama_model_has_decoder": (_BOOL, (_MODEL,)),
        "llama_model_has_encoder": (_BOOL, (_MODEL,)),
        "llama_model_is_hybrid": (_BOOL, (_MODEL,)),
        "llama_model_is_recurrent": (_BOOL, (_MODEL,)),
        "llama_model_load_from_file": (_MODEL, (_TEXT, ModelParameters)),
        "llama_model_meta_val_str": (_NUMBER, (_MODEL, _TEXT, _TEXT, _SIZE)),
        "llama_model_n_params": (ctypes.c_uint64, (_MODEL,)),
        "llama_model_n_swa": (_NUMBER, (_MODEL,)),
        # adapters
        "llama_adapter_get_alora_n_invocation_tokens": (ctypes.c_uint64, (_ADAPTER,)),
        "llama_adapter_lora_init": (_ADAPTER, (_MODEL, _TEXT)),
        # contexts
        "llama_batch_free": (None, (LlamaBatch,)),
        "llama_batch_init": (LlamaBatch, (_NUMBER, _NUMBER, _NUMBER)),
        "llama_context_default_params": (ContextParameters, ()),
        "llama_decode": (_NUMBER, (_CONTEXT, LlamaBatch)),
        "llama_free": (None, (_CONTEXT,)),
        "llama_get_logits": (ctypes.POINTER(ctypes.c_float), (_CONTEXT,)),
        "llama_get_memory": (_MEMORY, (_CONTEXT,)),
        "llama_get_model": (_MODEL, (_CONTEXT,)),
        "llama_init_from_model": (_CONTEXT, (_MODEL, ContextParameters)),
        "llama_set_adapters_lora": (_NUMBER, (_CONTEXT, ctypes.POINTER(_ADDRESS), _SIZE, ctypes.POINTER(_FLOAT))),
        "llama_set_n_threads": (None, (_CONTEXT, _NUMBER, _NUMBER)),
        "llama_synchronize": (None, (_CONTEXT,)),
        # the memory of sequences
        "llama_memory_clear": (None, (_MEMORY, _BOOL)),
        "llama_memory_seq_cp": (None, (_MEMORY, _NUMBER, _NUMBER, _NUMBER, _NUMBER)),
        "llama_memory_seq_pos_max": (_NUMBER, (_MEMORY, _NUMBER)),
        "llama_memory_seq_pos_min": (_NUMBER, (_MEMORY, _NUMBER)),
        "llama_memory_seq_rm": (_BOOL, (_MEMORY, _NUMBER, _NUMBER, _NUMBER)),
        "llama_state_seq_get_data_ext": (_SIZE, (_CONTEXT, _BYTES, _SIZE, _NUMBER, _UNSIGNED)),
        "llama_state_seq_get_size_ext": (_SIZE, (_CONTEXT, _NUMBER, _UNSIGNED)),
        "llama_state_seq_set_data": (_SIZE, (_CONTEXT, _BYTES, _SIZE, _NUMBER)),
        "llama_state_seq_set_data_ext": (_SIZE, (_CONTEXT, _BYTES, _SIZE, _NUMBER, _UNSIGNED)),
        # vocabularies
        "llama_token_to_piece": (_NUMBER, (_VOCABULARY, _NUMBER, _TEXT, _NUMBER, _NUMBER, _BOOL)),
        "llama_tokenize": (_NUMBER, (_VOCABULARY, _TEXT, _NUMBER, _NUMBERS, _NUMBER, _BOOL, _BOOL)),
        **{f"llama_vocab_{name}": (_NUMBER, (_VOCABULARY,)) for name in ("bos", "eos", "n_tokens", "type")},
        **{f"llama_vocab_{name}": (_NUMBER, (_VOCABULARY,)) for name in ("fim_pre", "fim_suf", "fim_mid")},
        "llama_vocab_get_add_bos": (_BOOL, (_VOCABULARY,)),
        "llama_vocab_get_attr": (_NUMBER, (_VOCABULARY, _NUMBER)),
        "llama_vocab_get_text": (_TEXT, (_VOCABULARY, _NUMBER)),
        "llama_vocab_is_eog": (_BOOL, (_VOCABULARY, _NUMBER)),
        # ggml
        "ggml_backend_dev_count": (_SIZE, ()),
        "ggml_backend_dev_description": (_TEXT, (_DEVICE,)),
        "ggml_backend_dev_get": (_DEVICE, (_SIZE,)),
        "ggml_backend_dev_memory": (None, (_DEVICE, ctypes.POINTER(_SIZE), ctypes.POINTER(_SIZE))),
        "ggml_backend_dev_type": (ctypes.c_int, (_DEVICE,)),
        "ggml_backend_reg_dev_get": (_DEVICE, (_ADDRESS, _SIZE)),
        "ggml_backend_reg_by_name": (_ADDRESS, (_TEXT,)),
        "ggml_backend_register": (None, (_ADDRESS,)),
        "ggml_tensor_overhead": (_SIZE, ()),
        "ggml_version": (_TEXT, ()),
    }
)
"""The functions by their C names: the type of the result, and those of the arguments."""

_DEFAULTS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "llama_model_default_params": {
            **{"n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "lazy_mode": 1, "use_extra_bufts": True},
        },
        "llama_context_default_params": {
            **{"n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_outputs_max_per_seq": 1},
            **{"n_threads": 4, "n_threads_batch": 4, "rope_scaling_type": -1, "pooling_type": -1},
            **{"attention_type": -1, "flash_attn_type": -1, "yarn_ext_factor": -1, "yarn_attn_factor": -1},
            **{"yarn_beta_fast": -1, "yarn_beta_slow": -1, "defrag_thold": -1, "type_k": 1, "type_v": 1},
            **{"offload_kqv": True, "no_perf": True, "op_offload": True, "swa_full": True},
        },
    }
)
"""The values of fields that are not 0 by default, by the function that returns the structure."""

_ADVICE = "Install the llama.cpp that Afterword depends on, or name another library with AFTERWORD_LLAMA."
_SYSTEM_LIBRARIES: Mapping[str, str] = MappingProxyType({"libgomp.so.1": "libgomp1", "libstdc++.so.6": "libstdc++6"})
"""Libraries of the system that a prebuilt llama.cpp needs, and Debian's packages with them."""


def open_library(path: Path) -> ctypes.CDLL:
    """Load llama.cpp with the declared types of its functions.

    Raises `SettingError` if the file is not a library of llama.cpp with the interface that is declared here.
    """
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        needed = next((each for each in _SYSTEM_LIBRARIES if each in str(error)), None)
        advice = (
            f". The system lacks {needed}. On Debian: apt-get install {_SYSTEM_LIBRARIES[needed]}" if needed else ""
        )
        raise SettingError(f"{path} cannot be loaded as a library: {error}{advice}") from None
    missing = [name for name in FUNCTIONS if not hasattr(library, name)]
    if missing:
        raise SettingError(f"{path} is no llama.cpp that Afterword knows: it lacks {_some(missing)}. {_ADVICE}")
    library.llama_version.restype = _TEXT
    version = library.llama_version().decode("utf-8", "replace")
    context = next((LLAMA_VERSIONS[each] for each in LLAMA_VERSIONS if version.startswith(each)), None)
    if context is None:
        known = _some(f"{each}x" for each in LLAMA_VERSIONS)
        raise SettingError(f"{path} is llama.cpp {version}. Afterword knows {known}. {_ADVICE}")
    _declare(library, context)
    different = [field for name, defaults in _DEFAULTS.items() for field in _differences(library, name, defaults)]
    if different:
        raise SettingError(
            f"{path} is llama.cpp {version} with another interface than Afterword knows: {_some(different)} have other"
            f" values by default. {_ADVICE}"
        )
    return library


def _declare(library: ctypes.CDLL, context: type[ctypes.Structure]) -> None:
    """Set the types of results and arguments. `context`: the version's `llama_context_params`."""
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        types = [context if each is ContextParameters else each for each in (result, *arguments)]
        function.restype, function.argtypes = types[0], types[1:]


def _differences(library: ctypes.CDLL, name: str, expected: Mapping[str, float]) -> list[str]:
    """The fields of a structure whose default values are not the expected ones. `name`: the function that returns it.

    A library whose structure is larger than the declared one writes behind it, so more memory is declared.
    """
    structure = getattr(library, name).restype
    larger = type("Larger", (ctypes.Structure,), {"_fields_": [("declared", structure), ("more", _ADDRESS * 64)]})
    found = ctypes.CFUNCTYPE(larger)((name, library))().declared
    # A null pointer is None, or a function that is false.
    return [field for field, *_ in structure._fields_ if (getattr(found, field) or 0) != expected.get(field, 0)]


def _some(names: Iterable[str]) -> str:
    return ", ".join(names)
