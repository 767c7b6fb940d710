"""The kernel of feed-forward gates by itself: against the definition, and the same bits in any company."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from ggml_tensors import Tensor, tensor, with_sources

SWIGLU, GEGLU = 2, 1


@pytest.fixture(scope="module")
def kernel(accelerator_library: ctypes.CDLL) -> ctypes.CDLL:
    return accelerator_library


def gated(x: np.ndarray, factors: np.ndarray, out: np.ndarray, which: int = SWIGLU) -> Tensor:
    node = with_sources(tensor(out[None, None]), tensor(x[None, None]), tensor(factors[None, None]))
    node.params[0] = np.int32(which).view(np.float32)  # the field is of floats here
    return node


def computed(kernel: ctypes.CDLL, x: np.ndarray, factors: np.ndarray, threads: int = 1) -> np.ndarray:
    out = np.full(x.shape, np.nan, np.float32)
    node = gated(x, factors, out)
    assert kernel.swiglu_takes(ctypes.byref(node))
    kernel.swiglu_compute(ctypes.byref(node), threads)
    return out


def operands(rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(0, 5, (rows, length)).astype(np.float32), rng.normal(0, 2, (rows, length)).astype(np.float32)


@pytest.mark.parametrize("length", [1, 7, 16, 37, 4864])
def test_it_agrees_with_the_definition(kernel, length):
    x, factors = operands(3, length)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(computed(kernel, x, factors), wide / (1 + np.exp(-wide)) * factors, rtol=1e-6)


def test_a_row_has_the_same_bits_in_any_company(kernel, team):
    x, factors = operands(9, 100)
    wanted = computed(kernel, x, factors)
    for threads in (1, 2, 3):
        assert (computed(kernel, x, factors, threads) == wanted).all()
        assert (computed(kernel, x[4:5].copy(), factors[4:5].copy(), threads) == wanted[4:5]).all()


def test_of_large_numbers_all_or_nothing_is_left(kernel):
    x = np.array([[1e4, -1e4, 89, -89, np.inf, 0]], np.float32)
    wanted = [1e4, 0, 89, 0, np.inf, 0]
    assert computed(kernel, x, np.ones_like(x))[0].tolist() == pytest.approx(wanted, abs=1e-30)


def test_what_is_no_number_does_not_spread(kernel):
    x, factors = operands(2, 20)
    wanted = computed(kernel, x, factors)
    x[0, 3] = np.nan
    out = computed(kernel, x, factors)
    assert np.isnan(out[0, 3])
    out[0, 3] = wanted[0, 3]
    assert (out == wanted).all()


def test_other_gates_are_left_to_the_library(kernel):
    x, factors = operands(1, 16)
    assert not kernel.swiglu_takes(ctypes.byref(gated(x, factors, x.copy(), GEGLU)))
