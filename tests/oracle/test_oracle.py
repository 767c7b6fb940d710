"""Tests of the oracle without an engine: arithmetic by hand and properties of causal attention."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from .oracle import Oracle, log_softmax, rotate
from .tiny import (
    Arch,
    FileType,
    Shape,
    Vocabulary,
    Weights,
    byte_vocabulary,
    piece_vocabulary,
    random_weights,
    write_model,
    write_tiny,
)

ARCHES: tuple[Arch, ...] = ("llama", "qwen2")
TOKENS = list(b"Once upon a time")
SHAPE = Shape(width=2, layers=1, heads=1, kv_heads=1, hidden=2)
WORDS = byte_vocabulary(infill=False, add_bos=False)


def plain_weights() -> Weights:
    """The weights of one layer of width 2 that returns its input: every matrix of the block is zero."""
    weights = random_weights(SHAPE, WORDS)
    zero = {name: np.zeros_like(weight) for name, weight in weights.items() if "blk" in name}
    one = {name: np.ones_like(weight) for name, weight in weights.items() if "norm" in name}
    return weights | zero | one


def test_blocks_of_zeros_leave_normalised_embeddings_times_output(tmp_path: Path) -> None:
    weights = plain_weights()
    weights["token_embd.weight"][65] = (3, 4)
    weights["output.weight"][:2] = (1, 0), (0, 2)
    row = Oracle(write_model(tmp_path / "m.gguf", SHAPE, WORDS, weights)).logits([65])[0]
    # (3, 4) has a mean square of 12.5.
    assert row[:2] == pytest.approx([3 / 12.5**0.5, 2 * 4 / 12.5**0.5], rel=1e-5)


def test_uniform_attention_is_the_mean_of_all_values_up_to_the_position(tmp_path: Path) -> None:
    weights = plain_weights()
    weights["token_embd.weight"][[65, 66]] = (1, 1), (1, -1)
    for part in ("v", "output"):
        weights[f"blk.0.attn_{part}.weight"] = np.eye(2, dtype=np.float32)
    weights["output.weight"][:2] = np.eye(2)
    rows = Oracle(write_model(tmp_path / "m.gguf", SHAPE, WORDS, weights)).logits([65, 66])[:, :2]
    # Normalization does not change these embeddings: (1, 1) + (1, 1), then (1, -1) + the mean (1, 0).
    assert rows == pytest.approx(np.array([[1, 1], [2 / 2.5**0.5, -1 / 2.5**0.5]]), rel=1e-5)


def test_feed_forward_is_gated_by_silu(tmp_path: Path) -> None:
    weights = plain_weights()
    weights["token_embd.weight"][65] = (1, -1)
    for part in ("gate", "up", "down"):
        weights[f"blk.0.ffn_{part}.weight"] = np.eye(2, dtype=np.float32)
    weights["output.weight"][:2] = np.eye(2)
    row = Oracle(write_model(tmp_path / "m.gguf", SHAPE, WORDS, weights)).logits([65])[0, :2]
    x = np.array([1, -1])
    x = x + x / (1 + np.exp(-x)) * x
    assert row == pytest.approx(x / np.sqrt(np.mean(x * x)), rel=1e-5)


@pytest.mark.parametrize("arch", ARCHES)
def test_a_later_token_does_not_change_earlier_rows(tmp_path: Path, arch: Arch) -> None:
    oracle = Oracle(write_tiny(tmp_path / "m.gguf", arch))
    rows, changed = oracle.logits(TOKENS), oracle.logits([*TOKENS[:9], 7, *TOKENS[10:]])
    assert changed[:9] == pytest.approx(rows[:9], abs=1e-12)
    assert all(np.abs(changed[9:] - rows[9:]).max(axis=1) > 0.1)
    assert oracle.logits(TOKENS[:5]) == pytest.approx(rows[:5], abs=1e-12)


@pytest.mark.parametrize("arch", ARCHES)
def test_the_order_of_earlier_tokens_matters(tmp_path: Path, arch: Arch) -> None:
    oracle = Oracle(write_tiny(tmp_path / "m.gguf", arch))
    assert np.abs(oracle.logits([1, 2, 3])[-1] - oracle.logits([2, 1, 3])[-1]).max() > 1e-2


@pytest.mark.parametrize("halves", [False, True])
def test_rope_products_depend_on_distance_alone(halves: bool) -> None:
    q, k = np.random.default_rng(0).standard_normal((2, 1, 1, 8))
    angles = np.outer(np.arange(40), [1.0, 0.3, 0.1, 0.01])

    def product(i: int, j: int) -> float:
        return float((rotate(q, angles[[i]], halves) * rotate(k, angles[[j]], halves)).sum())

    assert product(7, 3) == pytest.approx(product(37, 33), abs=1e-12)
    assert product(7, 3) != pytest.approx(product(7, 4), abs=1e-3)


def test_rope_pairs_are_adjacent_or_half_a_head_apart() -> None:
    x, quarter_turn = np.array([[[1.0, 2.0, 3.0, 4.0]]]), np.full((1, 2), np.pi / 2)
    assert rotate(x, quarter_turn, halves=False).ravel() == pytest.approx([-2, 1, -4, 3])
    assert rotate(x, quarter_turn, halves=True).ravel() == pytest.approx([-3, -4, 1, 2])


def test_probabilities_sum_to_one_and_large_scores_do_not_overflow(tmp_path: Path) -> None:
    assert log_softmax(np.array([1e4, 1e4, -np.inf])) == pytest.approx([-np.log(2), -np.log(2), -np.inf])
    rows = Oracle(write_tiny(tmp_path / "m.gguf")).log_probs(TOKENS)
    assert rows.shape == (len(TOKENS), len(byte_vocabulary(infill=True, add_bos=False).tokens))
    assert np.exp(rows).sum(axis=1) == pytest.approx(1)


def test_tied_output_is_the_embedding(tmp_path: Path) -> None:
    shape = Shape(arch="qwen2")
    tied = random_weights(shape, WORDS, tied=True)
    untied = tied | {"output.weight": tied["token_embd.weight"]}
    first, second = (
        Oracle(write_model(tmp_path / name, shape, WORDS, weights)).logits(TOKENS)
        for name, weights in (("tied.gguf", tied), ("untied.gguf", untied))
    )
    assert "output.weight" not in tied
    assert np.array_equal(first, second)


def test_grouped_heads_equal_repeated_ones(tmp_path: Path) -> None:
    grouped = Shape(heads=4, kv_heads=2)
    weights = random_weights(grouped, WORDS)
    repeated = dict(weights)
    for name in (name for name in weights if "attn_k" in name or "attn_v" in name):
        repeated[name] = np.repeat(weights[name].reshape(2, 16, 64), 2, axis=0).reshape(64, 64)
    one = write_model(tmp_path / "grouped.gguf", grouped, WORDS, weights)
    other = write_model(tmp_path / "repeated.gguf", replace(grouped, kv_heads=4), WORDS, repeated)
    assert Oracle(other).logits(TOKENS) == pytest.approx(Oracle(one).logits(TOKENS), abs=1e-12)


@pytest.mark.parametrize(
    ("file_type", "tolerance"), [("F16", 0.02), ("BF16", 0.2), ("Q8_0", 0.3), ("Q4_0", 9.0), ("Q4_1", 9.0)]
)
def test_other_weight_types_stay_near_f32(tmp_path: Path, file_type: FileType, tolerance: float) -> None:
    full = Oracle(write_tiny(tmp_path / "full.gguf")).logits(TOKENS)
    coarse = Oracle(write_tiny(tmp_path / "coarse.gguf", file_type=file_type)).logits(TOKENS)
    assert 0 < np.abs(coarse - full).max() < tolerance


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_greedy_continuation_varies(tmp_path: Path, arch: Arch, tied: bool) -> None:
    oracle = Oracle(write_tiny(tmp_path / "m.gguf", arch, tied=tied))
    tokens = list(TOKENS)
    for _ in range(40):
        tokens.append(int(oracle.logits(tokens)[-1].argmax()))
    assert len(set(tokens[-40:])) >= 5


@pytest.mark.parametrize("vocabulary", [byte_vocabulary, piece_vocabulary])
def test_vocabularies_have_infill_tokens_only_on_request(vocabulary: Callable[..., Vocabulary]) -> None:
    assert "<|fim_middle|>" in vocabulary(infill=True, add_bos=False).tokens
    assert not any("fim" in token for token in vocabulary(infill=False, add_bos=False).tokens)


def test_the_oracle_refuses_unknown_architectures(tmp_path: Path) -> None:
    strange = replace(SHAPE, arch="gpt2")  # type: ignore[arg-type]
    path = write_model(tmp_path / "m.gguf", strange, WORDS, plain_weights())
    with pytest.raises(ValueError, match="architecture gpt2"):
        Oracle(path)
