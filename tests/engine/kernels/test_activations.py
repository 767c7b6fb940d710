"""The kernels of single elements and of gates: compared with numpy, and the same bits for a row in any batch."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import pytest

from engine.kernels.test_elementwise import ROUNDING, computed, node_of, random, shaped, takes

TANH, RELU, SIGMOID, GELU, QUICK_GELU, SILU, SOFTPLUS, ERROR_GELU = 4, 6, 7, 8, 9, 10, 15, 16
REGLU, GEGLU, SWIGLU, SWIGLU_OAI, ERROR_GEGLU, QUICK_GEGLU, SWIGLU_CLAMP = range(7)
WIDTHS = [1, 6, 8, 60, 64, 896]
LIMIT, SLOPE = 7.0, 1.702


@pytest.fixture(scope="module")
def kernel(accelerator_library: ctypes.CDLL) -> ctypes.CDLL:
    return accelerator_library


def sigmoid(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


FUNCTIONS = {
    TANH: np.tanh,
    RELU: lambda x: np.maximum(x, 0),
    SIGMOID: sigmoid,
    GELU: lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * x * (1 + 0.044715 * x * x))),
    QUICK_GELU: lambda x: x * sigmoid(1.702 * x),
    SILU: lambda x: x * sigmoid(x),
    SOFTPLUS: lambda x: np.logaddexp(0, x),
    ERROR_GELU: lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
}
"""The functions of float64 by ggml's number."""


def numbers(*shape: int) -> np.ndarray:
    """Numbers of every size, from the smallest to those at which powers of e leave the range of floats."""
    x = random(*shape) * np.float32(4)
    special = [0, -0.0, 1e-30, -1e-5, 0.02, -0.7, 1, -3, 5.5, -10, 30, -89, 89, -500, 1000]
    x.reshape(-1)[: min(len(special), x.size)] = special[: x.size]
    return x


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("number", FUNCTIONS)
def test_functions(kernel, number, width):
    x = numbers(3, 5, width)
    got = computed(kernel, "UNARY", x.shape, x, params={0: number})
    np.testing.assert_allclose(got, FUNCTIONS[number](x.astype(np.float64)), rtol=ROUNDING, atol=1e-6)


@pytest.mark.parametrize("number", FUNCTIONS)
def test_functions_keep_nan(kernel, number):
    x = np.full((2, 12), np.nan, np.float32)
    assert np.isnan(computed(kernel, "UNARY", x.shape, x, params={0: number})).all()


@pytest.mark.parametrize("width", WIDTHS)
def test_squares_and_roots(kernel, width):
    x = numbers(4, width)
    assert (computed(kernel, "SQR", x.shape, x) == x * x).all()
    assert (computed(kernel, "SQRT", x.shape, np.abs(x)) == np.sqrt(np.abs(x))).all()


def limited(x: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.minimum(x, LIMIT), np.clip(other, -LIMIT, LIMIT)


def swiglu_oai(x: np.ndarray, other: np.ndarray) -> np.ndarray:
    x, other = limited(x, other)
    return x * sigmoid(SLOPE * x) * (other + 1)


def swiglu_clamp(x: np.ndarray, other: np.ndarray) -> np.ndarray:
    x, other = limited(x, other)
    return x * sigmoid(x) * other


GATES = {
    REGLU: lambda x, other: FUNCTIONS[RELU](x) * other,
    GEGLU: lambda x, other: FUNCTIONS[GELU](x) * other,
    SWIGLU: lambda x, other: FUNCTIONS[SILU](x) * other,
    SWIGLU_OAI: swiglu_oai,
    ERROR_GEGLU: lambda x, other: FUNCTIONS[ERROR_GELU](x) * other,
    QUICK_GEGLU: lambda x, other: FUNCTIONS[QUICK_GELU](x) * other,
    SWIGLU_CLAMP: swiglu_clamp,
}


@pytest.mark.parametrize("width", [6, 8, 64, 896])
@pytest.mark.parametrize("form", ["two tensors", "halves", "halves, swapped"])
@pytest.mark.parametrize("number", GATES)
def test_gates(kernel, number, form, width):
    x, other = numbers(5, width), random(5, width, seed=1) * np.float32(5)
    both = {
        "two tensors": (x, other),
        "halves": (np.concatenate([x, other], 1), None),
        "halves, swapped": (np.concatenate([other, x], 1), None),
    }[form]
    params = {0: number, 1: int("swapped" in form), 2: SLOPE, 3: LIMIT}
    got = computed(kernel, "GLU", x.shape, *both, params=params)
    expected = GATES[number](x.astype(np.float64), other.astype(np.float64))
    np.testing.assert_allclose(got, expected, rtol=ROUNDING, atol=5e-6)


@pytest.mark.parametrize("number", GATES)
def test_gates_keep_nan(kernel, number):
    x = random(2, 12)
    x[0, 3], x[1, 9] = np.nan, np.nan
    for both in [(x, random(2, 12, seed=1)), (random(2, 12, seed=1), x)]:
        got = computed(kernel, "GLU", x.shape, *both, params={0: number, 2: SLOPE, 3: LIMIT})
        assert (np.isnan(got) == np.isnan(x)).all()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("width", [60, 96])
def test_a_row_has_the_same_bits_in_any_batch(kernel, threads, width):
    x, other = numbers(900, width), random(900, width, seed=1)
    forms = [("UNARY", (x,), {0: number}) for number in FUNCTIONS]
    forms += [("GLU", (x, other), {0: number, 2: SLOPE, 3: LIMIT}) for number in GATES]
    for name, sources, params in [*forms, ("SQR", (x,), {}), ("SQRT", (np.abs(x),), {})]:
        together = computed(kernel, name, x.shape, *sources, params=params, threads=threads)
        own = tuple(np.ascontiguousarray(source[77:78]) for source in sources)
        assert (computed(kernel, name, (1, width), *own, params=params) == together[77]).all(), (name, params)


def test_other_forms_are_refused(kernel):
    x = random(4, 8)
    unknown = {"UNARY": (13, 17, 20), "GLU": (7,)}
    for name, kinds in unknown.items():
        for number in kinds:
            assert not takes(kernel, name, node_of(shaped(x), (x, x), {0: number})), (name, number)
    assert not takes(kernel, "UNARY", node_of(shaped(x), (random(4, 16)[:, ::2],), {0: SILU})), "elements apart"
    assert not takes(kernel, "GLU", node_of(shaped(x), (x, None), {0: SWIGLU})), "a row that is half as long"
    assert not takes(kernel, "GLU", node_of(shaped(x), (x, random(4, 4)), {0: SWIGLU})), "tensors of two widths"
    halves = x.astype(np.float16)
    assert not takes(kernel, "SQR", node_of(shaped(halves), (halves,), {})), "halves"
