"""Checks that llama.cpp computes the same tokens and logits as the training code.

Depends on llama-cpp-python, the model and the tokenizer.
"""

import ctypes
from pathlib import Path

import llama_cpp
import numpy as np
import torch
from tokenizers import Tokenizer

from training.model import Llama

ODD = (
    "  two  spaces\tand\ttabs \n\n\n  three lines   \r\nwindows\r\n\r\n \n 1234567890 3.14159 0xFF 1e-9 "
    "I'm you'Re it'S we'll they'd don't 'tis Ünïcödé naïve café ÅNGSTRÖM 你好,世界。こんにちは 한국어 "
    "Привет мир "
    "🙂🙃👩‍👩‍👧🇺🇳 ½²٣ \u00a0nbsp\u3000wide\u200bzero … — “quotes” <tag/> __init__(self): #!/ \x00\x01 \x7f"
)
TOLERANCE = 1e-3
SILENT = llama_cpp.llama_log_callback(lambda level, text, data: None)


class Native:
    """One GGUF file in llama.cpp, used through the low-level interface."""

    def __init__(self, path: Path) -> None:
        llama_cpp.llama_log_set(SILENT, None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        self.vocabulary = llama_cpp.llama_model_get_vocab(self.model)

    def tokens(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""
        data = text.encode()
        ids = (llama_cpp.llama_token * (len(data) + 8))()
        count = llama_cpp.llama_tokenize(self.vocabulary, data, len(data), ids, len(ids), False, False)
        return list(ids[:count])

    def logits(self, ids: list[int]) -> np.ndarray:
        """The logits after each id: (n, vocabulary)."""
        settings = llama_cpp.llama_context_default_params()
        settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
        settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it sums in half precision
        context = llama_cpp.llama_init_from_model(self.model, settings)
        size = llama_cpp.llama_vocab_n_tokens(self.vocabulary)
        found = []
        for token in ids:
            one = (llama_cpp.llama_token * 1)(token)
            if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(one, 1)):
                raise RuntimeError("llama.cpp could not decode")
            logits = ctypes.cast(llama_cpp.llama_get_logits_ith(context, -1), ctypes.POINTER(ctypes.c_float * size))
            found.append(np.array(logits.contents))
        llama_cpp.llama_free(context)
        return np.stack(found)


def same_tokens(native: Native, tokenizer: Tokenizer, texts: list[str]) -> int:
    """Compare the tokens of every text; returns how many bytes were compared."""
    for text in [ODD, *texts]:
        expected = tokenizer.encode(text, add_special_tokens=False).ids
        if native.tokens(text) != expected:
            raise AssertionError(f"other tokens for {text[:80]!r}")
    return sum(len(text.encode()) for text in [ODD, *texts])


@torch.no_grad()
def logit_difference(native: Native, model: Llama, ids: list[int]) -> float:
    """The greatest absolute difference between the logits."""
    return float(np.abs(native.logits(ids) - model(torch.tensor([ids]))[0].numpy()).max())
