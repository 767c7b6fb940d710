"""A model that knows one text: after each of its characters comes the next, and at its end the end of the text.

Its words are known beforehand, so tests can say where a character is split and where a stop string begins.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np

from oracle.tiny import Shape, byte_vocabulary, random_weights, write_model

TEXT = "(é😀漢) 1234567890."
"""No byte comes twice and no two make a token: one token a byte, and each tells which is next."""


def write_parrot(path: Path) -> Path:
    """Layers that add nothing, and an output that recognises each token's predecessor."""
    shape, words = Shape(), byte_vocabulary(infill=False, add_bos=False)
    weights = random_weights(shape, words)
    for name, weight in weights.items():
        if name.endswith(("attn_output.weight", "ffn_down.weight")):
            weight[:] = 0
    weights["output_norm.weight"] = np.ones(shape.width, np.float32)
    weights["output.weight"][:] = 0
    spelled = (*TEXT.encode(), words.tokens.index(words.special["eos"]))
    for token, following in pairwise(spelled):
        weights["output.weight"][following] = weights["token_embd.weight"][token]
    return write_model(path, shape, words, weights)
