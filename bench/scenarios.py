"""The scenarios: each is a function that sends requests to a server and returns figures.

Prompts are random tokens, new in each round, so a cache helps only if the scenario shares a prefix. The scenarios check
the lengths of prompts and responses, and raise `NotPossible` if a server does not support them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from time import perf_counter

from bench.client import Answer, Exchange, NotPossible
from bench.target import Ids, Target


@dataclass(frozen=True, slots=True)
class Size:
    """The sizes of all scenarios. Pairs are tokens of the prompt and of the response."""

    one: tuple[int, int] = (64, 128)
    prefill: int = 1024
    crowd: tuple[int, int] = (128, 64)
    at_once: int = 16
    common: int = 1024
    common_own: tuple[int, int] = (32, 32)
    common_requests: int = 32
    fan_out: int = 8
    fan_out_tokens: tuple[int, int] = (1024, 32)
    users: int = 4
    turns: int = 8
    turn: tuple[int, int] = (64, 48)
    questions: int = 24
    choices: int = 4
    scored: tuple[int, int, int] = (640, 16, 8)
    """Tokens that all prompts share, tokens that the choices of a question share, and tokens of a choice."""
    long: int = 1500
    longs: int = 8
    short: tuple[int, int] = (32, 16)
    watched: tuple[int, int] = (64, 1000)
    tiny: tuple[int, int] = (8, 1)
    tiny_requests: int = 640
    tiny_at_once: int = 32
    tiny_stream: tuple[int, int] = (16, 128)


FULL = Size()
QUICK = Size(
    one=(8, 64), prefill=48, crowd=(8, 4), at_once=4, common=32, common_own=(4, 2), common_requests=4,
    fan_out=2, fan_out_tokens=(16, 2), users=2, turns=2, turn=(6, 3), questions=2, choices=2, scored=(16, 4, 2),
    long=64, longs=2, short=(4, 2), watched=(8, 400), tiny_requests=8, tiny_at_once=4, tiny_stream=(4, 4),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Measure:
    """A figure that a scenario returns."""

    name: str
    unit: str
    more_is_better: bool = False


Numbers = dict[str, float]
Run = Callable[[Target, Size, Random], Awaitable[Numbers]]


@dataclass(frozen=True, slots=True)
class Scenario:
    """A typical use of a server."""

    name: str
    measures: tuple[Measure, ...]
    run: Run
    tiny: bool = False
    """Measures everything except the model, so it needs a very small model and runs only on request."""
    reads: str | None = None
    """The measure that states how many times per second the whole model is read."""


async def one_stream(target: Target, size: Size, random: Random) -> Numbers:
    """One client waits for one streamed response."""
    read, written = size.one
    answer = await target.complete(target.prompt(target.ids(random, read)), written, stream=True)
    target.check_prompt(answer, read)
    times = answer.times
    if times[0] == times[-1]:
        raise NotPossible("all events of the stream arrived at once")
    return {"decode": (written - 1) / (times[-1] - times[0]), "first token": times[0] - answer.started}


async def prefill(target: Target, size: Size, random: Random) -> Numbers:
    """A long prompt and a single token."""
    answer = await target.complete(target.prompt(target.ids(random, size.prefill)), 1)
    target.check_prompt(answer, size.prefill)
    return {"prompt": size.prefill / (answer.ended - answer.started)}


async def crowd(target: Target, size: Size, random: Random) -> Numbers:
    """Many concurrent requests with different prompts."""
    read, written = size.crowd
    prompts = [[target.ids(random, read)] for _ in range(size.at_once)]
    wall, _ = await _together(target, prompts, written, size.at_once)
    return {"wall": wall, "all tokens": size.at_once * written / wall}


async def common_prefix(target: Target, size: Size, random: Random) -> Numbers:
    """Many requests with a long common prefix, such as instructions and examples."""
    own, written = size.common_own
    prefix = target.ids(random, size.common)
    prompts = [[prefix, target.ids(random, own)] for _ in range(size.common_requests)]
    wall, _ = await _together(target, prompts, written, size.at_once)
    return {"wall": wall}


async def fan_out(target: Target, size: Size, random: Random) -> Numbers:
    """Several choices for one long prompt."""
    read, written = size.fan_out_tokens
    # Eight greedy choices would be equal, and vLLM refuses them.
    prompt = target.prompt(target.ids(random, read))
    answer = await target.complete(prompt, written, n=size.fan_out, temperature=1)
    target.check_prompt(answer, read)
    return {"wall": answer.ended - answer.started}


async def chats(target: Target, size: Size, random: Random) -> Numbers:
    """Growing chats: each prompt is the whole chat so far and new tokens."""
    randoms = [Random(random.random()) for _ in range(size.users)]
    started = perf_counter()
    await asyncio.gather(*(_chat(target, size, random) for random in randoms))
    return {"wall": perf_counter() - started}


async def scoring(target: Target, size: Size, random: Random) -> Numbers:
    """An evaluation by multiple choice: log probabilities of given texts, nothing generated."""
    generated = await _scores(target, random)
    shared, asked, chosen = size.scored
    prefix = target.ids(random, shared)
    questions = [target.ids(random, asked) for _ in range(size.questions)]
    prompts = [[prefix, question, target.ids(random, chosen)] for question in questions for _ in range(size.choices)]
    wall, answers = await _together(target, prompts, generated, size.at_once, echo=True, logprobs=1)
    for answer in answers:
        _check_scores(answer, generated)
    return {"requests": len(prompts) / wall}


async def short_under_long(target: Target, size: Size, random: Random) -> Numbers:
    """A short request and a running stream while the server prefills long prompts."""
    read, written = size.watched
    watched = await target.begin(target.prompt(target.ids(random, read)), written)
    try:
        await _until_first_tokens(watched)
        began = perf_counter()
        longs = [target.prompt(target.ids(random, size.long)) for _ in range(size.longs)]
        tasks = [asyncio.create_task(target.complete(prompt, 1)) for prompt in longs]
        await asyncio.sleep(0.3)
        short = await target.complete(target.prompt(target.ids(random, size.short[0])), size.short[1], stream=True)
        for answer in await asyncio.gather(*tasks):
            target.check_prompt(answer, size.long)
        ended = perf_counter()
        return {"first token": short.times[0] - short.started, "longest gap": _longest_gap(watched, began, ended)}
    finally:
        watched.close()


async def front_end(target: Target, size: Size, random: Random) -> Numbers:
    """The cost of a request and of a streamed token without the model's."""
    prompts = [[target.ids(random, size.tiny[0])] for _ in range(size.tiny_requests)]
    request_seconds, _ = await _together(target, prompts, size.tiny[1], size.tiny_at_once)
    read, written = size.tiny_stream
    prompts = [[target.ids(random, read)] for _ in range(size.at_once)]
    stream_seconds, _ = await _together(target, prompts, written, size.at_once, stream=True)
    return {"requests": size.tiny_requests / request_seconds, "streamed": size.at_once * written / stream_seconds}


async def _together(
    target: Target, prompts: Sequence[Sequence[Ids]], max_tokens: int, at_once: int, **fields: object
) -> tuple[float, list[Answer]]:
    """Send the prompts, `at_once` at a time. Returns the wall time in seconds and the responses."""
    semaphore = asyncio.Semaphore(at_once)

    async def ask(parts: Sequence[Ids]) -> Answer:
        async with semaphore:
            answer = await target.complete(target.prompt(*parts), max_tokens, **fields)
        target.check_prompt(answer, sum(len(part) for part in parts))
        return answer

    started = perf_counter()
    answers = await asyncio.gather(*(ask(parts) for parts in prompts))
    return max(answer.ended for answer in answers) - started, answers


async def _chat(target: Target, size: Size, random: Random) -> None:
    said, written = size.turn
    history: list[Ids | str] = []
    for turn in range(size.turns):
        history.append(target.ids(random, said))
        answer = await target.complete(target.prompt(*history), written, **(target.dialect.ids or {}))
        if target.dialect.token_prompts:
            target.check_prompt(answer, (turn + 1) * said + turn * written)
        history.append(target.dialect.token_ids(answer) or str(answer.choices[0]["text"]))


async def _scores(target: Target, random: Random) -> int:
    """The smallest `max_tokens` with which the server scores a prompt. Raises `NotPossible` if it does not."""

    async def scored(max_tokens: int) -> None:
        answer = await target.complete(target.prompt(target.ids(random, 16)), max_tokens, echo=True, logprobs=1)
        _check_scores(answer, max_tokens)

    await scored(1)
    if not target.dialect.token_prompts:
        return 1  # llama-cpp-python takes 0 as unlimited and continues after a disconnect
    try:
        await scored(0)
    except NotPossible:
        return 1
    return 0


def _check_scores(answer: Answer, generated: int) -> None:
    found = (answer.choices[0].get("logprobs") or {}).get("token_logprobs") or []
    read = answer.usage["prompt_tokens"] if answer.usage else 0
    # The first token has no context and so no log probability. Some servers leave the generated one out.
    if not found or len(found) not in (read, read + generated) or any(number is None for number in found[1:]):
        raise NotPossible(f"gives {len(found)} log probabilities for {read} prompt tokens")


async def _until_first_tokens(stream: Exchange) -> None:
    """Wait for the first tokens of a stream."""
    while stream.received.count(b"data:") < 4:
        if stream.ended:
            stream.read()
            raise NotPossible("a stream ended before its measurement began")
        await asyncio.sleep(0.01)


def _longest_gap(stream: Exchange, began: float, ended: float) -> float:
    """The longest time without a token in a stream, between `began` and `ended`, in seconds."""
    times = [time for time in stream.read().times if began <= time <= ended]
    edges = [began, *times] if stream.ended else [began, *times, ended]
    return max((later - earlier for earlier, later in pairwise(edges)), default=0.0)


WALL = Measure("wall", "s")
FIRST = Measure("first token", "s")
SCENARIOS = (
    Scenario("one-stream", (Measure("decode", "tok/s", True), FIRST), one_stream, reads="decode"),
    Scenario("prefill", (Measure("prompt", "tok/s", True),), prefill),
    Scenario("crowd", (WALL, Measure("all tokens", "tok/s", True)), crowd),
    Scenario("common-prefix", (WALL,), common_prefix),
    Scenario("fan-out", (WALL,), fan_out),
    Scenario("chats", (WALL,), chats),
    Scenario("scoring", (Measure("requests", "1/s", True),), scoring),
    Scenario("short-under-long", (FIRST, Measure("longest gap", "s")), short_under_long),
    Scenario("front-end", (Measure("requests", "1/s", True), Measure("streamed", "tok/s", True)), front_end, tiny=True),
)
