"""The same request gets the same bytes from a busy server and, alone, from another server without a shared cache."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import httpx
import pytest

OPENINGS = (
    "Once upon a time there was a fox who could not sleep, because the wind sang under the roof of his house.",
    "def total(prices, discount):\n    result = 0\n    for price in prices:\n        result += price\n",
    "",
)
Body = dict[str, Any]


def bodies(count: int, seed: int) -> list[Body]:
    """Greedy or seeded requests with common prefixes and varying values of all fields that could change a number."""
    rng = random.Random(seed)
    return [
        {
            "prompt": rng.choice(OPENINGS) + rng.choice(["", " And", f" {index} times", "\n    return"]) or "A",
            "max_tokens": rng.randrange(1, 30),
            "temperature": rng.choice([0, 0.7, 1]),
            "top_p": rng.choice([1, 0.9]),
            "presence_penalty": rng.choice([0, 0.4]),
            "seed": index,
            "n": rng.choice([1, 1, 1, 3]),
            "logprobs": rng.choice([None, 0, 3]),
            "echo": rng.random() < 0.3,
            "stop": rng.choice([None, ".", "\n"]),
        }
        for index in range(count)
    ]


def choices_of(answer: httpx.Response) -> list[Any]:
    assert answer.status_code == 200, answer.text
    found: list[Any] = answer.json()["choices"]
    return found


async def send_concurrently(server: Any, bodies_to_send: list[Body]) -> list[list[Any]]:
    """The choices for all bodies, sent at once. For some, a second client sends the same body and disconnects early."""
    rng = random.Random(1)
    limits = httpx.Limits(max_connections=40)
    headers = {"Authorization": f"Bearer {server.key}"}
    async with httpx.AsyncClient(
        base_url=server.url, headers=headers, timeout=600, limits=limits, trust_env=False
    ) as http:

        async def ask(body: Body) -> list[Any]:
            await asyncio.sleep(rng.random() * len(bodies_to_send) / 100)
            return choices_of(await http.post("/v1/completions", json=body))

        async def disconnect(body: Body) -> None:
            await asyncio.sleep(rng.random() * len(bodies_to_send) / 100)
            async with http.stream(
                "POST", "/v1/completions", json=body | {"stream": True, "max_tokens": 300}
            ) as answer:
                await anext(answer.aiter_bytes())

        disconnecting = [asyncio.create_task(disconnect(body)) for body in bodies_to_send if rng.random() < 0.2]
        results = await asyncio.gather(*(ask(body) for body in bodies_to_send))
        await asyncio.gather(*disconnecting)
        return results


def compare(serve: Any, count: int, *model: str) -> None:
    bodies_to_send = bodies(count, seed=count)
    with serve(*model, "--parallel", "12") as busy:
        concurrent = asyncio.run(send_concurrently(busy, bodies_to_send))
    with serve(*model, "--parallel", "1") as calm, calm.http() as http:
        for index, (body, found) in enumerate(zip(bodies_to_send, concurrent, strict=True)):
            alone = choices_of(http.post("/v1/completions", json=body | {"cache_salt": str(index)}))
            assert alone == found, body


def test_forty_concurrent_requests_equal_sequential_ones(serve: Any) -> None:
    compare(serve, 40)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_thousand_concurrent_requests_equal_sequential_ones(serve: Any) -> None:
    compare(serve, 2000)


@pytest.mark.parametrize(
    "variant",
    [
        "streamed",
        "repeated in one list",
        *(pytest.param(variant, marks=pytest.mark.slow) for variant in ("one list", "a generated token too")),
    ],
)
def test_many_scored_prompts_have_the_same_response_with_and_without_cache(http: httpx.Client, variant: str) -> None:
    """Scores from the cache arrive all at once: here more than the buffer for one client once held."""
    salt = {"cache_salt": variant}
    prompt = [(7 * i) % 4000 + 1 for i in range(400)]
    prompts = [prompt] * 16 if variant == "repeated in one list" else [[*prompt, index] for index in range(10, 26)]
    fields = {"prompt": prompts, "echo": True, "logprobs": 20, "max_tokens": int(variant == "a generated token too")}
    answers = [http.post("/v1/completions", json=fields | salt | {"seed": 1}) for _ in range(2)]
    assert choices_of(answers[0]) == choices_of(answers[1])
    if variant == "streamed":
        answer = http.post("/v1/completions", json=fields | salt | {"stream": True})
        events = [line for line in answer.text.split("\n\n") if line]
        assert events[-1] == "data: [DONE]"
        assert len(events) == 16 + 1
