"""Models that generate known tokens: after a token of a chain comes the next one, whatever stands before it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from oracle.tiny import Shape, Vocabulary, random_weights, write_model


def write_chain_model(path: Path, vocabulary: Vocabulary, chain: Sequence[int], context: int = 512) -> Path:
    """Write a model with layers that add zero and output weights that map each token of `chain` to its successor.

    No token occurs twice in `chain`, so that every token determines the next one.
    """
    assert len(set(chain)) == len(chain)
    shape = Shape(context=context)
    weights = random_weights(shape, vocabulary)
    for name, weight in weights.items():
        if name.endswith(("attn_output.weight", "ffn_down.weight")):
            weight[:] = 0
    weights["output_norm.weight"] = np.ones(shape.width, np.float32)
    weights["output.weight"][:] = 0
    for token, following in pairwise(chain):
        weights["output.weight"][following] = weights["token_embd.weight"][token]
    return write_model(path, shape, vocabulary, weights)
