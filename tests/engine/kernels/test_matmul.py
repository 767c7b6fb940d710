"""The matmul kernels: compared with numpy, and the same bits for a column in any batch."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from afterword.engine.llama import accelerator
from afterword.engine.llama.library import native
from ggml_tensors import Tensor, tensor, with_sources

QUANTIZED = [
    "Q8_0",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "IQ4_NL",
    "IQ4_XS",
    "MXFP4",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
]
FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": None}
TYPES = [*QUANTIZED, *FLOATS]
SCALES = {  # offsets of the halves in a block; random bits could be NaN or infinity, so they get small numbers
    "Q8_0": [0],
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "IQ4_NL": [0],
    "IQ4_XS": [0],
    "MXFP4": [],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
}
ROUNDING = 3e-6  # error of a sum, relative to the sum of the absolute values


@pytest.fixture(scope="module")
def memory(kernel: ctypes.CDLL) -> Memory:
    assert accelerator.register()
    return Memory(kernel)


class Memory:
    """Buffers of packed weights, through ggml's functions."""

    def __init__(self, kernel: ctypes.CDLL) -> None:
        kernel.accelerator_buffer_type.restype = ctypes.c_void_p
        self._kind = ctypes.c_void_p(kernel.accelerator_buffer_type())
        self._ggml = native.handle
        for name in ("ggml_backend_buft_alloc_buffer", "ggml_backend_buffer_get_base"):
            getattr(self._ggml, name).restype = ctypes.c_void_p
        self._ggml.ggml_backend_buft_get_alloc_size.restype = ctypes.c_size_t

    def make(self, size: int) -> ctypes.c_void_p | None:
        """A buffer; None if there is not enough memory."""
        made = self._ggml.ggml_backend_buft_alloc_buffer(self._kind, ctypes.c_size_t(size))
        return ctypes.c_void_p(made) if made else None

    @contextmanager
    def place(self, matrix: Tensor, raw: np.ndarray) -> Iterator[None]:
        """Keep the matrix in such a buffer while the context is entered."""
        pointer, matrix.data = ctypes.byref(matrix), None
        buffer = self.make(self._ggml.ggml_backend_buft_get_alloc_size(self._kind, pointer))
        base = ctypes.c_void_p(self._ggml.ggml_backend_buffer_get_base(buffer))
        assert self._ggml.ggml_backend_tensor_alloc(buffer, pointer, base) == 0
        self.set(matrix, raw, 0)
        yield
        self._ggml.ggml_backend_buffer_free(buffer)

    def set(self, matrix: Tensor, raw: np.ndarray, offset: int) -> None:
        """Write `raw`, in the order of the file, to the matrix from byte `offset` on."""
        at, size = ctypes.c_void_p(raw.ctypes.data), ctypes.c_size_t(raw.nbytes)
        self._ggml.ggml_backend_tensor_set(ctypes.byref(matrix), at, ctypes.c_size_t(offset), size)

    def get(self, matrix: Tensor, offset: int, size: int) -> np.ndarray:
        """`size` bytes of the matrix from byte `offset` on, in the order of the file."""
        raw = np.zeros(size, np.uint8)
        at = ctypes.c_void_p(raw.ctypes.data)
        self._ggml.ggml_backend_tensor_get(ctypes.byref(matrix), at, ctypes.c_size_t(offset), ctypes.c_size_t(size))
        return raw


def weights(name: str, rows: int, length: int, filled: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Random blocks in the order of a file, [row, byte], and their values, [row, element].

    `filled`: the value of all bytes but the scales of blocks.
    """
    kind = GGMLQuantizationType[name]
    rng = np.random.default_rng(1)
    if name in FLOATS:
        raw = quants.quantize(rng.normal(size=(rows, length)).astype(np.float32), kind).view(np.uint8)
        return raw, quants.dequantize(raw if name == "BF16" else raw.view(FLOATS[name]), kind)
    shape = quants.quant_shape_to_byte_shape((rows, length), kind)
    raw = rng.integers(0, 256, shape, np.uint8) if filled is None else np.full(shape, filled, np.uint8)
    blocks = raw.reshape(rows, -1, GGML_QUANT_SIZES[kind][1])
    if name == "MXFP4":  # the scale is an exponent
        blocks[:, :, 0] = rng.integers(116, 124, blocks.shape[:2])
    for offset in SCALES[name]:
        halves = rng.uniform(-0.02, 0.02, blocks.shape[:2]).astype(np.float16)
        blocks[:, :, offset : offset + 2] = halves[..., None].view(np.uint8)
    return raw, quants.dequantize(raw, kind)


def rounded(x: np.ndarray) -> np.ndarray:
    """Activations rounded as the kernel rounds them: integers up to 127, with a scale for each 32."""
    pieces = x.reshape(len(x), -1, 32)
    most = np.abs(pieces).max(-1, keepdims=True)
    units = np.divide(np.float32(127), most, where=most > 0, out=np.zeros_like(most))
    return (np.rint(pieces * units).astype(np.float64) * (most / np.float32(127))).reshape(x.shape)


def activations(columns: int, length: int) -> np.ndarray:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(columns, length)).astype(np.float32)
    x[:, 64:96] *= 100
    x[:, 32:64] = 0
    return x


def in_file(name: str, raw: np.ndarray) -> Tensor:
    """A matrix in the order of the file."""
    kind = GGMLQuantizationType[name]
    elements, size = GGML_QUANT_SIZES[kind]
    matrix = Tensor(type=int(kind), data=raw.ctypes.data)
    matrix.ne[:] = [raw.shape[1] // size * elements, len(raw), 1, 1]
    matrix.nb[:] = [size, raw.strides[0], raw.nbytes, raw.nbytes]
    return matrix


def product(kernel: ctypes.CDLL, name: str, raw: np.ndarray, x: np.ndarray, threads: int = 1) -> np.ndarray:
    """[column, row]."""
    return multiplied(kernel, in_file(name, raw), x, threads)


def multiplied(kernel: ctypes.CDLL, matrix: Tensor, x: np.ndarray, threads: int = 1) -> np.ndarray:
    """[column, row]."""
    out = np.full((len(x), matrix.ne[1]), np.nan, np.float32)
    node = with_sources(tensor(out[None, None]), matrix, tensor(x[None, None]))
    assert kernel.operation_supports(b"MUL_MAT", ctypes.byref(node))
    kernel.operation_compute(b"MUL_MAT", ctypes.byref(node), threads)
    return out


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize(
    ("rows", "columns", "length"),
    [(64, 1, 256), (48, 2, 512), (5, 3, 2304), (96, 4, 256), (32, 7, 1024), (77, 14, 768)],
)
def test_products_agree_with_numpy(kernel, name, rows, columns, length):
    raw, values = weights(name, rows, length)
    x = activations(columns, length)
    rounded_x = x.astype(np.float64) if name in FLOATS else rounded(x)
    exact = rounded_x @ values.astype(np.float64).T
    size = np.abs(rounded_x) @ np.abs(values.astype(np.float64)).T
    assert np.abs((product(kernel, name, raw, x) - exact) / size).max() < ROUNDING


def test_a_product_without_columns_writes_nothing(kernel, memory):
    raw, _ = weights("Q8_0", 64, 256)
    x, out = activations(1, 256), np.full((1, 64), np.nan, np.float32)
    matrix = in_file("Q8_0", raw)
    node = with_sources(tensor(out[None, None]), matrix, columns := tensor(x[None, None]))
    node.ne[1] = columns.ne[1] = 0  # as in a pass without outputs
    with memory.place(matrix, raw):
        assert kernel.operation_supports(b"MUL_MAT", ctypes.byref(node))
        kernel.operation_compute(b"MUL_MAT", ctypes.byref(node), 1)
    assert np.isnan(out).all()


@pytest.mark.parametrize("filled", [0x00, 0x77, 0xFF])
@pytest.mark.parametrize("name", QUANTIZED)
def test_the_largest_bytes_overflow_no_sum(kernel, name, filled):
    raw, values = weights(name, 16, 512, filled)
    values = values.astype(np.float64)
    x = np.repeat(np.array([[1], [-1]], np.float32), 512, axis=1)
    size = np.abs(values).sum(1) + 1e-30
    assert (np.abs(product(kernel, name, raw, x) - x.astype(np.float64) @ values.T) / size).max() < ROUNDING


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", TYPES)
def test_a_column_has_the_same_bits_in_any_batch(kernel, name, threads):
    raw, _ = weights(name, 200, 1280)
    x = activations(20, 1280)
    expected = product(kernel, name, raw, x)
    for first, end in [(0, 1), (3, 5), (19, 20), (7, 20), (1, 14)]:
        part = np.ascontiguousarray(x[first:end])
        assert (product(kernel, name, raw, part, threads) == expected[first:end]).all()


@pytest.mark.parametrize("rows", [1, 16, 40, 96, 200])
@pytest.mark.parametrize("name", TYPES)
def test_packed_weights_give_the_same_bits(kernel, memory, name, rows):
    raw, _ = weights(name, rows, 768)
    raw = raw.reshape(rows, -1)
    x = activations(9, 768)
    expected = product(kernel, name, raw, x)
    matrix = in_file(name, raw)
    with memory.place(matrix, raw):
        for first, end in [(0, 9), (2, 3)]:
            part = np.ascontiguousarray(x[first:end])
            assert (multiplied(kernel, matrix, part, threads=2) == expected[first:end]).all()
        assert (memory.get(matrix, 0, raw.nbytes) == raw.ravel()).all()


@pytest.mark.parametrize("name", TYPES)
def test_parts_of_packed_weights_can_be_written_and_read(memory, name):
    raw, _ = weights(name, 80, 512)
    raw = raw.reshape(80, -1).copy()
    size = raw.shape[1]
    matrix = in_file(name, raw)
    with memory.place(matrix, raw):
        for first, end in [(0, 1), (3, 70), (16, 48), (79, 80)]:
            raw[first:end] = raw[first:end][::-1].copy()
            memory.set(matrix, raw[first:end].copy(), first * size)
            assert (memory.get(matrix, 0, raw.nbytes) == raw.ravel()).all()
            assert (memory.get(matrix, first * size, (end - first) * size) == raw[first:end].ravel()).all()
        view = in_file(name, raw[20:30])  # a view, as ggml makes one
        view.data, view.view_src, view.view_offset = matrix.data + 20 * size, ctypes.addressof(matrix), 20 * size
        view.buffer = matrix.buffer
        assert (memory.get(view, 0, 10 * size) == raw[20:30].ravel()).all()


def test_without_enough_memory_there_is_no_buffer(memory):
    assert memory.make(1 << 62) is None


@pytest.mark.parametrize("columns", [1, 3, 9])
def test_the_thread_pool_computes_the_same_bits(kernel, thread_pool, columns):
    rest = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(thread_pool)
    x = activations(columns, 1280)
    expected = {name: product(kernel, name, weights(name, 333, 1280)[0], x) for name in TYPES}
    for turn in range(12):  # the weights of the last turn are freed, so prefetches read freed memory
        for name in TYPES:
            raw, _ = weights(name, 333, 1280)
            assert (product(kernel, name, raw, x, threads=2 + turn % 3) == expected[name]).all()
        if turn % 5 == 0:
            time.sleep(0.05)  # the threads fall asleep
        if turn % 2 == 0:
            rest(0, None, None)  # the threads sleep at once


@pytest.mark.parametrize("exponent", [0, 1, 2, 127, 200])
def test_exponents_of_mxfp4(kernel, memory, exponent):
    raw, _ = weights("MXFP4", 40, 32)
    raw[:, 0] = exponent
    values = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12]) * 2.0 ** (exponent - 128)
    x = np.full((1, 32), 127 * (2.0**-20 if exponent > 127 else 1), np.float32)  # rounded without an error
    exact = x[0, 0] * (values[raw[:, 1:] & 15] + values[raw[:, 1:] >> 4]).sum(1)
    matrix = in_file("MXFP4", raw)
    assert (product(kernel, "MXFP4", raw, x) == exact).all()
    with memory.place(matrix, raw):
        assert (multiplied(kernel, matrix, x) == exact).all()


def test_columns_may_have_a_larger_stride(kernel):
    raw, _ = weights("Q8_0", 40, 256)
    wide = activations(4, 512)
    apart = wide[:, :256]
    assert (product(kernel, "Q8_0", raw, apart) == product(kernel, "Q8_0", raw, apart.copy())).all()


@pytest.mark.parametrize(("sequences", "length"), [(5, 1), (3, 4), (1, 7)])
def test_columns_arranged_by_sequence_have_the_same_bits(kernel, sequences, length):
    """Recurrent layers multiply activations of the shape (elements, tokens, sequences)."""
    raw, _ = weights("Q8_0", 40, 256)
    x = activations(sequences * length, 256)
    out = np.full((1, sequences, length, 40), np.nan, np.float32)
    node = with_sources(tensor(out), in_file("Q8_0", raw), tensor(x.reshape(1, sequences, length, 256)))
    assert kernel.operation_supports(b"MUL_MAT", ctypes.byref(node))
    kernel.operation_compute(b"MUL_MAT", ctypes.byref(node), 2)
    assert (out.reshape(-1, 40) == product(kernel, "Q8_0", raw, x)).all()


def test_columns_at_irregular_distances_are_refused(kernel):
    raw, _ = weights("Q8_0", 40, 256)
    x = activations(12, 256).reshape(1, 3, 4, 256)[:, :, :2]
    out = np.zeros((1, 3, 2, 40), np.float32)
    node = with_sources(tensor(out), in_file("Q8_0", raw), tensor(x))
    assert not kernel.operation_supports(b"MUL_MAT", ctypes.byref(node))
    node = with_sources(tensor(out.reshape(3, 1, 2, 40)), in_file("Q8_0", raw), tensor(x.reshape(3, 1, 2, 256).copy()))
    assert not kernel.operation_supports(b"MUL_MAT", ctypes.byref(node)), "a fourth axis"


@pytest.mark.parametrize("name", TYPES)
def test_nan_and_infinity_stay_visible_and_do_not_reach_other_columns(kernel, name):
    raw, _ = weights(name, 40, 256)
    x = activations(3, 256)
    expected = product(kernel, name, raw, x)
    x[1, 5] = np.nan
    x[1, 40] = np.inf
    found = product(kernel, name, raw, x)
    assert (found[[0, 2]] == expected[[0, 2]]).all()
    assert np.isnan(found[1]).all()


def test_other_products_are_refused(kernel):
    raw, _ = weights("Q8_0", 32, 256)
    matrix = Tensor(type=int(GGMLQuantizationType.IQ3_S), data=raw.ctypes.data)
    matrix.ne[:] = [256, 32, 1, 1]
    x, out = activations(1, 256), np.zeros((1, 32), np.float32)
    node = with_sources(tensor(out[None, None]), matrix, tensor(x[None, None]))
    assert not kernel.operation_supports(b"MUL_MAT", ctypes.byref(node))
    matrix.type, matrix.ne[2] = int(GGMLQuantizationType.Q8_0), 2  # several matrices
    assert not kernel.operation_supports(b"MUL_MAT", ctypes.byref(with_sources(node, matrix, tensor(x[None, None]))))
