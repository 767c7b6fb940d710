"""The kernel of experts' products: compared with numpy, and the same bits for a row with any other rows."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from afterword.engine.llama import accelerator
from engine.kernels.test_matmul import FLOATS, ROUNDING, TYPES, Memory, activations, in_file, rounded, weights
from ggml_tensors import Tensor, tensor, with_sources

NAME = b"MUL_MAT_ID"


@pytest.fixture(scope="module")
def memory(kernel: ctypes.CDLL) -> Memory:
    assert accelerator.register()
    return Memory(kernel)


def experts_of(name: str, experts: int, rows: int, length: int) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """The matrices of experts as one tensor, its bytes, and its values [expert, row, element]."""
    raw, values = weights(name, experts * rows, length)
    raw = raw.reshape(experts * rows, -1)
    matrices = in_file(name, raw)
    matrices.ne[:] = [length, rows, experts, 1]
    matrices.nb[2], matrices.nb[3] = rows * matrices.nb[1], raw.nbytes
    return matrices, raw, values.reshape(experts, rows, length)


def shared_by_all(columns: int, length: int, used: int) -> np.ndarray:
    """Activations [token, 1, element], which every expert of a token reads."""
    assert used
    return activations(columns, length)[:, None]


def of_each(columns: int, length: int, used: int) -> np.ndarray:
    """Activations [token, used, element]."""
    return activations(columns * used, length).reshape(columns, used, length)


def node_of(matrices: Tensor, x: np.ndarray, ids: np.ndarray) -> tuple[Tensor, np.ndarray]:
    """The operation, and the array for its result: [token, used, row]. `ids`: [token, used]; it may be a view."""
    out = np.full((len(ids), ids.shape[1], matrices.ne[1]), np.nan, np.float32)
    return with_sources(tensor(out[None]), matrices, tensor(x[None]), tensor(ids[None, None])), out


def selected(kernel: ctypes.CDLL, matrices: Tensor, x: np.ndarray, ids: np.ndarray, threads: int = 1) -> np.ndarray:
    node, out = node_of(matrices, x, ids)
    assert kernel.operation_supports(NAME, ctypes.byref(node))
    kernel.operation_compute(NAME, ctypes.byref(node), threads)
    return out


def uneven(tokens: int, used: int, experts: int) -> np.ndarray:
    """Selections of which expert 0 gets most, expert 1 exactly one, and the last expert none."""
    ids = np.random.default_rng(3).integers(2, experts - 1, (tokens, used)).astype(np.int32)
    ids[:, 0] = 0
    ids[tokens // 2, -1] = 1
    return ids


@pytest.mark.parametrize("activations_of", [shared_by_all, of_each])
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("sizes", [(64, 1, 2, 256), (48, 20, 3, 512), (77, 9, 4, 768)])
def test_products_agree_with_numpy(kernel, name, sizes, activations_of):
    rows, tokens, used, length = sizes
    matrices, _raw, values = experts_of(name, 7, rows, length)
    ids = uneven(tokens, used, 7)
    x = activations_of(tokens, length, used)
    flat = x.reshape(-1, length)
    exactly = (flat.astype(np.float64) if name in FLOATS else rounded(flat)).reshape(x.shape)
    chosen = values.astype(np.float64)[ids]  # [token, used, row, element]
    wanted = np.einsum("turk,tuk->tur", chosen, np.broadcast_to(exactly, (tokens, used, length)))
    size = np.einsum("turk,tuk->tur", np.abs(chosen), np.broadcast_to(np.abs(exactly), (tokens, used, length)))
    assert np.abs((selected(kernel, matrices, x, ids) - wanted) / size).max() < ROUNDING


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", TYPES)
def test_a_row_has_the_same_bits_with_any_other_rows(kernel, name, threads):
    matrices, _raw, _values = experts_of(name, 6, 96, 1280)
    ids, x = uneven(24, 4, 6), of_each(24, 1280, 4)
    expected = selected(kernel, matrices, x, ids)
    for first, end in [(0, 1), (11, 13), (23, 24), (5, 24)]:
        part, of_part = np.ascontiguousarray(x[first:end]), np.ascontiguousarray(ids[first:end])
        assert (selected(kernel, matrices, part, of_part, threads) == expected[first:end]).all()
    order = np.random.default_rng(5).permutation(24)
    assert (selected(kernel, matrices, x[order], ids[order], threads) == expected[order]).all()
    together = np.zeros((24, 4), np.int32)  # one expert gets all rows
    alone = [selected(kernel, matrices, x[i : i + 1], together[i : i + 1]) for i in range(24)]
    assert (selected(kernel, matrices, x, together, threads) == np.concatenate(alone)).all()


@pytest.mark.parametrize("name", TYPES)
def test_an_expert_computes_the_bits_of_a_product_with_its_matrix(kernel, name):
    matrices, raw, _values = experts_of(name, 4, 80, 768)
    x, ids = shared_by_all(9, 768, 1), np.full((9, 1), 2, np.int32)
    matrix = in_file(name, raw[2 * 80 : 3 * 80])
    out = np.full((9, 80), np.nan, np.float32)
    node = with_sources(tensor(out[None, None]), matrix, tensor(x[:, 0][None, None]))
    kernel.operation_compute(b"MUL_MAT", ctypes.byref(node), 1)
    assert (selected(kernel, matrices, x, ids)[:, 0] == out).all()


@pytest.mark.parametrize("rows", [16, 48, 96])
@pytest.mark.parametrize("name", TYPES)
def test_packed_weights_give_the_same_bits(kernel, memory, name, rows):
    matrices, raw, _values = experts_of(name, 5, rows, 768)
    ids, x = uneven(12, 3, 5), shared_by_all(12, 768, 3)
    expected = selected(kernel, matrices, x, ids)
    with memory.place(matrices, raw):
        for first, end in [(0, 12), (2, 3)]:
            part, of_part = np.ascontiguousarray(x[first:end]), np.ascontiguousarray(ids[first:end])
            assert (selected(kernel, matrices, part, of_part, threads=2) == expected[first:end]).all()
        assert (memory.get(matrices, 0, raw.nbytes) == raw.ravel()).all()


@pytest.mark.parametrize("name", TYPES)
def test_experts_can_be_written_one_by_one(memory, name):
    matrices, raw, _values = experts_of(name, 3, 32, 2 * max(32, GGML_QUANT_SIZES[GGMLQuantizationType[name]][0]))
    raw = raw.copy()
    size = raw.nbytes // 3
    with memory.place(matrices, raw):
        raw[32:64] = raw[32:64][::-1].copy()
        memory.set(matrices, raw[32:64].copy(), size)
        assert (memory.get(matrices, 0, raw.nbytes) == raw.ravel()).all()
        assert (memory.get(matrices, size, size) == raw[32:64].ravel()).all()


def test_a_token_may_select_an_expert_twice(kernel):
    matrices, _raw, _values = experts_of("Q8_0", 4, 32, 256)
    x = of_each(5, 256, 3)
    got = selected(kernel, matrices, x, np.array([[1, 1, 3]] * 5, np.int32))
    once = selected(kernel, matrices, np.ascontiguousarray(x[:, :2]), np.array([[1, 1]] * 5, np.int32))
    assert (got[:, :2] == once).all()


def test_selections_may_be_a_part_of_sorted_experts(kernel):
    """llama.cpp passes a view of the first elements of each row of a sorted list."""
    matrices, _raw, _values = experts_of("Q8_0", 8, 32, 256)
    x = shared_by_all(6, 256, 2)
    whole = np.argsort(np.random.default_rng(1).normal(size=(6, 8)), axis=1).astype(np.int32)
    view = whole[:, :2]
    assert (selected(kernel, matrices, x, view) == selected(kernel, matrices, x, view.copy())).all()


def test_a_number_of_no_expert_gives_nan_and_changes_no_other_row(kernel):
    matrices, _raw, _values = experts_of("Q8_0", 4, 32, 256)
    ids, x = uneven(6, 2, 4), of_each(6, 256, 2)
    expected = selected(kernel, matrices, x, ids)
    ids[1, 0], ids[4, 1] = 4, -1
    got = selected(kernel, matrices, x, ids)
    wrong = np.zeros((6, 2), bool)
    wrong[1, 0] = wrong[4, 1] = True
    assert np.isnan(got[wrong]).all()
    assert (got[~wrong] == expected[~wrong]).all()


def test_the_thread_pool_computes_the_same_bits(kernel, thread_pool):
    assert thread_pool
    ids, x = uneven(9, 3, 6), shared_by_all(9, 1280, 3)
    for name in TYPES:
        matrices, _raw, _values = experts_of(name, 6, 80, 1280)
        expected = selected(kernel, matrices, x, ids)
        for threads in (2, 3, 4):
            assert (selected(kernel, matrices, x, ids, threads) == expected).all()


def test_other_products_are_refused(kernel):
    matrices, _raw, _values = experts_of("Q8_0", 4, 32, 256)
    x, ids = of_each(3, 256, 2), np.zeros((3, 2), np.int32)

    def takes(operand: np.ndarray, numbers: np.ndarray) -> bool:
        node, _out = node_of(matrices, operand, numbers)
        return bool(kernel.operation_supports(NAME, ctypes.byref(node)))

    assert takes(x, ids)
    assert not takes(x, ids.astype(np.int64)), "numbers of another type"
    assert not takes(x[:2], ids), "another number of tokens"
    assert not takes(x, np.zeros((3, 3), np.int32)), "another number of experts"
    matrices.type = 16  # IQ2_XXS
    assert not takes(x, ids), "another type of weights"
