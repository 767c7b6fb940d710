"""A model that generates one fixed text: after each byte of `TEXT` the next one, and at the end the end token.

The generated tokens are known in advance, so tests know where a character is split and where a stop string begins.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np

from oracle.tiny import Shape, byte_vocabulary, random_weights, write_model

TEXT = "(é😀漢) 1234567890."
"""No byte occurs twice, and each byte is one token, so that every token determines the next one."""


def write_one_text_model(path: Path) -> Path:
    """Write a model with layers that add zero and output weights that map each token to its successor."""
    shape, vocabulary = Shape(), byte_vocabulary(infill=False, add_bos=False)
    weights = random_weights(shape, vocabulary)
    for name, weight in weights.items():
        if name.endswith(("attn_output.weight", "ffn_down.weight")):
            weight[:] = 0
    weights["output_norm.weight"] = np.ones(shape.width, np.float32)
    weights["output.weight"][:] = 0
    tokens = (*TEXT.encode(), vocabulary.tokens.index(vocabulary.special["eos"]))
    for token, following in pairwise(tokens):
        weights["output.weight"][following] = weights["token_embd.weight"][token]
    return write_model(path, shape, vocabulary, weights)
