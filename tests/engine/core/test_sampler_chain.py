"""Tests of the samplers of `SamplerChain` against reference implementations in plain Python floats."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import chain_reference as reference
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from afterword.engine.core import sampler_chain
from afterword.engine.core.repetitions import Repetitions, has_bit
from afterword.engine.core.sampler import Sampler, SampleTokens
from afterword.engine.core.sampler_chain import Candidates, ChainQuery
from afterword.engine.core.sampler_kernel import SampleQuery
from afterword.engine.core.token_counts import TokenCounts
from afterword.engine.protocol import Dry, Job, SamplerChain, Sampling

CASES_OF_MIROSTAT = Sampling(chain=SamplerChain(("temperature",), mirostat=2))
KEY = b"k" * 16
LLAMA = ("penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature")
EIGHT = np.array([2.0, 1.5, 1.0, 0.0, -1.0, -1.0, 0.5, 1.9], np.float32)
WIDE = np.random.default_rng(5).normal(0, 3, 300).astype(np.float32)
DRAWS = 20_000
PROMPT = (1, 2, 3, 0, 1, 2, 4, 5, 1, 2)

logits = st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=400).map(lambda row: np.round(row, 2))


def sampling(steps: Iterable[str] = LLAMA, **fields: Any) -> Sampling:
    of_chain = {name: fields.pop(name) for name in [*fields] if name in SamplerChain.__struct_fields__}
    return Sampling(**fields, chain=SamplerChain(tuple(steps), **of_chain))


def query(wanted: Sampling, prompt: tuple[int, ...] = (), generated: tuple[int, ...] = ()) -> ChainQuery:
    repetitions = Repetitions(wanted.chain.dry, (*prompt, *generated)) if wanted.chain and wanted.chain.dry else None
    return ChainQuery(SampleQuery(wanted, (), TokenCounts(generated), prompt), len(generated), repetitions)


def drawn(
    row: np.ndarray, wanted: Sampling, draws: int, generated: tuple[int, ...] = (), prompt: tuple[int, ...] = PROMPT
) -> list[int]:
    job = Job(prompt=prompt, samples=1, max_tokens=1, sampling=wanted, end_tokens=(), key=KEY)
    text = (*prompt, *generated)
    assert wanted.chain is not None
    repetitions = Repetitions(wanted.chain.dry, text) if wanted.chain.dry else None
    limits = [[sampler_chain.first_limit(wanted.chain) or 0.0] for _ in range(draws)]
    last = wanted.chain.last_n or 0
    recent = text[-last:] if 0 < last < len(text) else ()
    asked = SampleTokens(job, range(draws), 0, TokenCounts(generated), repetitions, limits, recent=recent)
    (tokens,) = Sampler().read(row[None].copy(), [asked])
    return [token.id for token in tokens]


def chi_square(chosen: list[int], expected: dict[int, float]) -> float:
    """How many standard deviations chi-square lies above its mean. All rare tokens count as one."""
    counts = Counter(chosen)
    assert counts.keys() <= expected.keys(), "a token that the samplers exclude"
    common = [token for token, p in expected.items() if p * len(chosen) >= 5]
    pairs = [(counts.get(token, 0), expected[token] * len(chosen)) for token in common]
    rest = len(chosen) - sum(wanted for _, wanted in pairs)
    if rest > 5:
        pairs.append((len(chosen) - sum(found for found, _ in pairs), rest))
    freedom = len(pairs) - 1
    if not freedom:
        return 0.0
    return (math.fsum((found - wanted) ** 2 / wanted for found, wanted in pairs) - freedom) / math.sqrt(2 * freedom)


def expected(row: np.ndarray, wanted: Sampling, generated: tuple[int, ...] = ()) -> dict[int, float]:
    """The reference's probabilities: with XTC, those of both cases, weighted."""
    assert wanted.chain is not None
    share = wanted.chain.xtc_probability
    result: dict[int, float] = {}
    for excludes_top, weight in ((True, share), (False, 1 - share)):
        if weight:
            found = reference.distribution(row.tolist(), wanted, PROMPT, generated, excludes_top)
            for token, p in reference.probabilities(found).items():
                result[token] = result.get(token, 0.0) + weight * p
    return result


BREAKERS = bytes([1 << 4])  # token 4
PENALTIES = {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.4}
DRY = Dry(0.8, 1.75, 2, 64, BREAKERS)
CASES = {
    "typical_p": sampling(typical_p=0.6),
    "top_n_sigma": sampling(top_n_sigma=1.0),
    "xtc": sampling(xtc_probability=0.5, xtc_threshold=0.1),
    "xtc always": sampling(xtc_probability=1.0, xtc_threshold=0.05),
    "dynatemp": sampling(dynatemp_range=0.7, dynatemp_exponent=1.5),
    "dynatemp from 0": sampling(dynatemp_range=1.5, temperature=0.5),
    "dry": sampling(dry=DRY),
    "dry of everything": sampling(dry=Dry(2.0, 1.1, 0, -1)),
    "penalties": sampling(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.25, xtc_probability=0.1),
    "allowed": sampling(("temperature",), temperature=0.7, allowed=bytes([0b10101101])),
    "order": sampling(("temperature", "top_p", "top_k"), temperature=2.0, top_p=0.7, top_k=4),
    "other order": sampling(("top_p", "temperature"), temperature=2.0, top_p=0.7),
    "xtc first": sampling(
        ("xtc", "temperature", "top_p"), temperature=1.5, top_p=0.9, xtc_probability=0.6, xtc_threshold=0.2
    ),
    "infill": sampling(("top_k", "infill"), top_k=5),
    "min_keep of top_p": sampling(top_p=0.2, min_keep=4, xtc_probability=0.1, xtc_threshold=0.3),
    "min_keep of min_p": sampling(("min_p", "temperature"), min_p=0.9, min_keep=3, temperature=1.5),
    "min_keep of typical_p": sampling(typical_p=0.1, min_keep=5),
    "min_keep of xtc": sampling(xtc_probability=1.0, xtc_threshold=0.01, min_keep=200),
    "last_n": sampling(("penalties",), **PENALTIES, last_n=5),
    "last_n of everything": sampling(("penalties",), **PENALTIES, last_n=-1),
    "last_n beyond the text": sampling(("penalties",), **PENALTIES, last_n=64),
    "all": sampling(
        dry=DRY,
        top_n_sigma=2.0,
        top_k=20,
        typical_p=0.95,
        top_p=0.95,
        min_p=0.02,
        xtc_probability=0.5,
        xtc_threshold=0.15,
        temperature=1.2,
        dynatemp_range=0.4,
        logit_bias=((3, 1.0),),
        repetition_penalty=1.1,
    ),
}


@pytest.mark.parametrize("row", [EIGHT, WIDE], ids=["eight", "wide"])
@pytest.mark.parametrize("wanted", CASES.values(), ids=CASES.keys())
def test_draws_follow_the_reference(row: np.ndarray, wanted: Sampling) -> None:
    generated = (1, 2, 1, 2)
    assert chi_square(drawn(row, wanted, DRAWS, generated), expected(row, wanted, generated)) < 4


@pytest.mark.parametrize(
    ("wanted", "other"),
    [
        (CASES["typical_p"], sampling(typical_p=0.9)),
        (CASES["xtc"], sampling(xtc_probability=0.45)),
        (CASES["dry"], sampling(dry=Dry(0.8, 1.5, 2, 64, BREAKERS))),
        (CASES["dynatemp"], sampling(dynatemp_range=0.7)),
        (CASES["min_keep of min_p"], sampling(("min_p", "temperature"), min_p=0.9, min_keep=4, temperature=1.5)),
        (CASES["last_n"], sampling(("penalties",), **PENALTIES, last_n=4)),
        (CASES["top_n_sigma"], sampling(top_n_sigma=0.8)),
        (CASES["order"], sampling(("top_p", "temperature", "top_k"), temperature=2.0, top_p=0.7, top_k=4)),
        (sampling(("infill", "temperature")), sampling(("temperature",))),
    ],
)
def test_the_chi_square_of_a_wrong_distribution_is_large(wanted: Sampling, other: Sampling) -> None:
    """The test above can fail: here the same draws are compared with another parameter."""
    generated = (1, 2, 1, 2)
    wrong = expected(EIGHT, other, generated)
    everything = {token: wrong.get(token, 1e-9) for token in range(8)}
    assert chi_square(drawn(EIGHT, wanted, DRAWS, generated), everything) > 4


# ---- single samplers


@settings(max_examples=150, deadline=None)
@given(
    logits,
    st.sampled_from(["top_n_sigma", "typ_p", "top_p", "top_k", "min_p", "infill"]),
    st.floats(0.01, 0.99),
    st.sampled_from([0, 1, 2, 7, 300]),
)
def test_the_reference_keeps_the_same_tokens(row: np.ndarray, step: str, number: float, least: int) -> None:
    same = dict.fromkeys(["typical_p", "top_p", "min_p"], number)
    wanted = sampling([step], top_n_sigma=3 * number, top_k=int(9 * number), min_keep=least, **same)
    before = Candidates(np.arange(len(row)), row.astype(np.float64))
    kept = sampler_chain._SAMPLERS[step](before, query(wanted))
    assert set(kept.ids.tolist()) == reference.distribution(row.tolist(), wanted).keys()
    assert kept.logits.tolist() == row[kept.ids].tolist()
    assert kept.ids.tolist() == sorted(kept.ids.tolist())


@settings(max_examples=60, deadline=None)
@given(logits, st.floats(0.0, 2.0), st.floats(0.0, 3.0), st.floats(0.2, 4.0))
def test_the_reference_has_the_same_probabilities(
    row: np.ndarray, temperature: float, spread: float, exponent: float
) -> None:
    assume(len(set(row.tolist())) == len(row))  # of equal logits the lowest temperatures keep one
    wanted = sampling(["temperature"], temperature=temperature, dynatemp_range=spread, dynatemp_exponent=exponent)
    kept = sampler_chain.temperature(Candidates(np.arange(len(row)), row.astype(np.float64)), query(wanted))
    found = dict(zip(kept.ids.tolist(), kept.probabilities.tolist(), strict=True))
    for token, p in reference.probabilities(reference.distribution(row.tolist(), wanted)).items():
        assert found.get(token, 0.0) == pytest.approx(p, rel=1e-9, abs=1e-15)


@settings(max_examples=60, deadline=None)
@given(logits, st.floats(0.01, 0.5), st.sampled_from([0, 1, 3, 50]))
def test_the_least_likely_of_the_top_choices_stays(row: np.ndarray, threshold: float, least: int) -> None:
    chain = SamplerChain(("xtc",), xtc_probability=1.0, xtc_threshold=threshold, min_keep=least)
    before = Candidates(np.arange(len(row)), row.astype(np.float64))
    kept = sampler_chain.exclude_top_choices(before, chain)
    assert set(kept.ids.tolist()) == reference.without_top(dict(enumerate(row.tolist())), threshold, least).keys()


# ---- DRY


texts = st.lists(st.integers(0, 4), max_size=60)
sequences = st.lists(
    st.tuples(
        st.lists(st.integers(0, 4), min_size=1, max_size=2).map(tuple),
        st.lists(st.integers(0, 4), min_size=1, max_size=2).map(tuple),
    ),
    max_size=2,
).map(tuple)
settings_of_dry = st.builds(
    Dry,
    *(st.just(1.0), st.just(1.5), st.integers(0, 3), st.sampled_from([-1, 1, 3, 10, 64])),
    *(st.sampled_from([0, 1, 4, 17]).map(lambda bits: bytes([bits])), sequences),
)


# The window leaves the first token of the last breaker, and the first token of a longer one before another breaker.
@example([], [0, 1, 1, 1], Dry(1.0, 1.5, 0, 3, b"", (((0,), (1, 1)),)))
@example([], [0, 2, 1, 2, 1, 1], Dry(1.0, 1.5, 0, 4, b"", (((0,), (2, 1, 2)), ((2,), (1,)))))
@settings(max_examples=300, deadline=None)
@given(texts, texts, settings_of_dry)
def test_repetitions_are_those_of_the_definition(prompt: list[int], generated: list[int], dry: Dry) -> None:
    found = Repetitions(dry, prompt)
    for count, token in enumerate(generated, 1):
        kept = found.copy()
        kept.add(3)  # a copy is independent
        found.add(token)
        text = [*prompt, *generated[:count]]
        ids, lengths = found.continuations()
        assert dict(zip(ids.tolist(), lengths.tolist(), strict=True)) == reference.longest_repetitions(dry, text)


def test_repetitions_of_a_long_text_are_found_at_once() -> None:
    found = Repetitions(Dry(1.0, 1.75, 2, -1), [7] * 20_000)
    assert [each.tolist() for each in found.continuations()] == [[7], [19_999]]


def test_a_penalty_grows_to_the_limit_of_llama_cpp() -> None:
    wanted = sampling(["dry"], dry=Dry(1.0, 10.0, 2, -1))
    before = Candidates(np.arange(8), EIGHT.astype(np.float64))
    after = sampler_chain.dry(before, query(wanted, prompt=(7,) * 500))
    assert after.logits[7] == before.logits[7] - 10.0**38
    assert after.logits[:7].tolist() == before.logits[:7].tolist()


def test_bits_are_counted_from_the_lowest() -> None:
    assert [index for index in range(40) if has_bit(bytes([0b101, 0x80]), index)] == [0, 2, 15]


# ---- Mirostat


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("tau", [3.5, 3.7, 4.0])
def test_mirostat_draws_from_the_reference(version: int, tau: float) -> None:
    wanted = sampling(["temperature"], temperature=1.3, mirostat=version, mirostat_tau=tau)
    row = WIDE / np.float32(2)
    before = reference.distribution(row.tolist(), wanted)
    kept = reference.mirostat_1(before, 2 * tau, len(row)) if version == 1 else reference.mirostat_2(before, 2 * tau)
    assert 3 < len(kept) < len(row)
    chosen = drawn(row, wanted, DRAWS)
    assert chi_square(chosen, reference.probabilities(kept)) < 4
    cooler = {token: 1.2 * logit for token, logit in kept.items()}
    assert chi_square(chosen, reference.probabilities(cooler)) > 4  # the comparison can fail


@settings(max_examples=100, deadline=None)
@given(logits, st.floats(-2, 12), st.sampled_from([1, 2]))
def test_mirostat_keeps_what_the_reference_keeps(row: np.ndarray, limit: float, version: int) -> None:
    p = reference.probabilities(dict(enumerate(row.tolist())))
    ordered = sorted(p.values(), reverse=True)
    assume(version == 2 or ordered[0] > 1.001 * ordered[min(len(ordered), 100) - 1])  # else the exponent is 0
    before = Candidates(np.arange(len(row)), row.astype(np.float64))
    if version == 1:
        kept, wanted = sampler_chain.mirostat_1(before, limit, 1000), reference.mirostat_1
        names = wanted(dict(enumerate(row.tolist())), limit, 1000)
    else:
        kept = before.expected(limit)
        names = reference.mirostat_2(dict(enumerate(row.tolist())), limit)
    assert abs(len(kept.ids) - len(names)) <= 1  # the count is a power that is rounded down
    assert set(kept.ids.tolist()) <= names.keys() or names.keys() <= set(kept.ids.tolist())


@pytest.mark.parametrize("version", [1, 2])
def test_the_limit_of_mirostat_follows_the_surprise(version: int) -> None:
    """After each token the limit is that of the reference. After many tokens their mean surprise is `tau`.

    A token that is drawn again writes the same limit again.
    """
    wanted = sampling(["temperature"], temperature=1.2, mirostat=version, mirostat_tau=3.0, mirostat_eta=0.2)
    job = Job(prompt=(1,), samples=1, max_tokens=1, sampling=wanted, end_tokens=(), key=KEY)
    limits, rows = [6.0], np.random.default_rng(1).normal(0, 2, (400, 1000)).astype(np.float32)

    def token_at(position: int) -> int:
        asked = SampleTokens(job, [0], position, TokenCounts(), None, [limits])
        return Sampler().read(rows[position][None].copy(), [asked])[0][0].id

    surprises = []
    for position in range(len(rows)):
        token = token_at(position)
        known = [*limits]
        assert (token_at(position), limits) == (token, known)
        before, limit = reference.distribution(rows[position].tolist(), wanted), limits[position]
        kept = reference.mirostat_1(before, limit, 1000) if version == 1 else reference.mirostat_2(before, limit)
        surprises.append(-math.log2(reference.probabilities(kept)[token]))
        assert limits[position + 1] == pytest.approx(limit - 0.2 * (surprises[-1] - 3.0), abs=1e-5)
    assert np.mean(surprises[50:]) == pytest.approx(3.0, abs=0.15)


# ---- adaptive-p


@pytest.mark.parametrize("row", [EIGHT, WIDE], ids=["eight", "wide"])
@pytest.mark.parametrize(
    ("target", "fields"), [(0.0, {}), (0.3, {}), (0.15, {"min_p": 0.1, "temperature": 1.5}), (1.0, {"top_k": 6})]
)
def test_adaptive_p_draws_from_the_reference(row: np.ndarray, target: float, fields: dict[str, Any]) -> None:
    wanted = sampling(["top_k", "min_p", "temperature"], adaptive_target=target, **fields)
    before = reference.distribution(row.tolist(), wanted)
    near, _ = reference.adaptive(before, target, target)
    assert chi_square(drawn(row, wanted, DRAWS), reference.probabilities(near)) < 4
    other, _ = reference.adaptive(before, abs(target - 0.1), target)
    wrong = {token: max(p, 1e-9) for token, p in reference.probabilities(other).items()}
    assert chi_square(drawn(row, wanted, DRAWS), wrong) > 4  # the comparison can fail


def test_the_target_of_adaptive_p_follows_the_drawn_probabilities() -> None:
    """Each draw is from the reference's distribution for the mean that the reference has after the tokens before."""
    wanted = sampling(["temperature"], adaptive_target=0.3, adaptive_decay=0.8)
    job = Job(prompt=(1,), samples=1, max_tokens=1, sampling=wanted, end_tokens=(), key=KEY)
    means, mean = [0.3], 0.3
    rows = np.random.default_rng(2).normal(0, 2, (300, 40)).astype(np.float32)
    for position, row in enumerate(rows):
        asked = SampleTokens(job, [0], position, TokenCounts(), None, [means])
        before = [*means]
        token = Sampler().read(row[None].copy(), [asked])[0][0].id
        known = [*means]
        means[:] = before  # a draft that was rejected is drawn again
        assert Sampler().read(row[None].copy(), [asked])[0][0].id == token
        assert means == known
        near, p = reference.adaptive(dict(enumerate(row.tolist())), 0.3, mean)
        assert reference.probabilities(near)[token] > 1e-6
        mean = 0.8 * mean + 0.2 * p[token]
        assert means[-1] == pytest.approx(mean, rel=1e-9)
    assert len(means) == len(rows) + 1


# ---- requests that need no chain, and rows that are not finite


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("wanted", CASES.values(), ids=CASES.keys())
def test_a_row_that_is_not_finite_gives_some_token(value: float, wanted: Sampling) -> None:
    row = EIGHT.copy()
    row[2] = value
    assert all(0 <= token < 8 for token in drawn(row, wanted, 5))
    assert all(0 <= token < 8 for token in drawn(np.full(8, value, np.float32), wanted, 5))


def test_mirostat_has_a_limit_after_a_row_that_is_not_finite() -> None:
    limits = [6.0]
    chain = ChainQuery(SampleQuery(CASES_OF_MIROSTAT, (3,), TokenCounts()), 0, None, [limits])
    sampler_chain.sample_chain(np.full(8, math.nan, np.float32), chain)
    assert limits == [6.0, 6.0]


def test_banned_tokens_are_not_drawn() -> None:
    wanted = sampling(("temperature",), temperature=2.0, allowed=bytes([0b111]))
    job = Job((1,), 1, 9, wanted, (0, 1), KEY, min_tokens=2)
    (tokens,) = Sampler().read(EIGHT[None].copy(), [SampleTokens(job, range(50), 1, TokenCounts())])
    assert {token.id for token in tokens} == {2}


@pytest.mark.parametrize(
    ("fields", "mask", "expected"),
    [
        ({}, 0b10010110, {1, 2, 4, 7}),
        ({"allowed": bytes([0b00000111])}, 0b10010110, {1, 2}),
        ({"allowed": bytes([0b00000001])}, 0b10010110, {1, 2, 4, 7}),  # nothing in common, which the engine never asks
    ],
)
def test_tokens_that_a_grammar_excludes_are_not_drawn(fields: dict[str, Any], mask: int, expected: set[int]) -> None:
    wanted = sampling(("temperature",), temperature=5.0, **fields)
    job = Job((1,), 1, 9, wanted, (0,), KEY)
    asked = SampleTokens(job, range(400), 0, TokenCounts(), mask=np.array([mask], np.uint32))
    (tokens,) = Sampler().read(EIGHT[None].copy(), [asked])
    assert {token.id for token in tokens} == expected


@pytest.mark.parametrize(
    "order", [None, ("temperature",), ("top_k", "temperature"), ("min_p",), ("typ_p", "xtc"), LLAMA]
)
def test_a_grammar_that_allows_only_minus_infinity_gives_the_most_likely_token(order: tuple[str, ...] | None) -> None:
    """So it is with and without a chain. The grammar refuses that token, which ends the sample."""
    row = np.full(640, -np.inf, np.float32)
    row[0] = 1
    mask = np.full(20, 2**32 - 1, np.uint32)
    mask[0] -= 1
    fields: dict[str, Any] = {"top_k": 5, "min_p": 0.1, "temperature": 0.7}
    wanted = Sampling(**fields) if order is None else sampling(order, **fields, typical_p=0.9)
    asked = SampleTokens(Job((1,), 1, 9, wanted, (), KEY), range(5), 0, TokenCounts(), mask=mask)
    (tokens,) = Sampler().read(row[None], [asked])
    assert [token.id for token in tokens] == [0] * 5


def test_reported_ids_have_the_log_probabilities_of_the_unmodified_row() -> None:
    total = math.log(math.fsum(math.exp(x) for x in EIGHT.tolist()))
    for wanted in (Sampling(), CASES["xtc"]):
        job = Job((1,), 2, 1, wanted, (), KEY, alternatives=3, reported=(5, 0, 3))
        asked = SampleTokens(job, [0, 1], 0, TokenCounts())
        (tokens,) = Sampler().read(EIGHT[None].copy(), [asked])
        for token in tokens:
            assert [each for each, _ in token.top] == [5, 0, 3]
            for each, value in (*token.top, (token.id, token.logprob)):
                assert value == pytest.approx(float(EIGHT[each]) - total, abs=1e-6)
