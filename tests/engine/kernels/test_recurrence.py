"""The kernels of recurrent layers: compared with numpy, and the same bits for a token in any pass."""

from __future__ import annotations

import ctypes
import io
import re

import numpy as np
import pytest

from afterword.engine.llama import library
from engine.kernels.test_elementwise import ROUNDING, computed, node_of, random, shaped, takes
from engine.test_reproducible import open_runner
from oracle.architectures import write_random

LENGTHS = [16, 32, 128]
TOKENS = [1, 5, 40]


@pytest.fixture(scope="module")
def kernel(accelerator_library: ctypes.CDLL) -> ctypes.CDLL:
    return accelerator_library


# ---- the convolution


def convolved(kernel: ctypes.CDLL, x: np.ndarray, weights: np.ndarray, threads: int = 1) -> np.ndarray:
    sequences, channels, elements = x.shape
    tokens = elements - weights.shape[1] + 1
    return computed(kernel, "SSM_CONV", (1, sequences, tokens, channels), x, weights, threads=threads)[0]


@pytest.mark.parametrize("taps", [2, 3, 4])
@pytest.mark.parametrize("tokens", [1, 7, 100])
@pytest.mark.parametrize("channels", [3, 16, 70])
@pytest.mark.parametrize("threads", [1, 3])
def test_each_channel_is_convolved(kernel, channels, tokens, taps, threads):
    x, weights = random(2, channels, taps - 1 + tokens), random(channels, taps, seed=1)
    windows = np.lib.stride_tricks.sliding_window_view(x.astype(np.float64), taps, axis=2)
    expected = np.einsum("sctk,ck->stc", windows, weights.astype(np.float64))
    np.testing.assert_allclose(convolved(kernel, x, weights, threads), expected, rtol=1e-5, atol=1e-6)


def test_a_convolved_token_does_not_depend_on_the_others(kernel):
    x, weights = random(3, 70, 103), random(70, 4, seed=1)
    together = convolved(kernel, x, weights, threads=2)
    for sequence, token in [(0, 0), (1, 50), (2, 99)]:
        alone = convolved(kernel, np.ascontiguousarray(x[sequence : sequence + 1, :, token : token + 4]), weights)
        assert (alone[0, 0] == together[sequence, token]).all()


# ---- the gated delta net


class Net:
    """The operands of a delta net.

    The state has the axes [sequence, head, element of the values, element of the keys].
    """

    def __init__(
        self, sequences: int, all_heads: tuple[int, int], tokens: int, length: int, *, wide_decay: bool = False
    ):
        """`all_heads`: numbers of heads of the values, and of the keys and queries."""
        heads, key_heads = all_heads
        self.q, self.k = (random(sequences, tokens, key_heads, length, seed=seed) for seed in (1, 2))
        self.q, self.k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (self.q, self.k))
        self.v = random(sequences, tokens, heads, length, seed=3)
        self.g = -np.abs(random(sequences, tokens, heads, length if wide_decay else 1, seed=4)) / 4
        self.b = 1 / (1 + np.exp(-random(sequences, tokens, heads, 1, seed=5)))
        self.state = random(sequences, heads, length, length, seed=6)

    def part(self, sequences: slice, tokens: slice, state: np.ndarray) -> Net:
        """Some sequences and tokens, beginning with other states."""
        made = Net.__new__(Net)
        for name in "qkvgb":
            setattr(made, name, np.ascontiguousarray(getattr(self, name)[sequences, tokens]))
        made.state = state
        return made

    def sources(self) -> tuple[np.ndarray, ...]:
        return self.q, self.k, self.v, self.g, self.b, self.state

    def computed(self, kernel: ctypes.CDLL, threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
        sequences, tokens, heads, length = self.v.shape
        rows = sequences * tokens + length * sequences
        out = computed(
            kernel, "GATED_DELTA_NET", (1, 1, rows, heads * length), *self.sources(), params={0: 1}, threads=threads
        )[0, 0]
        results, states = out[: sequences * tokens], out[sequences * tokens :]
        return results.reshape(self.v.shape), states.reshape(self.state.shape)

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """By the definition, in float64."""
        tokens, heads, length = self.v.shape[1:]
        state, results = self.state.astype(np.float64), []
        q, k = (np.tile(x.astype(np.float64), (1, 1, heads // x.shape[2], 1)) for x in (self.q, self.k))
        for t in range(tokens):
            state = state * np.exp(self.g[:, t].astype(np.float64))[:, :, None, :]
            change = (self.v[:, t] - np.einsum("shji,shi->shj", state, k[:, t])) * self.b[:, t]
            state = state + change[..., None] * k[:, t][:, :, None, :]
            results.append(np.einsum("shji,shi->shj", state, q[:, t]) / np.sqrt(length))
        return np.stack(results, axis=1), state


@pytest.mark.parametrize("wide_decay", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("threads", [1, 3])
def test_the_delta_net_follows_its_definition(kernel, threads, tokens, length, wide_decay):
    net = Net(2, (4, 2), tokens, length, wide_decay=wide_decay)
    for got, expected in zip(net.computed(kernel, threads), net.expected(), strict=True):
        np.testing.assert_allclose(got, expected, rtol=ROUNDING * 10, atol=ROUNDING * 10)


@pytest.mark.parametrize("wide_decay", [False, True])
def test_a_state_depends_neither_on_other_sequences_nor_on_the_tokens_of_a_pass(kernel, wide_decay):
    net = Net(3, (4, 4), 37, 32, wide_decay=wide_decay)
    results, states = net.computed(kernel, threads=2)
    state = net.state[1:2]
    for first, end in [(0, 20), (20, 21), (21, 22), (22, 37)]:
        got, state = net.part(slice(1, 2), slice(first, end), np.ascontiguousarray(state)).computed(kernel)
        assert (got[0] == results[1, first:end]).all()
    assert (state[0] == states[1]).all()


@pytest.mark.parametrize("name", ["q", "k", "v", "g", "b", "state"])
def test_a_nan_stays_visible(kernel, name):
    net = Net(1, (1, 1), 2, 16)
    getattr(net, name).reshape(-1)[0] = np.nan
    results, states = net.computed(kernel)
    assert np.isnan(results[0, 0]).any()
    assert np.isnan(states).any() or name == "q", "queries do not enter the state"


def test_a_state_that_decays_at_once_is_forgotten(kernel):
    net = Net(1, (1, 1), 1, 16)
    net.g[:] = -np.inf
    np.testing.assert_allclose(net.computed(kernel)[1], net.expected()[1], rtol=ROUNDING, atol=ROUNDING)


# ---- refused


def test_other_forms_are_refused(kernel):
    net = Net(1, (2, 2), 3, 32)
    out = shaped(np.zeros((3 + 32, 64), np.float32))
    assert takes(kernel, "GATED_DELTA_NET", node_of(out, net.sources(), {0: 1}))
    assert not takes(kernel, "GATED_DELTA_NET", node_of(out, net.sources(), {0: 2})), "snapshots of states"
    assert not takes(kernel, "GATED_DELTA_NET", node_of(out, net.sources(), {0: 1, 3: 1})), "an unknown parameter"
    strided = (*net.sources()[:5], np.zeros((1, 2, 32, 64), np.float32)[..., :32])
    assert not takes(kernel, "GATED_DELTA_NET", node_of(out, strided, {0: 1})), "a state with gaps"
    odd = Net(1, (2, 2), 3, 24)
    assert not takes(kernel, "GATED_DELTA_NET", node_of(out, odd.sources(), {0: 1})), "rows of other lengths"
    x, weights = shaped(random(1, 8, 6)), shaped(random(8, 4))
    assert takes(kernel, "SSM_CONV", node_of(shaped(random(1, 3, 8)), (x, weights), {}))
    assert not takes(kernel, "SSM_CONV", node_of(shaped(random(1, 2, 8)), (x, weights), {})), "other tokens"
    out = shaped(random(1, 3, 8))
    assert not takes(kernel, "SSM_CONV", node_of(out, (x, weights), {0: 1})), "an unknown parameter"


# ---- models


@pytest.mark.usefixtures("kernel_products")
@pytest.mark.parametrize(("architecture", "alone"), [("qwen35", True), ("mamba", False), ("rwkv7", False)])
def test_the_thread_pool_is_used_where_the_kernels_compute_all_recurrences(tmp_path, monkeypatch, architecture, alone):
    """Elsewhere llama.cpp's scans need OpenMP's threads. Of Qwen3.5 only the token embedding is left to llama.cpp."""
    log = io.StringIO()
    monkeypatch.setattr(library, "_shown", [log])
    runner = open_runner(write_random(tmp_path / "tiny.gguf", architecture), "exact", 2)
    assert runner.computes_all == alone
    assert (re.findall(r"splits = (\d+)", log.getvalue())[-1] == "2") == alone
