"""An independent reference implementation: the forward pass of a GGUF model in plain numpy.

It depends on numpy and the `gguf` package, and on no engine. It dequantizes weights as ggml does and computes in
float64. Every call computes all positions with full causal attention and keeps no state. Supported architectures:
`llama` (RoPE rotates adjacent pairs) and `qwen2` (biases on q, k, v; RoPE pairs the halves of a head). It refuses
all others.

An engine rounds more. It keeps K and V in F16 by default, and converts the activations of a matmul to F16 for F16
weights, to BF16 for BF16 weights, and to Q8_0 blocks for Q8_0, Q4_0 and Q4_1 weights. The table shows the largest
(mean) difference of log probabilities between this module and llama.cpp (llama-cpp-python 0.3.36, CPU with AVX2). The
models are those of `tiny.py`, whose logits spread widely: both architectures, both vocabularies, 200 random tokens, all
rows and columns.

    weights    F32 KV             F16 KV             F16 KV, flash attention
    F32        1.6e-5 (1e-6)      7.6e-3 (7e-4)      4.5e-3 (4e-4)
    F16        1.1e-2 (1e-3)      1.4e-2 (1e-3)      1.3e-2 (1e-3)
    BF16       8.6e-2 (1e-2)      6.9e-2 (1e-2)      7.3e-2 (1e-2)
    Q8_0       2.8e-1 (4e-2)      2.3e-1 (4e-2)      3.1e-1 (4e-2)
    Q4_0       2.5e-1 (4e-2)      2.8e-1 (4e-2)      2.5e-1 (4e-2)

These differences are rounding alone: if llama.cpp expands such a file to F32 and runs it with an F32 cache, the
largest difference from the oracle on the original file is 1.6e-5. To find a bug, test with F32 weights and F32 KV.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader
from gguf.quants import dequantize
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]

KINDS = {Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1}
ROPE_BY_HALVES = {"llama": False, "qwen2": True}


class Oracle:
    """The forward pass of one model file."""

    def __init__(self, path: str | Path) -> None:
        reader = GGUFReader(path)
        self.fields = {key: field.contents() for key, field in reader.fields.items()}
        self._check_supported({tensor.tensor_type for tensor in reader.tensors})
        # Copies, so that the mapped file may be deleted while the oracle is in use. Converting float32 weights in every
        # product would take most of the time of a short text.
        self._weights = {t.name: np.array(dequantize(t.data, t.tensor_type), np.float64) for t in reader.tensors}
        self._layers = int(self._hyperparameter("block_count"))
        self._heads = int(self._hyperparameter("attention.head_count"))
        self._kv_heads = int(self._hyperparameter("attention.head_count_kv", self._heads))
        self._head_size = len(self._weights["blk.0.attn_k.weight"]) // self._kv_heads
        self._halves = ROPE_BY_HALVES[self.fields["general.architecture"]]
        self._output = "output" if "output.weight" in self._weights else "token_embd"

    def logits(self, tokens: Sequence[int]) -> Array:
        """Logits of shape (len(tokens), vocabulary). Row i predicts the token after tokens[: i + 1]."""
        x = self._weights["token_embd.weight"][np.asarray(tokens, np.intp)]
        for layer in range(self._layers):
            x = x + self._attention(f"blk.{layer}.", x)
            x = x + self._feed_forward(f"blk.{layer}.", x)
        return self._product(self._output, self._norm("output_norm", x))

    def log_probs(self, tokens: Sequence[int]) -> Array:
        """The rows of `logits` as log probabilities (natural logarithm)."""
        return log_softmax(self.logits(tokens))

    def _attention(self, block: str, x: Array) -> Array:
        x = self._norm(block + "attn_norm", x)
        q, k, v = (self._product(block + name, x) for name in ("attn_q", "attn_k", "attn_v"))
        angles = self._angles(len(x))
        q = rotate(self._split(q, self._heads), angles, self._halves)
        k = rotate(self._split(k, self._kv_heads), angles, self._halves)
        mixed = self._attend(q, k, self._split(v, self._kv_heads))
        return self._product(block + "attn_output", mixed.reshape(len(x), -1))

    def _attend(self, q: Array, k: Array, v: Array) -> Array:
        """Causal attention. All arrays have the shape (position, head, dimension)."""
        group = self._heads // self._kv_heads
        k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(self._head_size)
        future = np.triu(np.ones(scores.shape[1:], bool), 1)
        shares = np.exp(log_softmax(np.where(future, -np.inf, scores)))
        return np.asarray(np.einsum("hij,jhd->ihd", shares, v))

    def _feed_forward(self, block: str, x: Array) -> Array:
        x = self._norm(block + "ffn_norm", x)
        gate, up = self._product(block + "ffn_gate", x), self._product(block + "ffn_up", x)
        return self._product(block + "ffn_down", gate / (1 + np.exp(-gate)) * up)

    def _norm(self, name: str, x: Array) -> Array:
        mean_square = np.mean(x * x, axis=-1, keepdims=True)
        epsilon = self._hyperparameter("attention.layer_norm_rms_epsilon")
        return np.asarray(x / np.sqrt(mean_square + epsilon) * self._weights[name + ".weight"])

    def _product(self, name: str, x: Array) -> Array:
        return np.asarray(x @ self._weights[name + ".weight"].T + self._weights.get(name + ".bias", 0.0))

    def _angles(self, length: int) -> Array:
        """The RoPE angle of each pair of dimensions at each position. Shape: (length, head_size / 2)."""
        pairs = np.arange(self._head_size // 2)
        frequencies = self._hyperparameter("rope.freq_base", 10000.0) ** (-2.0 * pairs / self._head_size)
        return np.asarray(np.outer(np.arange(length), frequencies / self._weights.get("rope_freqs.weight", 1.0)))

    def _split(self, x: Array, heads: int) -> Array:
        return x.reshape(len(x), heads, self._head_size)

    def _hyperparameter(self, name: str, default: Any = None) -> Any:
        value = self.fields.get(f"{self.fields['general.architecture']}.{name}", default)
        if value is None:
            raise ValueError(f"the file does not state {name}")
        return value

    def _check_supported(self, kinds: set[Kind]) -> None:
        """Raise `ValueError` for a model with features that this forward pass does not implement."""
        architecture = self.fields["general.architecture"]
        if architecture not in ROPE_BY_HALVES:
            raise ValueError(f"the oracle does not support the architecture {architecture}")
        if unknown := sorted(kind.name for kind in kinds - KINDS):
            raise ValueError(f"the oracle does not support weights of type {', '.join(unknown)}")
        if self._hyperparameter("rope.scaling.type", "none") != "none" or self._hyperparameter("expert_count", 0):
            raise ValueError("the oracle does not support RoPE scaling and experts")


def rotate(x: Array, angles: Array, halves: bool) -> Array:
    """Rotate each pair of dimensions of x (position, head, dimension), adjacent or half a head apart."""
    half = x.shape[-1] // 2
    first, second = (slice(half), slice(half, None)) if halves else (slice(0, None, 2), slice(1, None, 2))
    cosine, sine = np.cos(angles)[:, None], np.sin(angles)[:, None]
    rotated = np.empty_like(x)
    rotated[..., first] = x[..., first] * cosine - x[..., second] * sine
    rotated[..., second] = x[..., first] * sine + x[..., second] * cosine
    return rotated


def log_softmax(x: Array) -> Array:
    """The logarithm of the softmax over the last axis."""
    shifted = x - x.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))
