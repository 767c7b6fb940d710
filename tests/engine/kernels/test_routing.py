"""The kernels that choose and weigh experts: compared with numpy, and the same bits for a row in any batch."""

from __future__ import annotations

import ctypes
import io
import re

import numpy as np
import pytest

from afterword.engine.llama import accelerator, library
from engine.kernels.test_elementwise import ROUNDING, computed, node_of, random, shaped, takes
from engine.test_reproducible import open_runner
from ggml_tensors import Tensor
from oracle.architectures import write_random

EXPERTS = [2, 8, 60, 128]
DESCENDING = 1


@pytest.fixture(scope="module")
def kernel(accelerator_library: ctypes.CDLL) -> ctypes.CDLL:
    return accelerator_library


def softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def sorted_numbers(kernel: ctypes.CDLL, x: np.ndarray, threads: int = 1) -> np.ndarray:
    numbers = np.full(x.shape, -1, np.int32)
    node = node_of(shaped(numbers), (x,), {0: DESCENDING})
    assert takes(kernel, "ARGSORT", node)
    kernel.operation_compute(b"ARGSORT", ctypes.byref(node), threads)
    return numbers


@pytest.mark.parametrize("experts", EXPERTS)
def test_softmax(kernel, experts):
    x = random(40, experts) * np.float32(8)
    got = computed(kernel, "SOFT_MAX", x.shape, x, params={0: 1.0})
    np.testing.assert_allclose(got, softmax(x), rtol=ROUNDING, atol=1e-30)
    halved = computed(kernel, "SOFT_MAX", x.shape, x, params={0: 0.5})
    np.testing.assert_allclose(halved, softmax(x / 2), rtol=ROUNDING, atol=1e-30)


def test_softmax_of_numbers_that_are_not_finite(kernel):
    x = random(5, 8)
    x[0, 3], x[1, 3], x[2, 3], x[3] = np.nan, np.inf, -np.inf, -np.inf
    got = computed(kernel, "SOFT_MAX", x.shape, x, params={0: 1.0})
    assert np.isnan(got[[0, 1, 3]]).all()
    np.testing.assert_allclose(got[[2, 4]], softmax(x[[2, 4]]), rtol=ROUNDING)


@pytest.mark.parametrize("experts", EXPERTS)
def test_experts_are_sorted_from_the_largest(kernel, experts):
    x = random(30, experts)
    assert (sorted_numbers(kernel, x) == np.argsort(-x, axis=1, kind="stable")).all()


def test_equal_experts_stay_in_their_order_and_nan_comes_last(kernel):
    x = np.array([[1, 3, 3, 1, 3], [np.nan, 0, np.inf, np.nan, -np.inf], [np.nan] * 5], np.float32)
    assert sorted_numbers(kernel, x).tolist() == [[1, 2, 4, 0, 3], [2, 1, 4, 0, 3], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("count", [1, 3, 60])
def test_the_largest_elements(kernel, count):
    x = random(30, 60)
    x[0, 7], x[1] = np.nan, 2
    got = np.full((30, count), -1, np.int32)
    node = node_of(shaped(got), (x,), {})
    assert takes(kernel, "TOP_K", node)
    kernel.operation_compute(b"TOP_K", ctypes.byref(node), 1)
    assert (got == sorted_numbers(kernel, x)[:, :count]).all()


@pytest.mark.parametrize("width", [1, 7, 896])
def test_means(kernel, width):
    x = random(5, 3, width)
    got = computed(kernel, "MEAN", (5, 3, 1), x)
    np.testing.assert_allclose(got, x.astype(np.float64).mean(-1, keepdims=True), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("used", [1, 3, 8])
def test_weights_are_divided_by_their_limited_sum(kernel, used):
    x = np.abs(random(7, used))
    x[3] = 0
    sums = computed(kernel, "SUM_ROWS", (7, 1), x)
    np.testing.assert_allclose(sums, x.sum(1, keepdims=True), rtol=ROUNDING)
    limited = computed(kernel, "CLAMP", (7, 1), sums, params={0: 6.103515625e-5, 1: np.inf})
    assert (limited == np.maximum(sums, np.float32(6.103515625e-5))).all()
    assert (computed(kernel, "DIV", x.shape, x, limited) == x / limited).all()


def test_limits_keep_nan(kernel):
    x = np.array([[np.nan, -5, 0.5, 5]], np.float32)
    got = computed(kernel, "CLAMP", x.shape, x, params={0: -1.0, 1: 1.0})
    np.testing.assert_array_equal(got, [[np.nan, -1, 0.5, 1]])


def test_factors(kernel):
    x = random(3, 5, 12)
    assert (computed(kernel, "SCALE", x.shape, x, params={0: 2.5}) == x * np.float32(2.5)).all()
    got = computed(kernel, "SCALE", x.shape, x, params={0: 2.5, 1: -0.75})
    np.testing.assert_allclose(got, x.astype(np.float64) * 2.5 - 0.75, rtol=0, atol=ROUNDING)
    assert not computed(kernel, "SCALE", (3, 0), random(3, 0), params={0: 2.5}).size


@pytest.mark.parametrize(("name", "plain"), [("ADD", np.add), ("MUL", np.multiply), ("DIV", np.divide)])
@pytest.mark.parametrize("width", [1, 6, 64, 100])
def test_the_only_element_of_a_row_is_repeated(kernel, name, plain, width):
    x, y = random(4, 3, width), random(4, 3, 1, seed=1)
    assert (computed(kernel, name, x.shape, x, y) == plain(x, y)).all()
    assert (computed(kernel, name, x.shape, x, x[::-1].copy()) == plain(x, x[::-1])).all()


def test_each_token_reads_the_weights_of_its_experts(kernel):
    probabilities, chosen = random(5, 16, 1), np.random.default_rng(1).integers(0, 16, (5, 3)).astype(np.int32)
    got = computed(kernel, "GET_ROWS", (5, 3, 1), probabilities, chosen)
    assert (got == np.take_along_axis(probabilities, chosen[..., None], axis=1)).all()
    wide = np.zeros((5, 16), np.int32)
    wide[:, :3] = chosen
    assert (computed(kernel, "GET_ROWS", (5, 3, 1), probabilities, wide[:, :3]) == got).all()


@pytest.mark.parametrize("width", [5, 64])
def test_biases_of_selected_experts_are_added(kernel, width):
    x, biases = random(6, 2, width), random(9, width, seed=1)
    chosen = np.random.default_rng(2).integers(0, 9, (6, 2)).astype(np.int32)
    assert (computed(kernel, "ADD_ID", x.shape, x, biases, chosen) == x + biases[chosen]).all()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_has_the_same_bits_in_any_batch(kernel, threads):
    x = random(900, 60)
    forms = {
        "SOFT_MAX": ((x,), {0: 1.0}, x.shape),
        "SUM_ROWS": ((x,), {}, (900, 1)),
        "MEAN": ((x,), {}, (900, 1)),
        "SCALE": ((x,), {0: 3.0}, x.shape),
        "CLAMP": ((x,), {0: -0.5, 1: 0.5}, x.shape),
    }
    for name, (sources, params, out) in forms.items():
        together = computed(kernel, name, out, *sources, params=params, threads=threads)
        own = tuple(np.ascontiguousarray(source[77:78]) for source in sources)
        assert (computed(kernel, name, (1, *out[1:]), *own, params=params) == together[77]).all(), name
    assert (sorted_numbers(kernel, x[77:78].copy()) == sorted_numbers(kernel, x, threads)[77]).all()


def test_other_forms_are_refused(kernel):
    x = random(4, 8)
    mask = random(4, 8)

    def node(out: np.ndarray, *sources: np.ndarray, params: dict[int, float]) -> Tensor:
        return node_of(shaped(out), sources, params)

    assert not takes(kernel, "SOFT_MAX", node(x, x, mask, params={0: 1.0})), "a mask"
    assert not takes(kernel, "ARGSORT", node(x.astype(np.int32), x, params={0: 0})), "another order"
    assert not takes(kernel, "TOP_K", node(np.zeros((4, 9), np.int32), x, params={})), "more than there are"
    assert not takes(kernel, "CLAMP", node(x.astype(np.float16), x.astype(np.float16), params={})), "halves"


@pytest.mark.parametrize("architecture", ["qwen3moe", "olmoe", "phimoe", "gpt-oss", "glm4moe", "deepseek2"])
def test_of_a_mixture_only_the_token_embedding_is_left_to_llama_cpp(tmp_path, monkeypatch, architecture):
    if not accelerator.supports_quantized():
        pytest.skip("llama.cpp computes elementwise operations where it computes the products")
    log = io.StringIO()
    monkeypatch.setattr(library, "_shown", [log])
    runner = open_runner(write_random(tmp_path / "tiny.gguf", architecture), "exact", 2)
    assert runner.computes_all
    assert re.findall(r"splits = (\d+)", log.getvalue())[-1] == "2"
