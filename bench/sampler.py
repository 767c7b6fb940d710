"""`python -m bench.sampler`: the cost of sampling and reporting a token, in milliseconds of one core per row.

It measures CPU time of the thread, which other processes affect less: minimum and median of the repetitions.
"before" is a straightforward implementation: float64 weights, and a nucleus that is built by partition. For chains of
samplers (`--chains` measures only these) it is the chain in numpy on arrays of the whole vocabulary.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from time import thread_time

import numpy as np
from numpy.typing import NDArray

from afterword.engine.core.numpy_kernel import NumpyKernel, adjusted_row, random_number
from afterword.engine.core.repetitions import Repetitions
from afterword.engine.core.sampler import Sampler, SampleTokens, ScoreQuery, seed_of
from afterword.engine.core.sampler_chain import first_limit
from afterword.engine.core.sampler_kernel import SampleQuery
from afterword.engine.core.token_counts import TokenCounts
from afterword.engine.protocol import Dry, Job, SamplerChain, Sampling

Rows = NDArray[np.float32]
KEY = b"k" * 16

CASES: tuple[tuple[str, Sampling, int | None], ...] = (
    ("T 0.8, top_p 0.9, penalties, logprobs 5", Sampling(0.8, 0.9, 0, 0.0, 0.5, 0.2), 5),
    ("T 0.8, top_p 0.9, logprobs 5", Sampling(0.8, 0.9), 5),
    ("T 0.8, top_p 0.9", Sampling(0.8, 0.9), None),
    ("T 0.8, top_k 40, top_p 0.9", Sampling(0.8, 0.9, 40), None),
    ("T 0.8, min_p 0.05", Sampling(0.8, min_p=0.05), None),
    ("T 1, logprobs 5", Sampling(), 5),
    ("T 1", Sampling(), None),
    ("T 1, top_p 0.1", Sampling(1.0, 0.1), None),
    ("greedy, logprobs 5", Sampling(0.0), 5),
    ("greedy", Sampling(0.0), None),
)
LLAMA = ("penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature")
DRY = Dry(0.8, 1.75, 2, 1024)
XTC = {"xtc_probability": 0.5, "xtc_threshold": 0.1}
CHAINS: tuple[tuple[str, Sampling], ...] = (
    ("min_p 0.05", Sampling(min_p=0.05, chain=SamplerChain(LLAMA))),
    ("top_k 40", Sampling(top_k=40, chain=SamplerChain(LLAMA))),
    ("top_p 0.95", Sampling(top_p=0.95, chain=SamplerChain(LLAMA))),
    ("typical_p 0.95", Sampling(chain=SamplerChain(LLAMA, typical_p=0.95))),
    ("top_n_sigma 1", Sampling(chain=SamplerChain(LLAMA, top_n_sigma=1.0))),
    ("XTC", Sampling(chain=SamplerChain(LLAMA, **XTC))),
    ("DRY", Sampling(chain=SamplerChain(LLAMA, dry=DRY))),
    ("Mirostat 2", Sampling(chain=SamplerChain(LLAMA, mirostat=2))),
    ("dynamic temperature", Sampling(chain=SamplerChain(LLAMA, dynatemp_range=0.5))),
    ("T 1, min_p 0.05, DRY, XTC", Sampling(min_p=0.05, chain=SamplerChain(LLAMA, dry=DRY, **XTC))),
    (
        "T 0.8, penalties, DRY, top_k 40, top_p 0.95, min_p 0.05",
        Sampling(0.8, 0.95, 40, 0.05, repetition_penalty=1.1, chain=SamplerChain(LLAMA, dry=DRY)),
    ),
    ("T 1.5 first, min_p 0.1", Sampling(1.5, min_p=0.1, chain=SamplerChain(("temperature", "min_p")))),
    ("allowed tokens (half), min_p 0.05", Sampling(min_p=0.05, chain=SamplerChain(LLAMA, allowed=b"\x55" * 18_992))),
)


def main() -> None:
    """Print the table."""
    options = _options().parse_args()
    generator = np.random.default_rng(0)
    flat = generator.normal(0, 2, (options.rows, options.vocabulary)).astype(np.float32)
    peaked = flat - 6
    for row in peaked:  # a few hundred likely tokens, one of them very likely
        likely = generator.choice(len(row), 200, replace=False)
        row[likely] += generator.exponential(4, 200).astype(np.float32)
        row[likely[0]] += 12
    counts = TokenCounts(generator.choice(options.vocabulary, 100, replace=False).tolist() * 2)
    prompt = tuple(generator.choice(options.vocabulary, 900).tolist()) + (1, 2, 3, 4) * 25
    print(f"{options.rows} rows x {options.vocabulary}; % of a step of {options.step_ms:g} ms is for all rows, median")
    print(f"{'':64}{'before':>16}{'now: min':>12}{'median':>9}{'% of step':>11}")
    for name, sampling in CHAINS:
        for kind, rows in (("flat", flat), ("peaked", peaked)):
            times = [
                _measure(_chain(Sampler(kernel), rows, sampling, prompt), options.rows, repeat)
                for kernel, repeat in ((NumpyKernel(), max(1, options.repeat // 10)), (None, options.repeat))
            ]
            _show(f"{name}, {kind}", *times, options)
    if options.chains:
        return
    for name, sampling, alternatives in CASES:
        job = Job((1, 2, 3), 1, 1, sampling, (), KEY, alternatives=alternatives)
        for kind, rows in (("flat", flat), ("peaked", peaked)):
            before = _measure(_before(rows, job, counts), options.rows, max(1, options.repeat // 10))
            now = _measure(_now(rows, job, counts), options.rows, options.repeat)
            _show(f"{name}, {kind}", before, now, options)
    following = generator.integers(0, options.vocabulary, options.rows).tolist()
    sampler, asks = Sampler(), [ScoreQuery(token, 5) for token in following]
    _show(
        "score, 5 alternatives and rank",
        _measure(
            lambda: [_report_before(row, token, 5) for row, token in zip(flat, following, strict=True)], len(flat)
        ),
        _measure(lambda: sampler.read(flat, asks), len(flat), options.repeat),
        options,
    )


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.sampler", description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=151_936, help="tokens in a row (151936)")
    parser.add_argument("--rows", type=int, default=16, help="rows in a step (16)")
    parser.add_argument("--step-ms", type=float, default=138.0, help="milliseconds of such a step in the model (138)")
    parser.add_argument("--repeat", type=int, default=40, help="repetitions of each measurement (40)")
    parser.add_argument("--chains", action="store_true", help="only the chains of samplers")
    return parser


def _measure(work: Callable[[], object], rows: int, repeat: int = 5) -> tuple[float, float]:
    """Milliseconds per row: minimum and median."""
    work()
    times = []
    for _ in range(repeat):
        start = thread_time()
        work()
        times.append((thread_time() - start) / rows * 1e3)
    return min(times), median(times)


def _show(name: str, before: tuple[float, float], now: tuple[float, float], options: argparse.Namespace) -> None:
    share = now[1] * options.rows / options.step_ms * 100
    print(f"{name:<64}{before[1]:>16.3f}{now[0]:>12.3f}{now[1]:>9.3f}{share:>11.1f}", flush=True)


def _now(rows: Rows, job: Job, counts: TokenCounts) -> Callable[[], object]:
    sampler = Sampler()
    positions = iter(range(1 << 62))

    def work() -> None:
        position = next(positions)
        sampler.read(rows, [SampleTokens(job, (index,), position, counts) for index in range(len(rows))])

    return work


def _chain(sampler: Sampler, rows: Rows, sampling: Sampling, prompt: tuple[int, ...]) -> Callable[[], object]:
    job, chain = Job(prompt, 1, 1, sampling, (), KEY), sampling.chain
    assert chain is not None
    repetitions = Repetitions(chain.dry, prompt) if chain.dry else None
    positions = iter(range(1 << 62))

    def work() -> None:
        position, counts = next(positions), TokenCounts()
        limits = [first_limit(chain) or 0.0] * (position + 1)
        asked = [SampleTokens(job, (i,), position, counts, repetitions, [[*limits]]) for i in range(len(rows))]
        sampler.read(rows, asked)

    return work


def _before(rows: Rows, job: Job, counts: TokenCounts) -> Callable[[], object]:
    def work() -> None:
        for index, row in enumerate(rows):
            token = _choose_before(
                adjusted_row(row, SampleQuery(job.sampling, (), counts)),
                job.sampling,
                random_number(seed_of(KEY, index, 0), 0),
            )
            if job.alternatives is not None:
                _report_before(row, token, job.alternatives)

    return work


def _choose_before(row: Rows, sampling: Sampling, draw: float) -> int:
    if sampling.temperature == 0:
        return int(np.argmax(row))
    weights = np.exp((row.astype(np.float64) - float(row.max())) / sampling.temperature)
    weights[weights < sampling.min_p] = 0.0
    ids, size = np.arange(len(weights)), sampling.top_k or 256
    if sampling.top_k:
        ids = _likeliest_before(weights, size)
    elif sampling.top_p < 1.0:
        ids = _likeliest_before(weights, size)
        while weights[ids].sum() < sampling.top_p * weights.sum():
            size = min(size * 8, len(weights))
            ids = _likeliest_before(weights, size)
    cumulated = np.cumsum(weights[ids])
    if sampling.top_p < 1.0:
        mass = cumulated[-1] if sampling.top_k else weights.sum()
        cumulated = cumulated[: int(np.searchsorted(cumulated, sampling.top_p * mass)) + 1]
    return int(ids[np.searchsorted(cumulated, draw * cumulated[-1], side="right")])


def _likeliest_before(values: NDArray[np.floating], count: int) -> NDArray[np.int64]:
    ids = np.flatnonzero(values >= np.partition(values, len(values) - count)[len(values) - count])
    return ids[np.argsort(-values[ids], kind="stable")][:count]


def _report_before(row: Rows, token: int, alternatives: int) -> tuple[float, list[float], int]:
    highest = row.max()
    total = float(highest) + float(np.log(np.exp(row - highest).sum(dtype=np.float64)))
    top = [float(row[i]) - total for i in _likeliest_before(row, alternatives)]
    return float(row[token]) - total, top, 1 + int((row > row[token]).sum())


if __name__ == "__main__":
    main()
