"""Measures a checkpoint's bits per byte on held-out text of each source, and the benefit of a suffix for infill.

Depends on the model, the tokenizer and the held-out documents.
"""

import math
import random
from collections import defaultdict

import torch
from tokenizers import Tokenizer
from torch.nn import functional

from training.data import pieces
from training.model import Llama
from training.rows import END, INFILL_LONGEST, MIDDLE, PREFIX, SUFFIX, borders


@torch.no_grad()
def bits_per_byte(model: Llama, tokenizer: Tokenizer, documents: list[tuple[str, str]]) -> dict[str, float]:
    """Bits per byte by source. Each document begins and ends with END. Text beyond the context starts a new window."""
    bits: dict[str, float] = defaultdict(float)
    size: dict[str, int] = defaultdict(int)
    for source, text in documents:
        ids = torch.tensor([END, *tokenizer.encode(text, add_special_tokens=False).ids, END])
        for at in range(0, len(ids) - 1, model.shape.context):
            window = ids[at : at + model.shape.context + 1]
            logits = model(window[None, :-1])[0]
            bits[source] += functional.cross_entropy(logits, window[1:], reduction="sum").item() / math.log(2)
        size[source] += len(text.encode())
    return {source: bits[source] / size[source] for source in bits}


@torch.no_grad()
def infill(model: Llama, tokenizer: Tokenizer, documents: list[tuple[str, str]]) -> dict[str, dict[str, float]]:
    """Bits per byte of middles with the suffix and with the prefix alone, and bits of the end token after a middle."""
    rng = random.Random(1)
    bits: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    size: dict[str, int] = defaultdict(int)
    count: dict[str, int] = defaultdict(int)
    for source, text in documents:
        for piece in pieces(text, INFILL_LONGEST):
            start, end = borders(piece, rng)
            parts = (piece[:start], piece[end:], piece[start:end])
            before, after, middle = (tokenizer.encode(part, add_special_tokens=False).ids for part in parts)
            known = _bits(model, [PREFIX, *before, SUFFIX, *after, MIDDLE], [*middle, END])
            bits[source]["with suffix"] += sum(known[:-1])
            bits[source]["end"] += known[-1]
            bits[source]["prefix alone"] += sum(_bits(model, [END, *before], middle))
            size[source] += len(parts[2].encode())
            count[source] += 1
    return {
        source: {name: sums / (count if name == "end" else size)[source] for name, sums in found.items()}
        for source, found in bits.items()
    }


def _bits(model: Llama, prompt: list[int], answer: list[int]) -> list[float]:
    """The bits of each token of `answer` after `prompt`."""
    ids = torch.tensor([*prompt, *answer])
    logits = model(ids[None, :-1])[0, len(prompt) - 1 :]
    return (functional.cross_entropy(logits, ids[len(prompt) :], reduction="none") / math.log(2)).tolist()
