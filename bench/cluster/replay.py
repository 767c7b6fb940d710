"""Replays a trace against a real server, and simulates the same trace with rates that are measured there first.

Prompts are token ids, drawn from a seed for each part of the trace's tree, so equal parts are equal tokens. The cached
tokens are those that the server reports.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from random import Random
from statistics import median
from typing import Any

import httpx

from bench.cluster.replica import Rates, Served
from bench.cluster.routing import ROUTERS
from bench.cluster.simulation import Summary, simulate, summary
from bench.cluster.trace import Request, Shape, make_trace

SHAPE = Shape(rate=1.5, requests=150, prefixes=25, branches=1, prefix=400, branch=1, own=6, output=5, skew=0.0)
"""Fifty equally likely prefixes for two replicas of the built-in model, with short questions and answers."""
IDS = range(300, 1000)
"""Ids of ordinary tokens of the built-in model."""
_CALIBRATIONS, _LONG, _DECODED = 5, 1200, 100  # rounds; tokens of a long prompt, and of an answer


def tokens(request: Request) -> list[int]:
    """The prompt of a request."""
    return [token for part in request.parts for token in Random(f"part {part.node}").choices(IDS, k=part.tokens)]


async def replayed(url: str, trace: Sequence[Request]) -> list[Served]:
    """Send each request at its time, and wait for all answers. Replicas are not known, so they have the number 0."""
    prompts = [tokens(request) for request in trace]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=300, trust_env=False, limits=limits) as http:
        start = time.perf_counter()

        async def one(request: Request, prompt: list[int]) -> Served:
            await asyncio.sleep(request.arrival - (time.perf_counter() - start))
            cached, first, end = await _completed(http, prompt, request.output)
            return Served(request, 0, cached, first, end)

        return await asyncio.gather(*(one(*each) for each in zip(trace, prompts, strict=True)))


async def measured_rates(url: str, slots: int) -> Rates:
    """The rates of one replica, by requests to a server that does nothing else.

    Long prompts one after the other give the prefill; answers of one sequence, and of as many as there are slots, give
    the decode step. The first request of each kind is not counted.
    """
    draw = Random("rates")
    async with httpx.AsyncClient(base_url=url, timeout=300, trust_env=False) as http:
        firsts, ends = [], []
        for _ in range(_CALIBRATIONS + 1):
            _, first, end = await _completed(http, draw.choices(IDS, k=_LONG), _DECODED)
            firsts.append(first)
            ends.append(end - first)
        alone = median(ends[1:]) / _DECODED
        crowd = []
        for _ in range(_CALIBRATIONS + 1):
            prompt = draw.choices(IDS, k=20)
            _, first, end = await _completed(http, prompt, _DECODED, samples=slots)
            crowd.append((end - first) / _DECODED)
    each = max(0.0, (median(crowd[1:]) - alone) / (slots - 1))
    return Rates(slots=slots, cache=0, prefill=_LONG / median(firsts[1:]), step=alone - each, step_each=each)


async def compared(url: str, name: str, shape: Shape, slots: int, seed: int) -> tuple[Rates, list[Summary]]:
    """The measured rates, and the figures of the real run and of the simulated one, for two replicas."""
    replicas = 2
    rates = await measured_rates(url, slots)
    trace = make_trace(shape, replicas, seed)
    real = summary(f"{name}, real", replicas, await replayed(url, trace))
    return rates, [real, summary(f"{name}, simulated", replicas, simulate(trace, replicas, rates, ROUTERS[name]()))]


async def _completed(
    http: httpx.AsyncClient, prompt: list[int], output: int, samples: int = 1
) -> tuple[int, float, float]:
    """The cached tokens of a prompt, and the seconds until the first token and until the end."""
    body = {"prompt": prompt, "max_tokens": output, "n": samples, "seed": 1, "ignore_eos": True, "stream": True}
    start, first, usage = time.perf_counter(), 0.0, dict[str, Any]()
    async with http.stream(
        "POST", "/v1/completions", json=body | {"stream_options": {"include_usage": True}}
    ) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            first = first or (time.perf_counter() - start if line.startswith("data: ") else 0.0)
            if line.startswith("data: {"):
                usage = json.loads(line[6:])["usage"] or usage
    if not usage:
        raise RuntimeError("the stream has ended without its usage")
    return usage["prompt_tokens_details"]["cached_tokens"], first, time.perf_counter() - start
