"""From a row of logits to a token and its log probability. Pure numpy; randomness is an argument.

Order: bias, penalties, bans, temperature, then the filters (min_p, top_k, top_p). The log probabilities that are
reported are those of the unmodified row: what the model believes, not what was asked of it.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from afterword.engine.core.batch import Logits
from afterword.engine.protocol import Sampling, Token

GREEDY_BELOW = 1e-4
"""Temperatures below this are greedy: dividing by them would leave one token with all the mass anyway."""
_FIRST_NUCLEUS = 256


def uniform(key: bytes, sample: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments: a counter-based generator.

    `position` counts a sample's generated tokens. No state means that neither load nor order can change a draw.
    """
    digest = hashlib.blake2b(struct.pack("<QQ", sample, position), digest_size=8, key=key).digest()
    return float(int.from_bytes(digest, "little") >> 11) * 2.0**-53


def adjusted(
    logits: Logits, sampling: Sampling, prompt: Sequence[int], counts: Mapping[int, int], banned: Sequence[int]
) -> Logits:
    """The row with bias, penalties and bans applied; the row itself where there are none.

    `counts` are the sample's generated tokens. Only the repetition penalty looks at the prompt.
    """
    penalized = bool(counts) and bool(sampling.presence_penalty or sampling.frequency_penalty)
    repeated = sampling.repetition_penalty != 1.0
    if not (sampling.logit_bias or penalized or repeated or banned):
        return logits
    row = logits.copy()
    for token, bias in sampling.logit_bias:
        row[token] += bias
    if repeated:
        ids = np.unique(np.fromiter((*prompt, *counts), dtype=np.int64))
        factor = np.float32(sampling.repetition_penalty)
        row[ids] = np.where(row[ids] > 0, row[ids] / factor, row[ids] * factor)
    if penalized:
        ids = np.fromiter(counts.keys(), dtype=np.int64, count=len(counts))
        times = np.fromiter(counts.values(), dtype=np.float64, count=len(counts))
        row[ids] -= (times * sampling.frequency_penalty + sampling.presence_penalty).astype(np.float32)
    row[list(banned)] = -np.inf
    return row


def choose(row: Logits, sampling: Sampling, draw: float) -> int:
    """The next token from an adjusted row; `draw` is uniform in [0, 1)."""
    if sampling.temperature < GREEDY_BELOW:
        return int(np.argmax(row))
    weights = np.exp((row.astype(np.float64) - float(row.max())) / sampling.temperature)
    if sampling.min_p:
        weights[weights < sampling.min_p] = 0.0  # the likeliest token weighs 1
    if sampling.top_k:
        ids = likeliest(weights, min(sampling.top_k, len(weights)))
        ids = _head(ids, weights, sampling.top_p * float(weights[ids].sum()))
    elif sampling.top_p < 1.0:
        ids = nucleus(weights, sampling.top_p)
    else:
        return _pick(weights, draw)
    return int(ids[_pick(weights[ids], draw)])


def nucleus(weights: NDArray[np.float64], top_p: float) -> NDArray[np.int64]:
    """Ids of the smallest set of likeliest tokens whose share of all weight is at least `top_p`, likeliest first.

    Ties go to the lower id. The vocabulary is not sorted: a candidate set grows until it is large enough.
    """
    wanted = top_p * float(weights.sum())
    size = min(_FIRST_NUCLEUS, len(weights))
    while True:
        ids = likeliest(weights, size)
        if size == len(weights) or float(weights[ids].sum()) >= wanted:
            return _head(ids, weights, wanted)
        size = min(size * 8, len(weights))


def likeliest(values: NDArray[np.floating], count: int) -> NDArray[np.int64]:
    """Ids of the `count` largest values, largest first; ties go to the lower id."""
    if count < len(values):
        threshold = np.partition(values, len(values) - count)[len(values) - count]
        ids = np.flatnonzero(values >= threshold)
    else:
        ids = np.arange(len(values))
    return ids[np.argsort(-values[ids], kind="stable")][:count]


def report(logits: Logits, token: int, alternatives: int | None, rank: int = 0) -> Token:
    """The token with its log probability and the `alternatives` likeliest tokens; bare if None are asked for."""
    if alternatives is None:
        return Token(token)
    total = log_sum_exp(logits)
    top = likeliest(logits, alternatives) if alternatives else ()
    return Token(token, float(logits[token]) - total, tuple((int(i), float(logits[i]) - total) for i in top), rank)


def report_prompt(logits: Logits, token: int, alternatives: int | None) -> Token:
    """A token of the prompt, with its rank."""
    return report(logits, token, alternatives, rank=1 + int((logits > logits[token]).sum()))


def log_sum_exp(logits: Logits) -> float:
    """Natural log of the sum of exponentials, summed in float64."""
    highest = float(logits.max())
    return highest + math.log(float(np.exp(logits - np.float32(highest)).sum(dtype=np.float64)))


def _head(ids: NDArray[np.int64], weights: NDArray[np.float64], wanted: float) -> NDArray[np.int64]:
    """As many ids from the first on as weigh at least `wanted` together."""
    return ids[: int(np.searchsorted(np.cumsum(weights[ids]), wanted)) + 1]


def _pick(weights: NDArray[np.float64], draw: float) -> int:
    """Index drawn in proportion to the weights."""
    cumulated = np.cumsum(weights)
    index = int(np.searchsorted(cumulated, draw * cumulated[-1], side="right"))
    return min(index, len(weights) - 1)
