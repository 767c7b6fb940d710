"""The attention kernel: compared with numpy, and the same bits for a token in any batch."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import pytest

from afterword.engine.llama import accelerator, library
from afterword.engine.llama.runner import LlamaRunner
from afterword.engine.messages import LoadModel
from afterword.models.registry import builtin_path
from ggml_tensors import tensor, with_sources
from oracle.tiny import write_tiny

library.initialize(verbose=False)

ROUNDING = 1e-5  # of outputs of about 1, in float32


@pytest.fixture(scope="module")
def kernel(accelerator_library: ctypes.CDLL) -> ctypes.CDLL:
    return accelerator_library


@dataclass
class Case:
    """Queries [stream, head, token, element], keys and values [stream, head, cell, element].

    The mask is [stream, token, cell], the sinks are [head].
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    mask: np.ndarray | None
    scale: float = 0.125
    steepness: float = 0.0
    cap: float = 0.0
    sinks: np.ndarray | None = None


def computed(kernel: ctypes.CDLL, case: Case, threads: int = 1) -> np.ndarray:
    """[stream, token, head, element]."""
    out = np.full((case.q.shape[0], case.q.shape[2], case.q.shape[1], case.v.shape[3]), np.nan, np.float32)
    node = tensor(out)
    operands = [case.q, case.k, case.v]
    if case.mask is not None:
        operands.append(case.mask[:, None])
    with_sources(node, *map(tensor, operands))
    if case.sinks is not None:
        node.src[4] = ctypes.pointer(tensor(case.sinks[None, None, None]))
    node.params[:3] = [case.scale, case.steepness, case.cap]
    kernel.operation_compute(b"FLASH_ATTN_EXT", ctypes.byref(node), threads)
    return out


def plain(case: Case) -> np.ndarray:
    """The definition of attention, in float64."""
    heads, group = case.q.shape[1], case.q.shape[1] // case.k.shape[1]
    k, v = (np.repeat(x.astype(np.float64), group, axis=1) for x in (case.k, case.v))
    scores = case.scale * np.einsum("shtd,shcd->shtc", case.q.astype(np.float64), k)
    if case.cap:
        scores = case.cap * np.tanh(scores / case.cap)
    if case.mask is not None:
        slopes = 2.0 ** (-case.steepness / heads * np.arange(1, heads + 1)) if case.steepness else np.ones(heads)
        scores = scores + slopes[:, None, None] * case.mask.astype(np.float64)[:, None]
    # A sink is one more score of a head, without a value.
    sinks = np.full(heads, -np.inf) if case.sinks is None else case.sinks.astype(np.float64)
    highest = np.maximum(scores.max(-1, keepdims=True), sinks[:, None, None])
    weights = np.exp(scores - highest)
    weights /= weights.sum(-1, keepdims=True) + np.exp(sinks[:, None, None] - highest)
    return np.einsum("shtc,shcd->sthd", weights, v).astype(np.float32)


def make(
    *,
    streams: int = 1,
    heads: int = 4,
    kv_heads: int = 2,
    tokens: int = 9,
    cells: int = 256,
    dk: int = 64,
    dv: int = 64,
    window: int = 10**6,
) -> Case:
    """Random operands. Each token sees the last `window` cells up to its own, which is one of the last used ones."""
    rng = np.random.default_rng(0)
    q = rng.normal(size=(streams, heads, tokens, dk)).astype(np.float32) * 3
    k = rng.normal(size=(streams, kv_heads, cells, dk)).astype(np.float16)
    v = rng.normal(size=(streams, kv_heads, cells, dv)).astype(np.float16)
    taken = cells - rng.integers(0, cells - tokens, streams)
    last = taken[:, None] - tokens + np.arange(tokens)
    distance = last[:, :, None] - np.arange(cells)
    mask = np.where((distance >= 0) & (distance < window), 0, -np.inf).astype(np.float16)
    return Case(q, k, v, mask)


SHAPES = {
    "as usual": {},
    "one token": {"tokens": 1},
    "many tokens": {"tokens": 131},
    "several streams": {"streams": 3, "tokens": 2},
    "a head of keys for each of queries": {"heads": 4, "kv_heads": 4},
    "one head of keys for seven": {"heads": 7, "kv_heads": 1},
    "long heads": {"dk": 128, "dv": 128},
    "odd heads": {"dk": 80, "dv": 72},
    "cells that fill no block": {"cells": 77},
    "a window in one block": {"cells": 700, "window": 20},
    "a window of several blocks": {"cells": 700, "window": 200, "tokens": 131},
    "a window and several streams": {"cells": 733, "window": 100, "tokens": 2, "streams": 3},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_attention_agrees_with_numpy(kernel, shape):
    case = make(**shape)
    np.testing.assert_allclose(computed(kernel, case), plain(case), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(("tokens", "cells"), [(1, 40), (1, 1500), (70, 300)])
def test_the_thread_pool_computes_the_same_bits(kernel, thread_pool, tokens, cells):
    case = make(tokens=tokens, cells=cells)
    for threads in (1, 2, 5, 3):
        assert (computed(kernel, case, threads) == computed(kernel, case)).all()


def test_scores_can_be_capped(kernel):
    case = make()
    case.cap = 5.0
    np.testing.assert_allclose(computed(kernel, case), plain(case), rtol=0, atol=ROUNDING)


def test_slopes_weigh_the_mask(kernel):
    case = make(heads=8)
    case.steepness = 8.0
    assert case.mask is not None
    case.mask = np.where(np.isinf(case.mask), case.mask, -np.arange(case.mask.shape[-1])[::-1] / 16).astype(np.float16)
    np.testing.assert_allclose(computed(kernel, case), plain(case), rtol=0, atol=ROUNDING)


SINKS = {
    "of usual size": [0.5, -3.0, 6.0, 0.0],
    "above all scores": [200.0, 60.0, 30.0, 1000.0],
    "below all scores": [-200.0, -60.0, -1000.0, -90.0],
}


@pytest.mark.parametrize("sinks", SINKS.values(), ids=SINKS)
@pytest.mark.parametrize("shape", [{}, {"tokens": 1}, {"tokens": 131}, {"cells": 700, "window": 70}], ids=str)
def test_a_sink_takes_weight_and_adds_nothing(kernel, shape, sinks):
    case = make(**shape)
    case.sinks = np.array(sinks, np.float32)
    np.testing.assert_allclose(computed(kernel, case), plain(case), rtol=0, atol=ROUNDING)


def test_a_sink_of_minus_infinity_changes_nothing(kernel):
    case = make()
    expected = computed(kernel, case)
    case.sinks = np.full(4, -np.inf, np.float32)
    assert (computed(kernel, case) == expected).all()


def test_a_sink_is_neither_scaled_nor_capped_nor_weighed(kernel):
    case = make(heads=8)
    case.sinks = np.linspace(-9, 9, 8).astype(np.float32)
    case.cap, case.steepness = 5.0, 8.0
    np.testing.assert_allclose(computed(kernel, case), plain(case), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_sink_that_is_not_finite_reaches_its_head_and_no_other(kernel, value):
    case = make()
    case.sinks = np.zeros(4, np.float32)
    expected = computed(kernel, case)
    case.sinks[1] = value
    found = computed(kernel, case)
    assert np.isnan(found[:, :, 1]).all()
    assert (found[:, :, [0, 2, 3]] == expected[:, :, [0, 2, 3]]).all()


@pytest.mark.parametrize("sinks", [np.zeros((1, 1, 1, 2), np.float32), np.zeros((1, 1, 1, 4), np.float16)], ids=str)
def test_sinks_of_another_type_or_number_are_refused(kernel, sinks):
    case = make()
    node = tensor(np.zeros((1, 9, 4, 64), np.float32))
    with_sources(node, *map(tensor, (case.q, case.k, case.v, case.mask[:, None], np.zeros((1, 1, 1, 4), np.float32))))
    assert kernel.operation_supports(b"FLASH_ATTN_EXT", ctypes.byref(node))
    node.src[4] = ctypes.pointer(tensor(sinks))
    assert not kernel.operation_supports(b"FLASH_ATTN_EXT", ctypes.byref(node))


def test_without_a_mask_every_cell_is_seen(kernel):
    case = make()
    case.mask = None
    np.testing.assert_allclose(computed(kernel, case), plain(case), rtol=0, atol=ROUNDING)


def test_large_scores_do_not_overflow_and_small_ones_get_weight_zero(kernel):
    case = make()
    case.q = case.q * 300
    result = computed(kernel, case)
    np.testing.assert_allclose(result, plain(case), rtol=0, atol=2e-3)
    assert np.isfinite(result).all()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("dk", "window", "sink"), [(64, None, 0), (80, None, 0), (128, None, 0), (64, 70, 2.5)])
def test_a_token_has_the_same_bits_in_any_batch(kernel, dk, window, sink, threads):
    whole = make(streams=2, heads=6, kv_heads=2, tokens=90, dk=dk, dv=dk, window=window or 10**6)
    whole.sinks = np.arange(6, dtype=np.float32) - sink if sink else None
    expected = computed(kernel, whole)
    assert whole.mask is not None
    for first, end in [(0, 1), (3, 5), (89, 90), (7, 40), (64, 90)]:
        part = Case(
            np.ascontiguousarray(whole.q[1:, :, first:end]),
            whole.k[1:],
            whole.v[1:],
            np.ascontiguousarray(whole.mask[1:, first:end]),
            sinks=whole.sinks,
        )
        assert (computed(kernel, part, threads) == expected[1:, first:end]).all()


def test_masked_cells_and_the_size_of_the_cache_do_not_matter(kernel):
    case = make(tokens=5, cells=70)
    assert case.mask is not None
    expected = computed(kernel, case)
    rng = np.random.default_rng(1)
    more = ((0, 0), (0, 0), (0, 186), (0, 0))
    case.k, case.v = (np.pad(x, more) + np.pad(np.zeros_like(x), more) for x in (case.k, case.v))
    case.k[:, :, 70:] = rng.normal(size=case.k[:, :, 70:].shape)
    case.v[:, :, 70:] = 1000
    case.mask = np.pad(case.mask, ((0, 0), (0, 0), (0, 186)), constant_values=-np.inf)
    assert (computed(kernel, case) == expected).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", ["keys", "values", "both"])
@pytest.mark.parametrize(
    "shape",
    [{}, {"tokens": 1}, {"tokens": 131}, {"cells": 77}, {"dk": 80, "dv": 72}, {"streams": 3, "tokens": 2}],
    ids=str,
)
def test_masked_cells_that_are_not_finite_never_enter_a_sum(kernel, shape, part, value):
    """Another request may have left them. Some queries of a tile see a cell that is masked for the others."""
    case = make(**shape)
    assert case.mask is not None
    expected = computed(kernel, case)
    hidden = np.isinf(case.mask).all(1)[:, None, :, None]
    case.k, case.v = (
        np.where(hidden & (part in (kind, "both")), np.float16(value), x)
        for kind, x in (("keys", case.k), ("values", case.v))
    )
    assert (computed(kernel, case) == expected).all()


@pytest.mark.parametrize("cap", [0.0, 5.0])
@pytest.mark.parametrize("steepness", [0.0, 8.0])
@pytest.mark.parametrize("part", ["k", "v"])
def test_a_cell_that_is_not_finite_reaches_the_queries_that_see_it_and_no_others(kernel, part, cap, steepness):
    case = make(tokens=70, cells=300, heads=8)
    case.cap, case.steepness = cap, steepness
    assert case.mask is not None
    expected = computed(kernel, case)
    cell = int(np.flatnonzero(~np.isinf(case.mask[0, 40]))[-1])
    getattr(case, part)[:, :, cell] = np.nan
    found = computed(kernel, case, threads=3)
    assert (found[:, :40] == expected[:, :40]).all()
    assert np.isnan(found[:, 40:]).all()


# ---- which models use the kernel


def opened(path, kv_type="exact") -> LlamaRunner:
    return LlamaRunner(LoadModel(str(path), 256, 2, 1, 64, kv_type, 0, False, grid=1))


def test_the_kernel_computes_exact_attention_only(kernel):
    assert opened(builtin_path()).uses_own_attention
    assert not opened(builtin_path(), "f16").uses_own_attention


def test_with_an_unknown_ggml_the_kernels_are_off_and_one_line_states_what_is_lost(kernel, monkeypatch, capsys):
    monkeypatch.setattr(accelerator, "_KNOWN_GGML", (b"9999.",))
    assert not accelerator.register.__wrapped__()
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert line.startswith("Afterword's kernels are not used: ggml 0.")
    assert "(9999.x)" in line
    assert "slower" in line


def test_with_a_tensor_of_another_size_the_kernels_are_off(kernel, monkeypatch, capsys):
    monkeypatch.setattr(accelerator, "_OBJECT_BYTES", 16)
    assert not accelerator.register.__wrapped__()
    assert "a tensor of this ggml has 352 bytes and not 336" in capsys.readouterr().err


def test_without_a_back_end_for_the_processor_or_a_function_the_kernels_are_off(kernel, monkeypatch, capsys):
    monkeypatch.setattr(accelerator, "_ADDRESSES", (*accelerator._ADDRESSES, "ggml_no_such_function"))
    assert not accelerator.register.__wrapped__()
    assert "lacks functions" in capsys.readouterr().err
    monkeypatch.setattr(accelerator.native, "ggml_backend_reg_by_name", lambda name: None)
    assert not accelerator.register.__wrapped__()
    assert "no back end for the processor" in capsys.readouterr().err


def test_heads_that_the_kernel_refuses_are_computed_by_llama_cpp(kernel, tmp_path):
    """The head size must be a multiple of eight."""
    odd = write_tiny(tmp_path / "odd.gguf", heads=16)
    assert not opened(odd).uses_own_attention
