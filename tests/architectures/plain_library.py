"""Computes log probabilities with llama.cpp alone, as a reference for the engine.

It must run before the engine registers its kernels, which the library would use too. One text is computed in several
ways: with and without flash attention, as one pass and in small passes, with keys and values in F32 and in F16. The
results differ by the library's own rounding, which is the measure for the engine's differences.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from afterword.engine.llama.library import last_error, native

Rows = NDArray[np.float64]
"""Log probabilities: (tokens, vocabulary)."""

CONTEXT = 512
_PLAIN, _FLASH = native.LLAMA_FLASH_ATTN_TYPE_DISABLED, native.LLAMA_FLASH_ATTN_TYPE_AUTO
_F16, _F32 = native.GGML_TYPE_F16, native.GGML_TYPE_F32


@dataclass(frozen=True, slots=True)
class Way:
    """A way of computing a text. `chunk`: tokens of a pass."""

    flash: int
    kind: int
    chunk: int
    repack: bool = False


CLOSEST = Way(_PLAIN, _F32, CONTEXT)
OTHERS = (Way(_FLASH, _F16, 64, repack=True), Way(_FLASH, _F16, 5), Way(_PLAIN, _F16, 1))


def log_probabilities(path: Path, texts: Sequence[Sequence[int]], way: Way) -> list[Rows]:
    """For each text the log probabilities of the token after each of its tokens. Raises `ValueError`."""
    with _context(path, way) as context:
        return [_one(context, text, way.chunk) for text in texts]


def greedy(path: Path, prompt: Sequence[int], count: int) -> tuple[int, ...]:
    """The prompt, continued by the most likely tokens. Raises `ValueError`."""
    with _context(path, CLOSEST) as context:
        text = list(prompt)
        row = _one(context, text, CONTEXT)[-1]
        for position in range(len(text), len(text) + count):
            text.append(int(np.argmax(row)))
            row = _pass(context, text[-1:], position)[-1]
        return tuple(text)


@contextmanager
def _context(path: Path, way: Way) -> Iterator[object]:
    params = native.llama_model_default_params()
    params.use_extra_bufts = way.repack
    model = native.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise ValueError(last_error())
    settings = native.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = CONTEXT
    settings.n_threads = settings.n_threads_batch = 1
    settings.flash_attn_type, settings.type_k, settings.type_v = way.flash, way.kind, way.kind
    context = native.llama_init_from_model(model, settings)
    if not context:
        raise ValueError(last_error())
    try:
        yield context
    finally:
        native.llama_free(context)
        native.llama_model_free(model)


def _one(context: object, text: Sequence[int], chunk: int) -> Rows:
    native.llama_memory_clear(native.llama_get_memory(context), True)
    passes = [_pass(context, text[start : start + chunk], start) for start in range(0, len(text), chunk)]
    return np.concatenate(passes)


def _pass(context: object, tokens: Sequence[int], start: int) -> Rows:
    batch = native.llama_batch_init(len(tokens), 0, 1)
    try:
        for index, token in enumerate(tokens):
            batch.token[index], batch.pos[index], batch.n_seq_id[index] = token, start + index, 1
            batch.seq_id[index][0], batch.logits[index] = 0, True
        batch.n_tokens = len(tokens)
        if native.llama_decode(context, batch) != 0:
            raise ValueError(f"llama_decode failed: {last_error()}")
    finally:
        native.llama_batch_free(batch)
    size = native.llama_vocab_n_tokens(native.llama_model_get_vocab(native.llama_get_model(context)))
    logits = np.ctypeslib.as_array(native.llama_get_logits(context), (len(tokens), size)).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))
