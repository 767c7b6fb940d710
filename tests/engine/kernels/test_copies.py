"""The kernels that copy elements: compared with numpy, for operands of any strides."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from engine.kernels.test_elementwise import computed, node_of, random, shaped, takes

AXES = [(0, 1, 2, 3), (0, 2, 1, 3), (3, 0, 1, 2), (0, 1, 3, 2), (2, 3, 1, 0)]


@pytest.fixture(scope="module")
def kernel(accelerator_library: ctypes.CDLL) -> ctypes.CDLL:
    return accelerator_library


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("threads", [1, 3])
def test_elements_are_copied_in_their_order(kernel, axes, threads):
    x = random(5, 6, 70, 33)[1:, :, 3:, 1:].transpose(axes)
    assert (computed(kernel, "CONT", x.shape, x, threads=threads) == x).all()
    flat = (1, 1, x.shape[0] * x.shape[1], x.shape[2] * x.shape[3])
    assert (computed(kernel, "CONT", flat, x, threads=threads) == x.reshape(flat)).all()


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("threads", [1, 3])
def test_elements_are_copied_into_a_cache(kernel, axes, threads):
    x = random(5, 6, 70, 33)[1:, :, 3:, 1:].transpose(axes)
    rows = (1, 1, x.shape[0], x[0].size)
    assert (computed(kernel, "CPY", rows, x, threads=threads) == x.reshape(rows)).all()


@pytest.mark.parametrize("taps", [2, 3, 4, 5])
@pytest.mark.parametrize("tokens", [1, 9])
def test_the_state_of_a_convolution(kernel, tokens, taps):
    """The last elements of each channel, with the tokens' elements behind them, and the last elements of these."""
    state, x = random(1, 3, 700, taps - 1), random(1, 3, tokens, 700, seed=1).transpose(0, 1, 3, 2)
    expected = np.concatenate([state, x], axis=3)
    joined = computed(kernel, "CONCAT", expected.shape, state, x, params={0: 0}, threads=2)
    assert (joined == expected).all()
    last = expected[..., tokens:]
    assert (computed(kernel, "CPY", (1, 1, 3, last[0, 0].size), joined[..., tokens:]) == last.reshape(3, -1)).all()


@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (0, 1, 3, 2)])
@pytest.mark.parametrize("dimension", range(4))
def test_the_second_operand_follows_the_first(kernel, dimension, axes):
    shapes = [[5, 4, 3, 6], [5, 4, 3, 6]]
    shapes[1][3 - dimension] = 9
    a, b = (random(*(shape[axis] for axis in axes), seed=seed).transpose(axes) for seed, shape in enumerate(shapes))
    expected = np.concatenate([a, b], axis=3 - dimension)
    assert (computed(kernel, "CONCAT", expected.shape, a, b, params={0: dimension}, threads=2) == expected).all()


@pytest.mark.parametrize("times", [(1, 1, 4, 1), (2, 3, 1, 1), (1, 1, 1, 5), (2, 3, 4, 5)])
def test_repeated_elements(kernel, times):
    x = random(2, 3, 2, 7)
    expected = np.tile(x, times)
    assert (computed(kernel, "REPEAT", expected.shape, x) == expected).all()


def test_one_number_in_all_elements(kernel):
    assert (computed(kernel, "FILL", (3, 50, 9), random(3, 50, 9), params={0: -np.inf}) == -np.inf).all()


@pytest.mark.parametrize("shape", [(1, 1, 0, 8), (1, 0, 3, 8), (2, 3, 4, 0)])
@pytest.mark.parametrize("dimension", [0, 2])
def test_nothing_is_copied(kernel, shape, dimension):
    """A tensor without rows: its numbers of rows divide nothing."""
    x = np.zeros(shape, np.float32)
    for name, sources in (("CONT", (x,)), ("CPY", (x,)), ("CONCAT", (x, x))):
        node = node_of(x, sources, {0: dimension})
        for each in (node, *(source.contents for source in node.src if source)):
            set_strides(each)
        assert takes(kernel, name, node)
        kernel.operation_compute(name.encode(), ctypes.byref(node), 2)


def set_strides(x):
    """Those of ggml: 0 behind an axis without elements."""
    x.nb[0] = 4
    for axis in range(1, 4):
        x.nb[axis] = x.nb[axis - 1] * x.ne[axis - 1]


def test_integers_are_copied(kernel):
    x = np.arange(24, dtype=np.int32).reshape(1, 1, 4, 6)
    copied = np.zeros((1, 1, 4, 3), np.int32)
    node = node_of(copied, (x[..., :3],), {})
    assert takes(kernel, "CONT", node)
    kernel.operation_compute(b"CONT", ctypes.byref(node), 1)
    assert (copied == x[..., :3]).all()


def test_other_forms_are_refused(kernel):
    x, halves = random(4, 8), random(4, 8).astype(np.float16)
    assert not takes(kernel, "CONT", node_of(shaped(x), (halves,), {})), "a conversion"
    assert not takes(kernel, "CONT", node_of(shaped(halves), (halves,), {})), "halves"
    assert not takes(kernel, "CONT", node_of(shaped(random(4, 16)[:, :8]), (x,), {})), "a result with gaps"
    assert not takes(kernel, "CPY", node_of(shaped(random(5, 8)), (x,), {})), "more elements"
    assert not takes(kernel, "CPY", node_of(shaped(halves), (x,), {})), "a conversion"
    assert not takes(kernel, "CONCAT", node_of(shaped(x), (x, halves), {0: 1})), "two types"
    assert not takes(kernel, "REPEAT", node_of(shaped(random(4, 9)), (x,), {})), "a part of a row"
