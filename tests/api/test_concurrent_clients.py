"""Many clients at once: none changes another's text, none holds what it has left, none hangs when the engine dies."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import psutil
import pytest
from completion_requests import is_idle, one, wait_until

CLIENTS = 32
LONG, LONGER = 150, 300  # tokens; the longer one is for what must be seen while it lasts, on a busy machine too
PROMPTS = [f"One day, {name} went to the {place}" for name in ("Tom", "a cat", "Lily", "the king") for place in
           ("park", "sea", "shop", "old house", "moon", "zoo", "farm", "big tree")]  # fmt: skip


@pytest.fixture(scope="module")
def crowded_server(serve: Any) -> Iterator[Any]:
    """A server with a sequence for each client."""
    with serve("--parallel", str(CLIENTS), "--context", "512") as server:
        yield server


@pytest.fixture(scope="module")
def crowded_client(crowded_server: Any) -> Iterator[httpx.Client]:
    with crowded_server.http() as client:
        yield client


@asynccontextmanager
async def visitor(server: Any) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"Authorization": f"Bearer {server.key}"}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=server.url, headers=headers, timeout=100, limits=limits, trust_env=False
    ) as client:
        yield client


async def events(visitor: httpx.AsyncClient, **body: Any) -> AsyncIterator[Any]:
    """What a stream brings: chunks, then "[DONE]" if it is whole; the status alone if it never began."""
    async with visitor.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        if response.status_code != 200:
            yield response.status_code
            return
        async for line in response.aiter_lines():
            if line:
                data = line.removeprefix("data: ")
                yield data if data == "[DONE]" else json.loads(data)


def text_of(chunks: list[Any]) -> str:
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)


def engine_of(hall: Any) -> psutil.Process:
    (engine,) = psutil.Process(hall.pid).children()
    return engine


def long(prompt: str, endless: dict[str, int]) -> dict[str, Any]:
    return {"prompt": prompt, "temperature": 0, "max_tokens": LONG, "logit_bias": endless}


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"seed": 11}], ids=["greedy", "seeded"])
def test_a_crowd_gets_the_texts_that_each_gets_alone(
    crowded_server: Any, crowded_client: httpx.Client, sampling: Any
) -> None:
    bodies = [{"prompt": prompt, "max_tokens": 24, **sampling} for prompt in PROMPTS]
    alone = [one(crowded_client, **body)["text"] for body in bodies]

    async def read(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
        *chunks, done = [event async for event in events(client, **body)]
        assert done == "[DONE]"
        return text_of(chunks)

    async def all_at_once() -> list[str]:
        async with visitor(crowded_server) as client:
            return await asyncio.gather(*(read(client, body) for body in bodies))

    assert asyncio.run(all_at_once()) == alone


def test_those_who_leave_free_their_sequences_and_the_others_finish(
    crowded_server: Any, crowded_client: httpx.Client, endless: dict[str, int]
) -> None:
    started = asyncio.Barrier(CLIENTS)
    finished: list[int] = []

    async def read(client: httpx.AsyncClient, index: int) -> None:
        stays = index % 2 == 0
        stream = events(client, **long(PROMPTS[index], endless) | {"max_tokens": LONGER})
        await anext(stream)
        await started.wait()
        if stays:
            async for event in stream:
                last = event
            assert last == "[DONE]"
            finished.append(index)
        await stream.aclose()

    async def watch(client: httpx.AsyncClient) -> bool:
        """Whether half of them were seen to run while nobody had finished."""
        while not finished:
            load = (await client.get("/ready")).json()
            if load["running"] == CLIENTS // 2 and load["waiting"] == 0 and not finished:
                return True
            await asyncio.sleep(0.005)
        return False

    async def all_at_once() -> bool:
        async with visitor(crowded_server) as client:
            seen, *_ = await asyncio.gather(watch(client), *(read(client, index) for index in range(CLIENTS)))
            return seen

    assert asyncio.run(all_at_once())
    assert len(finished) == CLIENTS // 2
    wait_until(lambda: is_idle(crowded_client))


def test_a_killed_engine_is_a_pause_and_no_more(crowded_server: Any, crowded_client: httpx.Client) -> None:
    bodies = [{"prompt": prompt, "max_tokens": LONG, "ignore_eos": True, "seed": 5} for prompt in PROMPTS[:8]]
    alone = [one(crowded_client, **body)["text"] for body in bodies]
    restarts = crowded_client.get("/ready").json()["restarts"]
    engine = engine_of(crowded_server)
    started = asyncio.Barrier(8)

    async def read(client: httpx.AsyncClient, body: dict[str, Any]) -> list[Any]:
        stream = events(client, **body)
        chunks = [await anext(stream)]
        if await started.wait() == 0:
            engine.kill()
        return chunks + [chunk async for chunk in stream]

    async def all_at_once() -> list[list[Any]]:
        async with visitor(crowded_server) as client:
            return await asyncio.gather(*(read(client, body) for body in bodies))

    for chunks, text in zip(asyncio.run(all_at_once()), alone, strict=True):
        assert chunks.pop() == "[DONE]"
        assert text_of(chunks) == text
    assert crowded_client.get("/ready").json()["restarts"] == restarts + 1
    wait_until(lambda: is_idle(crowded_client))
    assert crowded_client.get("/health").status_code == 200


def test_what_was_waiting_survives_the_engine(
    crowded_server: Any, crowded_client: httpx.Client, endless: dict[str, int]
) -> None:
    waiting = 8

    async def ask(client: httpx.AsyncClient, index: int) -> int:
        response = await client.post("/v1/completions", json=long(PROMPTS[index % CLIENTS], endless))
        return response.status_code

    async def kill(client: httpx.AsyncClient) -> None:
        while not (await client.get("/ready")).json()["waiting"]:
            await asyncio.sleep(0.005)
        engine_of(crowded_server).kill()

    async def all_at_once() -> list[int]:
        async with visitor(crowded_server) as client:
            _, *statuses = await asyncio.gather(kill(client), *(ask(client, i) for i in range(CLIENTS + waiting)))
            return statuses

    assert set(asyncio.run(all_at_once())) == {200}
    wait_until(lambda: is_idle(crowded_client))


@pytest.mark.parametrize("deaths", [1, 2])
def test_nobody_hangs_while_the_engine_restarts(crowded_server: Any, crowded_client: httpx.Client, deaths: int) -> None:
    async def ask(client: httpx.AsyncClient, prompt: Any) -> int:
        response = await client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 4}, timeout=30)
        return response.status_code

    async def all_at_once() -> set[int]:
        async with visitor(crowded_server) as client:
            asking = []
            for _ in range(deaths):
                while not (engines := psutil.Process(crowded_server.pid).children()):
                    await asyncio.sleep(0.005)
                asking += [asyncio.create_task(ask(client, prompt)) for prompt in ("a", [1, 2])]
                await asyncio.sleep(0.05)
                engines[0].kill()
                engines[0].wait()
                asking += [asyncio.create_task(ask(client, prompt)) for prompt in ("a", [1, 2])]
            return set(await asyncio.gather(*asking))

    assert asyncio.run(all_at_once()) <= {200, 500, 503}
    wait_until(lambda: is_idle(crowded_client))
    assert one(crowded_client, prompt="a", max_tokens=1)["index"] == 0
