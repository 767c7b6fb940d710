"""The kernels of heads' products and of short columns: compared with numpy, and the same bits in any batch."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from afterword.engine.llama import accelerator
from engine.kernels.test_expert_matmul import experts_of
from engine.kernels.test_matmul import FLOATS, ROUNDING, TYPES, Memory, activations, in_file, rounded
from ggml_tensors import Tensor, tensor, with_sources

NAME = b"MUL_MAT"
COMPUTED = 1  # any operation: such a tensor is no matrix of the model


@pytest.fixture(scope="module")
def memory(kernel: ctypes.CDLL) -> Memory:
    assert accelerator.register()
    return Memory(kernel)


def columns_of(streams: int, tokens: int, heads: int, length: int) -> np.ndarray:
    """Activations [stream, head, token, element], in memory token by token as llama.cpp has them."""
    return activations(streams * tokens * heads, length).reshape(streams, tokens, heads, length).transpose(0, 2, 1, 3)


def node_of(matrices: Tensor, x: np.ndarray) -> tuple[Tensor, np.ndarray]:
    """The operation, and the array for its result: [stream, head, token, row]."""
    out = np.full((*x.shape[:3], matrices.ne[1]), np.nan, np.float32)
    return with_sources(tensor(out), matrices, tensor(x)), out


def multiplied(kernel: ctypes.CDLL, matrices: Tensor, x: np.ndarray, threads: int = 1) -> np.ndarray:
    node, out = node_of(matrices, x)
    assert kernel.operation_supports(NAME, ctypes.byref(node))
    kernel.operation_compute(NAME, ctypes.byref(node), threads)
    return out


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("sizes", [(64, 1, 1, 256), (48, 20, 1, 512), (77, 3, 2, 768), (16, 1, 5, 256)])
def test_products_agree_with_numpy(kernel, name, sizes):
    rows, tokens, streams, length = sizes
    matrices, _raw, values = experts_of(name, 3, rows, length)
    x = columns_of(streams, tokens, 3, length)
    flat = x.reshape(-1, length)
    exactly = (flat.astype(np.float64) if name in FLOATS else rounded(flat)).reshape(x.shape)
    wanted = np.einsum("hrk,shtk->shtr", values.astype(np.float64), exactly)
    size = np.einsum("hrk,shtk->shtr", np.abs(values).astype(np.float64), np.abs(exactly))
    assert np.abs((multiplied(kernel, matrices, x) - wanted) / size).max() < ROUNDING


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", TYPES)
def test_a_column_has_the_same_bits_with_any_other_columns(kernel, name, threads):
    matrices, _raw, _values = experts_of(name, 4, 96, 768)
    x = columns_of(2, 12, 4, 768)
    expected = multiplied(kernel, matrices, x)
    for part in [np.s_[:1, :, :1], np.s_[1:, :, 3:9], np.s_[:, :, 11:], np.s_[:, :, ::5]]:
        assert (multiplied(kernel, matrices, x[part], threads) == expected[part]).all()
    assert (multiplied(kernel, matrices, x.copy(), threads) == expected).all(), "in memory head by head"


@pytest.mark.parametrize("name", TYPES)
def test_a_head_computes_the_bits_of_a_product_with_its_matrix(kernel, name):
    matrices, raw, _values = experts_of(name, 4, 80, 768)
    x = columns_of(1, 9, 4, 768)
    expected = multiplied(kernel, matrices, x)
    for head in range(4):
        own = multiplied(kernel, in_file(name, raw[80 * head : 80 * (head + 1)]), x[:, head : head + 1])
        assert (own == expected[:, head : head + 1]).all()


@pytest.mark.parametrize("rows", [16, 48, 96])
@pytest.mark.parametrize("name", TYPES)
def test_packed_weights_give_the_same_bits(kernel, memory, name, rows):
    matrices, raw, _values = experts_of(name, 3, rows, 768)
    x = columns_of(2, 5, 3, 768)
    expected = multiplied(kernel, matrices, x)
    with memory.place(matrices, raw):
        for part in [np.s_[:], np.s_[:1, :, :1]]:
            assert (multiplied(kernel, matrices, x[part], threads=2) == expected[part]).all()


def test_the_thread_pool_computes_the_same_bits(kernel, thread_pool):
    assert thread_pool
    x = columns_of(2, 3, 5, 768)
    for name in TYPES:
        matrices, _raw, _values = experts_of(name, 5, 80, 768)
        expected = multiplied(kernel, matrices, x)
        for threads in (2, 3, 4):
            assert (multiplied(kernel, matrices, x, threads) == expected).all()


# ---- short columns


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def short(kernel: ctypes.CDLL, matrices: np.ndarray, x: np.ndarray, *, computed: int, threads: int = 1) -> np.ndarray:
    """The products. `matrices`: [stream, batch, row, element]; `x`: [stream, batch, column, element]."""
    first = tensor(matrices)
    first.op = computed
    return multiplied(kernel, first, x, threads)


@pytest.mark.parametrize("computed", [0, COMPUTED])
@pytest.mark.parametrize(("length", "rows", "columns"), [(4, 2048, 4), (4, 16, 70), (7, 5, 3), (31, 9, 1)])
def test_short_products_agree_with_numpy(kernel, length, rows, columns, computed):
    x = floats(2, 6, columns, length, seed=1)
    for matrices in [floats(2, 6, rows, length), floats(1, 2, rows, length), floats(1, 1, rows, length)]:
        repeated = np.repeat(np.repeat(matrices, 2 // len(matrices), 0), 6 // matrices.shape[1], 1)
        wanted = np.einsum("sbrk,sbck->sbcr", repeated.astype(np.float64), x)
        got = short(kernel, matrices, x, computed=computed, threads=2)
        np.testing.assert_allclose(got, wanted, rtol=0, atol=3e-5)


def test_a_short_column_has_the_same_bits_with_any_other_columns(kernel):
    matrices, x = floats(1, 40, 300, 4), floats(1, 40, 4, 4, seed=1)
    expected = short(kernel, matrices, x, computed=COMPUTED)
    assert (short(kernel, matrices, x, computed=COMPUTED, threads=3) == expected).all()
    for i in range(40):
        alone = short(kernel, matrices[:, i : i + 1], x[:, i : i + 1], computed=COMPUTED)
        assert (alone == expected[:, i : i + 1]).all()


def test_other_products_are_refused(kernel):
    def takes(first: Tensor, operand: np.ndarray) -> bool:
        node, _out = node_of(first, operand)
        return bool(kernel.operation_supports(NAME, ctypes.byref(node)))

    matrices, _raw, _values = experts_of("Q8_0", 4, 32, 256)
    x = columns_of(1, 3, 4, 256)
    assert takes(matrices, x)
    assert not takes(matrices, x[:, :2]), "fewer heads"
    matrices.op = COMPUTED
    assert not takes(matrices, x), "computed weights that are not floats"
    few, long, halves = (tensor(floats(1, 1, 8, width)) for width in (4, 40, 4))
    halves.type = 1
    assert takes(few, floats(1, 1, 3, 4))
    assert not takes(long, floats(1, 1, 3, 40)), "longer columns"
    assert not takes(halves, floats(1, 1, 3, 4)), "halves"
    few.view_src = few.data
    assert not takes(few, floats(1, 1, 3, 4)), "a view, as keys in the KV cache"
