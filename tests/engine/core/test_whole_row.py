"""`WholeRow` and the compiled scan give what `Candidates` gives, bit for bit, on random rows and chains."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from afterword.engine.core import sampler_chain
from afterword.engine.core.candidates import Candidates
from afterword.engine.core.repetitions import Repetitions
from afterword.engine.core.row_scan import RowScan, ScanKernel
from afterword.engine.core.sampler import Sampler, SampleTokens
from afterword.engine.core.sampler_chain import ChainQuery
from afterword.engine.core.sampler_kernel import BLOCK, CompiledKernel, SampleQuery
from afterword.engine.core.token_counts import TokenCounts
from afterword.engine.core.whole_row import WholeRow
from afterword.engine.protocol import Dry, Job, SamplerChain, Sampling

LENGTHS = (1, 2, 15, 255, 256, 257, 300, 1_000, 5_003, 20_001)
LLAMA = ("penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature")
FRACTIONS = (0.001, 0.05, 0.3, 0.5, 0.9, 0.95, 0.999, 1.0)
ROWS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda random, length: random.normal(0, 3, length),
    "flat": lambda random, length: random.normal(5, 0.1, length),
    "ties": lambda random, length: random.integers(-4, 5, length),
    "two values": lambda random, length: random.integers(0, 2, length) * 7,
    "equal": lambda random, length: np.full(length, random.normal()),
    "peaked": lambda random, length: random.normal(-10, 2, length) + 30 * (np.arange(length) == length // 2),
    "likely ones": lambda random, length: (
        random.normal(-6, 2, length) + (random.random(length) < 0.01) * random.exponential(6, length)
    ),
    "minus infinity": lambda random, length: np.where(random.random(length) < 0.7, -np.inf, random.normal(size=length)),
    "one": lambda random, length: np.where(np.arange(length) == length // 3, 2.5, -np.inf),
    "huge": lambda random, length: random.normal(0, 1e30, length),
    "tiny": lambda random, length: random.normal(0, 1e-10, length),
    "large and near": lambda random, length: 3000 + random.integers(0, 9, length) * 2**-11,
}


@pytest.fixture(scope="module")
def kernel(compiled_kernels: None) -> ScanKernel:
    return ScanKernel()


def row_of(kind: str, random: np.random.Generator, length: int) -> np.ndarray:
    row = ROWS[kind](random, length).astype(np.float32)
    row[random.integers(length)] = max(row.max(), -1e30)  # at least one is finite; sometimes the largest occurs twice
    return row


def assert_same(found: Candidates, wanted: Candidates) -> None:
    assert found.ids.tolist() == wanted.ids.tolist()
    assert found.logits.tobytes() == wanted.logits.tobytes()


def random_sampling(random: np.random.Generator, length: int) -> Sampling:
    """A chain with each field often at its neutral value, in llama-server's order or another one."""

    def often(neutral: Any, *others: Any) -> Any:
        return others[random.integers(len(others))] if random.random() < 0.4 else neutral

    names = [*LLAMA]
    if random.random() < 0.5:
        random.shuffle(names)
        names = names[: random.integers(1, len(names) + 1)]
    allowed = np.packbits(random.random(length) < 0.3).tobytes()
    chain = SamplerChain(
        tuple(names),
        typical_p=often(1.0, *FRACTIONS),
        top_n_sigma=often(0.0, 0.5, 1.0, 3.0),
        xtc_probability=often(0.0, 0.5, 1.0),
        xtc_threshold=often(0.1, 0.0, 1e-12, 0.05, 0.5),
        dynatemp_range=often(0.0, 0.0, 0.0, 0.5),
        dry=Dry(0.8, 1.75, 2, 64),
        mirostat=often(0, 0, 1, 2),
        allowed=allowed if any(allowed) and random.random() < 0.2 else b"",
        adaptive_target=often(-1.0, -1.0, 0.3),
        min_keep=often(0, 1, 3, 400),
        last_n=often(None, -1, 5),
    )
    biased = np.unique(random.integers(0, length, 3)).tolist() if random.random() < 0.2 else []
    return Sampling(
        temperature=often(1.0, 0.0, 1e-5, 2e-4, 0.3, 0.8, 3.0, 1e6),
        top_p=often(1.0, *FRACTIONS),
        top_k=often(0, 1, 5, 40, 900),
        min_p=often(0.0, *FRACTIONS, 1e-30),
        presence_penalty=often(0.0, 0.5, -1.0),
        frequency_penalty=often(0.0, 0.5),
        repetition_penalty=often(1.0, 1.2, 0.5),
        logit_bias=tuple((token, float(random.normal(0, 20))) for token in biased),
        chain=chain,
    )


def random_query(random: np.random.Generator, length: int) -> ChainQuery:
    wanted = random_sampling(random, length)
    assert wanted.chain is not None
    prompt = tuple((random.integers(0, min(length, 40), 30)).tolist())
    generated = tuple(random.integers(0, length, 9).tolist()) + prompt[:6]
    seeds = random.integers(0, 2**64, 6, np.uint64).tolist()
    mask = None
    if random.random() < 0.2:
        mask = np.zeros(-(-length // 32), np.uint32)
        for token in random.integers(0, length, random.integers(1, length + 1)).tolist():
            mask[token // 32] |= np.uint32(1 << token % 32)
    banned = tuple(random.integers(0, length, 4).tolist()) if mask is None and random.random() < 0.3 else ()
    limit = sampler_chain.first_limit(wanted.chain)
    return ChainQuery(
        SampleQuery(wanted, seeds, TokenCounts(generated), prompt, banned, mask),
        0,
        Repetitions(wanted.chain.dry, (*prompt, *generated)) if wanted.chain.dry else None,
        [[limit] for _ in seeds] if limit is not None else [],
        generated[-5:] if wanted.chain.last_n == 5 else (),
    )


def without_limits(query: ChainQuery) -> ChainQuery:
    """The same query with lists of its own."""
    limits = [[*each] for each in query.limits]
    return ChainQuery(query.sample, query.position, query.repetitions, limits, query.recent)


@pytest.mark.parametrize("kind", ROWS)
def test_a_chain_has_the_same_result_with_and_without_the_kernel(kernel: ScanKernel, kind: str) -> None:
    """Its tokens before the draw are compared with their logits, then the drawn ones and the limits of Mirostat."""
    random = np.random.default_rng(list(kind.encode()))
    for turn in range(100):
        row = row_of(kind, random, LENGTHS[turn % len(LENGTHS)])
        before, query = row.tobytes(), random_query(random, len(row))
        names = [name for name in query.chain.order if name != "xtc"]
        with np.errstate(all="ignore"):
            first = [sampler_chain._first_tokens(row, query, each) for each in (kernel, None)]
            found, wanted = (sampler_chain._applied(names, tokens, query).all() for tokens in first)
        assert_same(found, wanted)
        with_kernel, without = query, without_limits(query)
        assert sampler_chain.sample_chain(row, with_kernel, kernel) == sampler_chain.sample_chain(row, without)
        assert with_kernel.limits == without.limits
        assert row.tobytes() == before


METHODS: dict[str, Callable[[Candidates | WholeRow, float], Any]] = {
    "top": lambda tokens, number: tokens.top(1 + int(50 * number)),
    "heavy": lambda tokens, number: tokens.heavy(number),
    "heavy, at least": lambda tokens, number: tokens.heavy(number, 30),
    "nucleus": lambda tokens, number: tokens.nucleus(number),
    "nucleus, at least": lambda tokens, number: tokens.nucleus(number, 30),
    "typical": lambda tokens, number: tokens.typical(number),
    "within_sigma": lambda tokens, number: tokens.within_sigma(4 * number),
    "without_top": lambda tokens, number: tokens.without_top(number / 2),
    "expected": lambda tokens, number: tokens.expected(20 * number),
}


@pytest.mark.parametrize("temperature", [None, 2e-4, 0.5, 40.0])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_keeps_the_same_tokens(kernel: ScanKernel, method: str, temperature: float | None) -> None:
    random = np.random.default_rng(7)
    for turn in range(120):
        kind = [*ROWS][turn % len(ROWS)]
        row = row_of(kind, random, LENGTHS[random.integers(len(LENGTHS))])
        changed = np.unique(random.integers(0, len(row), 5))
        logits = np.where(random.random(len(changed)) < 0.3, -np.inf, random.normal(0, 5, len(changed)))
        tokens: Candidates | WholeRow = WholeRow(RowScan(kernel, row)).replaced(changed, logits)
        if tokens.largest == -math.inf:
            continue
        tokens = tokens if temperature is None else tokens.tempered(temperature)
        number = FRACTIONS[random.integers(len(FRACTIONS))]
        with np.errstate(all="ignore"):
            assert_same(METHODS[method](tokens, number).all(), METHODS[method](tokens.all(), number))
            numbers = np.append(random.random(3), [0.0, 1 - 2**-53])
            assert tokens.drawn(numbers) == tokens.all().drawn(numbers)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "nucleus, at least"])
def test_arrays_of_all_tokens_are_rarely_needed(kernel: ScanKernel, method: str, monkeypatch) -> None:
    """The other tests would pass if each method fell back to arrays."""
    made: Counter[str] = Counter()
    everything = WholeRow.all

    def counted(tokens: WholeRow) -> Candidates:
        made[method] += 1
        return everything(tokens)

    monkeypatch.setattr(WholeRow, "all", counted)
    random = np.random.default_rng(3)
    for number in np.linspace(0.2, 0.95, 40).tolist():
        tokens = WholeRow(RowScan(kernel, row_of("likely ones", random, 20_001)))
        METHODS[method](tokens, number)
        tokens.tempered(0.7).drawn(random.random(3))
    assert made[method] <= 2


def test_equal_shares_at_the_border_are_decided_by_the_arrays(kernel: ScanKernel) -> None:
    """Half of the weight is exactly the first of two equal tokens; the sums decide, so arrays are made."""
    row = np.full(700, -np.inf, np.float32)
    row[[3, 500]] = 1.0
    for method in ("nucleus", "typical"):
        assert_same(
            METHODS[method](WholeRow(RowScan(kernel, row)), 0.5).all(),
            METHODS[method](WholeRow(RowScan(kernel, row)).all(), 0.5),
        )
    assert WholeRow(RowScan(kernel, row)).nucleus(0.5).ids.tolist() == [3]
    assert WholeRow(RowScan(kernel, row)).typical(0.5).ids.tolist() == [3, 500]


@pytest.mark.parametrize("length", LENGTHS)
def test_scanned_numbers_are_those_of_their_definitions(kernel: ScanKernel, length: int) -> None:
    row = np.random.default_rng(length).normal(0, 4, length).astype(np.float32)
    row[length // 2] = -np.inf if length > 1 else 0
    changed = np.array([-3, 0, length - 1, length + 5]) if length > 2 else np.zeros(0, np.int64)
    scan, rest = RowScan(kernel, row, changed), row.astype(np.float64)
    rest[changed[1:3]] = -np.inf
    blocks = np.arange(0, length, BLOCK)
    assert scan.largest.tolist() == np.maximum.reduceat(rest, blocks).tolist()
    assert RowScan(kernel, row).without(changed).largest.tolist() == scan.largest.tolist()
    for limit in (-np.inf, -1.0, float(row[length // 3]), 5.0, np.inf):
        wanted = np.flatnonzero((rest >= limit) & (rest > -np.inf))
        assert scan.above(limit).tolist() == wanted.tolist()
    most = float(rest.max())
    weights, products = scan.weights(most, 0.5)
    logs = np.where(rest > -np.inf, (rest - most) / 2, -800)
    assert weights == pytest.approx(np.add.reduceat(np.exp(logs), blocks), rel=1e-11)
    assert products == pytest.approx((logs * np.exp(logs)).sum(), rel=1e-11)
    finite = rest[rest > -np.inf] - 1.5
    assert scan.moments(1.5) == pytest.approx([len(finite), finite.sum(), (finite**2).sum()], rel=1e-12, abs=1e-9)


def test_far_lower_weights_are_not_summed(kernel: ScanKernel) -> None:
    row = np.repeat(np.array([0, -43, -1000, -3.4e38], np.float32), BLOCK)
    weights, products = RowScan(kernel, row).weights(0.0, 1.0)
    assert weights.tolist() == [BLOCK, 0, 0, 0]
    assert products == 0


def test_rows_are_the_same_alone_and_in_company() -> None:
    """Also with the numbers that are reported beside the tokens of a chain."""
    random = np.random.default_rng(11)
    rows = random.normal(0, 3, (8, 3_001)).astype(np.float32)
    chains = [random_sampling(random, 3_001) for _ in rows]
    asked = []
    for wanted in chains:
        assert wanted.chain is not None
        limit = sampler_chain.first_limit(wanted.chain)
        job = Job((1, 2, 3), 1, 9, wanted, (), b"k" * 16, alternatives=3)
        asked.append(SampleTokens(job, [0], 0, TokenCounts(), None, [[limit or 0.0]]))
    sampler = Sampler(CompiledKernel())
    together = sampler.read(rows.copy(), asked)
    assert together == [sampler.read(row[None].copy(), [each])[0] for row, each in zip(rows, asked, strict=True)]
