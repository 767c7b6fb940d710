"""The elementwise kernels: compared with numpy, and the same bits for a row in any batch."""

from __future__ import annotations

import ctypes
import io
import re

import numpy as np
import pytest

from afterword.engine.llama import accelerator, library
from afterword.engine.llama.runner import LlamaRunner
from afterword.engine.messages import LoadModel
from afterword.models.registry import builtin_path
from ggml_tensors import Tensor, tensor

ROUNDING = 3e-6  # of numbers of about 1, in float32
BASE, PAIRS_ARE_NEIGHBOURS, PAIRS_ARE_HALVES, IN_SECTIONS, INTERLEAVED = 10000.0, 0, 2, 8, 40
WIDTHS = [8, 24, 64, 896]


@pytest.fixture(scope="module")
def kernel(accelerator_library: ctypes.CDLL) -> ctypes.CDLL:
    return accelerator_library


def shaped(array: np.ndarray) -> np.ndarray:
    """The array with four axes, as ggml's tensors have."""
    return array.reshape((1,) * (4 - array.ndim) + array.shape)


Params = dict[int, float]
"""Parameters of an operation by their index. Integers and floats share the memory."""


def node_of(out: np.ndarray, sources: tuple[np.ndarray | None, ...], params: Params) -> Tensor:
    node = tensor(out)
    whole = ctypes.cast(node.params, ctypes.POINTER(ctypes.c_int32))
    for index, value in params.items():
        memory = whole if isinstance(value, int) else node.params
        memory[index] = value
    for index, source in enumerate(sources):
        if source is not None:
            node.src[index] = ctypes.pointer(tensor(shaped(source)))
    return node


def takes(kernel: ctypes.CDLL, name: str, node: Tensor) -> bool:
    return bool(kernel.operation_supports(name.encode(), ctypes.byref(node)))


def computed(
    kernel: ctypes.CDLL,
    name: str,
    out: tuple[int, ...],
    *sources: np.ndarray | None,
    params: Params | None = None,
    threads: int = 1,
) -> np.ndarray:
    result = np.full(out, np.nan, np.float32)
    node = node_of(shaped(result), sources, params or {})
    assert takes(kernel, name, node)
    kernel.operation_compute(name.encode(), ctypes.byref(node), threads)
    return result


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# ---- each operation


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_are_divided_by_the_root_of_their_mean_square(kernel, width):
    x = random(3, 5, width) * np.float32(30)
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 0.5)
    got = computed(kernel, "RMS_NORM", x.shape, x, params={0: 0.5})
    np.testing.assert_allclose(got, expected, rtol=ROUNDING)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [(1, 1), (1, 5), (3, 5)])
@pytest.mark.parametrize(("name", "plain"), [("ADD", np.add), ("SUB", np.subtract), ("MUL", np.multiply)])
def test_rows_of_the_second_operand_are_repeated(kernel, name, plain, rows, width):
    x, y = random(3, 5, width), random(*rows, width, seed=1)
    assert (computed(kernel, name, x.shape, x, y) == plain(x, y)).all()


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_are_centred_and_divided_by_their_deviation(kernel, width):
    x = random(3, 5, width) * np.float32(30) + np.float32(7)
    centred = x.astype(np.float64) - x.astype(np.float64).mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 0.5)
    got = computed(kernel, "NORM", x.shape, x, params={0: 0.5})
    np.testing.assert_allclose(got, expected, rtol=ROUNDING, atol=ROUNDING)


def rotation(order: int, turned: int, *, first: int = 0, speed: float = 1.0, size: float = 1.0) -> Params:
    return {1: turned, 2: order, 5: BASE, 6: speed, 7: 0.0, 8: size, 15: first}


def turned_by(x: np.ndarray, angles: np.ndarray, order: int, first: int) -> np.ndarray:
    """The rows with their elements from `first` on rotated. `angles`: [..., pair]."""
    turned = 2 * angles.shape[-1]
    one, other = (
        (slice(first, first + turned // 2), slice(first + turned // 2, first + turned))
        if order == PAIRS_ARE_HALVES
        else (slice(first, first + turned, 2), slice(first + 1, first + turned, 2))
    )
    expected = x.astype(np.float64)
    expected[..., one] = x[..., one] * np.cos(angles) - x[..., other] * np.sin(angles)
    expected[..., other] = x[..., one] * np.sin(angles) + x[..., other] * np.cos(angles)
    return expected


@pytest.mark.parametrize("order", [PAIRS_ARE_NEIGHBOURS, PAIRS_ARE_HALVES])
@pytest.mark.parametrize("sizes", [(8, 0, 8), (64, 0, 64), (80, 0, 32), (80, 48, 32), (48, 8, 16)])
@pytest.mark.parametrize("factors_given", [False, True])
def test_rotations(kernel, order, sizes, factors_given):
    head, first, turned = sizes
    x, pairs = random(6, 3, head), turned // 2
    positions = np.array([0, 1, 2, 17, 2000, 31000], np.int32)
    factors = 1 + np.arange(pairs, dtype=np.float32) / 4 if factors_given else None
    speeds = (0.5 * (BASE ** -(np.arange(pairs) / pairs)).astype(np.float32)).astype(np.float32)
    if factors is not None:
        speeds /= factors
    angles = (positions[:, None].astype(np.float32) * speeds)[:, None].astype(np.float64)
    expected = turned_by(x, angles, order, first)
    expected[..., first : first + turned] *= 1.5
    params = rotation(order, turned, first=first, speed=0.5, size=1.5)
    got = computed(kernel, "ROPE", x.shape, x, positions, factors, params=params)
    np.testing.assert_allclose(got, expected, rtol=0, atol=4 * ROUNDING)


@pytest.mark.parametrize(
    ("order", "sections", "expected"),
    [
        (IN_SECTIONS, (3, 2, 2, 1), "tttHHwwe"),
        (IN_SECTIONS, (2, 1, 1, 0), "ttHwttHw"),
        (INTERLEAVED, (3, 3, 2, 0), "tHwtHwtH"),
        (INTERLEAVED, (2, 2, 1, 3), "tHwtHeee"),
    ],
)
def test_each_pair_turns_with_the_position_of_its_section(kernel, order, sections, expected):
    """As in models for images: a token has positions in time (t), height (H), width (w) and one more (e)."""
    x, tokens, pairs = random(6, 3, 24), 6, 8
    positions = np.random.default_rng(2).integers(0, 500, (4, tokens)).astype(np.int32)
    speeds = (BASE ** -(np.arange(pairs) / pairs)).astype(np.float32)
    own = positions[["tHwe".index(each) for each in expected]].T
    angles = (own.astype(np.float32) * speeds)[:, None].astype(np.float64)
    params = rotation(order, 2 * pairs) | {11 + i: pairs for i, pairs in enumerate(sections)}
    got = computed(kernel, "ROPE", x.shape, x, positions.reshape(-1), params=params)
    np.testing.assert_allclose(got, turned_by(x, angles, PAIRS_ARE_HALVES, 0), rtol=0, atol=4 * ROUNDING)


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("factors_given", [False, True])
def test_rotations_of_longer_contexts(kernel, share, factors_given):
    """YaRN: fast pairs keep their angles, slow ones are slowed down, those between are slowed down in part."""
    x, pairs, speed, trained, fast, slow = random(6, 3, 64), 32, 0.25, 4096, 32.0, 1.0
    positions = np.array([0, 1, 2, 17, 2000, 16000], np.int32)
    factors = 1 + np.arange(pairs, dtype=np.float32) / 4 if factors_given else None
    number = np.arange(pairs)
    angle = BASE ** -(number / pairs) / (1 if factors is None else factors)
    begin, end = (pairs * np.log(trained / (turns * 2 * np.pi)) / np.log(BASE) for turns in (fast, slow))
    ramp = np.clip((number - np.floor(begin)) / (np.ceil(end) - np.floor(begin)), 0, 1)
    assert {0.0, 1.0} < set(ramp)
    kept = (1 - ramp) * share
    angles = positions[:, None] * (angle * speed * (1 - kept) + angle * kept)
    expected = turned_by(x, angles[:, None], PAIRS_ARE_HALVES, 0) * (1 + 0.1 * np.log(1 / speed))
    params = {**rotation(PAIRS_ARE_HALVES, 64, speed=speed), 4: trained, 7: share, 9: fast, 10: slow}
    got = computed(kernel, "ROPE", x.shape, x, positions, factors, params=params)
    np.testing.assert_allclose(got, expected, rtol=0, atol=5e-3)  # the angle of position 16,000 is rounded to 24 bits
    np.testing.assert_allclose(got[:4], expected[:4], rtol=0, atol=2e-5)


def test_rotations_use_changed_positions_and_parameters(kernel):
    """The kernel keeps the angles of the last operation."""
    x = random(2, 1, 8)
    turns = [
        (np.array(positions, np.int32), factors, rotation(PAIRS_ARE_HALVES, turned, speed=speed))
        for positions in ([0, 1], [0, 3])
        for factors in (None, np.full(4, 5, np.float32))
        for turned in (8, 4)
        for speed in (1.0, 0.5)
    ]
    first = [computed(kernel, "ROPE", x.shape, x, at, factors, params=params) for at, factors, params in turns]
    assert len({result.tobytes() for result in first}) == len(turns)
    for (at, factors, params), expected in zip(reversed(turns), reversed(first), strict=True):
        assert (computed(kernel, "ROPE", x.shape, x, at, factors, params=params) == expected).all()


def test_set_rows_rounds_to_halves(kernel):
    """As numpy rounds them: to the nearest, ties to even; subnormals, infinities and NaNs too."""
    bits = np.arange(0, 1 << 32, 65537 // 8, dtype=np.uint64).astype(np.uint32)
    x = np.resize(bits, (len(bits) // 64 + 1, 64)).view(np.float32)
    memory = np.zeros((2 * len(x), 64), np.float16)
    where = np.arange(len(x), dtype=np.int64) * 2 + 1
    node = node_of(shaped(memory), (x, where), {})
    assert takes(kernel, "SET_ROWS", node)
    kernel.operation_compute(b"SET_ROWS", ctypes.byref(node), 1)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(memory[1::2], x.astype(np.float16))
    assert not memory[::2].any()


@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_get_rows(kernel, kind):
    x, which = random(9, 24), np.array([8, 0, 3, 3], kind)
    assert (computed(kernel, "GET_ROWS", (4, 24), x, which) == x[which]).all()
    of_each, lists = random(3, 2, 9, 5), np.array([[[8, 0], [1, 1]], [[2, 3], [4, 5]], [[6, 7], [0, 8]]], kind)
    got = computed(kernel, "GET_ROWS", (3, 2, 2, 5), of_each, lists)
    assert (got == np.take_along_axis(of_each, lists[..., None], axis=2)).all()


@pytest.mark.parametrize("lists", [1, 4])
def test_set_rows_of_floats_by_matrix(kernel, lists):
    """DeepSeek 3 copies the probabilities of the chosen groups of experts: each token has its own list."""
    memory, x = np.full((4, 6, 10), -np.inf, np.float32), random(4, 2, 10)
    where = np.array([[5, 0], [1, 2], [3, 4], [0, 1]], np.int32)[:lists]
    expected = memory.copy()
    for token in range(4):
        expected[token, where[token % lists]] = x[token]
    node = node_of(shaped(memory), (x, where), {})
    assert takes(kernel, "SET_ROWS", node)
    kernel.operation_compute(b"SET_ROWS", ctypes.byref(node), 2)
    assert (memory == expected).all()


# ---- in any batch


def alone_and_together(kernel: ctypes.CDLL, threads: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each operation: one row computed alone, and the same row computed with others."""
    x, y, weights = random(400, 4, 96), random(400, 4, 96, seed=1), random(96)
    positions = np.arange(400, dtype=np.int32)
    forms = {
        "RMS_NORM": ((x,), {0: 1e-6}),
        "ADD": ((x, y), {}),
        "MUL": ((x, weights), {}),
        "NORM": ((x,), {0: 1e-6}),
        "ROPE": ((x, positions), rotation(PAIRS_ARE_HALVES, 96)),
    }
    results = {}
    for name, (sources, params) in forms.items():
        own = tuple(np.ascontiguousarray(s[77:78]) if len(s) == 400 else s for s in sources)
        one = computed(kernel, name, (1, 4, 96), *own, params=params)
        all_rows = computed(kernel, name, (400, 4, 96), *sources, params=params, threads=threads)
        results[name] = one, all_rows[77:78]
        assert not np.isnan(all_rows).any()
    return results


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_has_the_same_bits_in_any_batch(kernel, threads):
    for name, (alone, together) in alone_and_together(kernel, threads).items():
        assert (alone == together).all(), name


def test_the_thread_pool_computes_the_same_bits(kernel, thread_pool):
    for name, (alone, together) in alone_and_together(kernel, 3).items():
        assert (alone == together).all(), name


def test_results_may_overwrite_operands(kernel):
    for order in (PAIRS_ARE_NEIGHBOURS, PAIRS_ARE_HALVES):
        x, at = random(5, 3, 64), np.arange(5, dtype=np.int32)
        expected = computed(kernel, "ROPE", x.shape, x, at, params=rotation(order, 64))
        node = node_of(shaped(x), (x, at), rotation(order, 64))
        kernel.operation_compute(b"ROPE", ctypes.byref(node), 1)
        assert (x == expected).all()


# ---- operations that are refused


def test_other_forms_are_refused(kernel):
    x, odd, at = random(4, 2, 64), random(4, 2, 63), np.arange(4, dtype=np.int32)
    turn = rotation(PAIRS_ARE_HALVES, 64)
    by_section, beyond = {1: 64, 2: 8, 11: 32}, rotation(PAIRS_ARE_HALVES, 64, first=8)
    memory, two = np.zeros((8, 64), np.int32), np.zeros((2, 4), np.int64)
    left = {
        "rows of another number of elements": ("RMS_NORM", odd, (odd,), {}),
        "elements that lie apart": ("RMS_NORM", x[..., :32], (random(4, 2, 64)[..., ::2],), {}),
        "a column that is repeated": ("MUL", x, (x, random(4, 2, 8)), {}),
        "halves": ("ADD", x.astype(np.float16), (x.astype(np.float16), x.astype(np.float16)), {}),
        "a rotation beyond the row": ("ROPE", x, (x, at), beyond),
        "one position for sections": ("ROPE", x, (x, at), by_section),
        "no pair in a section": ("ROPE", x, (x, np.arange(16, dtype=np.int32)), {1: 64, 2: 8}),
        "a rotation for images": ("ROPE", x, (x, np.arange(16, dtype=np.int32)), {1: 64, 2: 24, 11: 32}),
        "a rotation of halves": ("ROPE", x.astype(np.float16), (x.astype(np.float16), at), turn),
        "a memory of another type": ("SET_ROWS", memory, (x[:, 0].copy(), at), {}),
        "more lists than matrices": ("SET_ROWS", memory.astype(np.float16), (x[:, 0].copy(), two), {}),
    }
    for why, (name, out, sources, params) in left.items():
        assert not takes(kernel, name, node_of(shaped(out), sources, params)), why


def test_of_a_dense_model_only_the_token_embedding_is_left_to_llama_cpp(kernel, monkeypatch):
    if not accelerator.supports_quantized():
        pytest.skip("llama.cpp computes elementwise operations where it computes the products")
    log = io.StringIO()
    monkeypatch.setattr(library, "_shown", [log])
    runner = LlamaRunner(LoadModel(str(builtin_path()), 256, 2, 1, 64, "exact", 0, False, use_kernels=True))
    assert runner.computes_all
    assert re.findall(r"splits = (\d+)", log.getvalue())[-1] == "2"
