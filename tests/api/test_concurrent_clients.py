"""Concurrent clients: same texts as alone, freed sequences after a disconnect, and killed workers."""

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
LONG, LONGER = 150, 300  # tokens; the longer one is for states that a test must observe, even on a slow machine
PROMPTS = [f"One day, {name} went to the {place}" for name in ("Tom", "a cat", "Lily", "the king") for place in
           ("park", "sea", "shop", "old house", "moon", "zoo", "farm", "big tree")]  # fmt: skip


@pytest.fixture(scope="module")
def shared_server(serve: Any) -> Iterator[Any]:
    """A server with one sequence for each client."""
    with serve("--parallel", str(CLIENTS), "--context", "512") as server:
        yield server


@pytest.fixture(scope="module")
def shared_client(shared_server: Any) -> Iterator[httpx.Client]:
    with shared_server.http() as client:
        yield client


@asynccontextmanager
async def async_client(server: Any) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"Authorization": f"Bearer {server.key}"}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=server.url, headers=headers, timeout=100, limits=limits, trust_env=False
    ) as client:
        yield client


async def events(client: httpx.AsyncClient, **body: Any) -> AsyncIterator[Any]:
    """The chunks of a stream and "[DONE]" if it is complete; or only the HTTP status if it did not start."""
    async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        if response.status_code != 200:
            yield response.status_code
            return
        async for line in response.aiter_lines():
            if line:
                data = line.removeprefix("data: ")
                yield data if data == "[DONE]" else json.loads(data)


def text_of(chunks: list[Any]) -> str:
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)


def worker_of(server: Any) -> psutil.Process:
    (worker,) = psutil.Process(server.pid).children()
    return worker


def long(prompt: str, endless: dict[str, int]) -> dict[str, Any]:
    return {"prompt": prompt, "temperature": 0, "max_tokens": LONG, "logit_bias": endless}


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"seed": 11}], ids=["greedy", "seeded"])
def test_concurrent_clients_get_the_texts_of_single_requests(
    shared_server: Any, shared_client: httpx.Client, sampling: Any
) -> None:
    bodies = [{"prompt": prompt, "max_tokens": 24, **sampling} for prompt in PROMPTS]
    alone = [one(shared_client, **body)["text"] for body in bodies]

    async def read(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
        *chunks, done = [event async for event in events(client, **body)]
        assert done == "[DONE]"
        return text_of(chunks)

    async def all_at_once() -> list[str]:
        async with async_client(shared_server) as client:
            return await asyncio.gather(*(read(client, body) for body in bodies))

    assert asyncio.run(all_at_once()) == alone


def test_disconnects_free_sequences_and_other_clients_finish(
    shared_server: Any, shared_client: httpx.Client, endless: dict[str, int]
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
        """Whether `/ready` reported half of the sequences running before any client had finished."""
        while not finished:
            load = (await client.get("/ready")).json()
            if load["running"] == CLIENTS // 2 and load["waiting"] == 0 and not finished:
                return True
            await asyncio.sleep(0.005)
        return False

    async def all_at_once() -> bool:
        async with async_client(shared_server) as client:
            observed, *_ = await asyncio.gather(watch(client), *(read(client, index) for index in range(CLIENTS)))
            return observed

    assert asyncio.run(all_at_once())
    assert len(finished) == CLIENTS // 2
    wait_until(lambda: is_idle(shared_client))


def test_streams_continue_after_the_worker_is_killed(shared_server: Any, shared_client: httpx.Client) -> None:
    bodies = [{"prompt": prompt, "max_tokens": LONG, "ignore_eos": True, "seed": 5} for prompt in PROMPTS[:8]]
    alone = [one(shared_client, **body)["text"] for body in bodies]
    restarts = shared_client.get("/ready").json()["restarts"]
    worker = worker_of(shared_server)
    started = asyncio.Barrier(8)

    async def read(client: httpx.AsyncClient, body: dict[str, Any]) -> list[Any]:
        stream = events(client, **body)
        chunks = [await anext(stream)]
        if await started.wait() == 0:
            worker.kill()
        return chunks + [chunk async for chunk in stream]

    async def all_at_once() -> list[list[Any]]:
        async with async_client(shared_server) as client:
            return await asyncio.gather(*(read(client, body) for body in bodies))

    for chunks, text in zip(asyncio.run(all_at_once()), alone, strict=True):
        assert chunks.pop() == "[DONE]"
        assert text_of(chunks) == text
    assert shared_client.get("/ready").json()["restarts"] == restarts + 1
    wait_until(lambda: is_idle(shared_client))
    assert shared_client.get("/health").status_code == 200


def test_waiting_requests_survive_a_killed_worker(
    shared_server: Any, shared_client: httpx.Client, endless: dict[str, int]
) -> None:
    waiting = 8

    async def post(client: httpx.AsyncClient, index: int) -> int:
        response = await client.post("/v1/completions", json=long(PROMPTS[index % CLIENTS], endless))
        return response.status_code

    async def kill(client: httpx.AsyncClient) -> None:
        while not (await client.get("/ready")).json()["waiting"]:
            await asyncio.sleep(0.005)
        worker_of(shared_server).kill()

    async def all_at_once() -> list[int]:
        async with async_client(shared_server) as client:
            _, *statuses = await asyncio.gather(kill(client), *(post(client, i) for i in range(CLIENTS + waiting)))
            return statuses

    assert set(asyncio.run(all_at_once())) == {200}
    wait_until(lambda: is_idle(shared_client))


@pytest.mark.parametrize("deaths", [1, 2])
def test_requests_end_while_the_worker_restarts(shared_server: Any, shared_client: httpx.Client, deaths: int) -> None:
    async def post(client: httpx.AsyncClient, prompt: Any) -> int:
        response = await client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 4}, timeout=30)
        return response.status_code

    async def all_at_once() -> set[int]:
        async with async_client(shared_server) as client:
            requests = []
            for _ in range(deaths):
                while not (workers := psutil.Process(shared_server.pid).children()):
                    await asyncio.sleep(0.005)
                requests += [asyncio.create_task(post(client, prompt)) for prompt in ("a", [1, 2])]
                await asyncio.sleep(0.05)
                workers[0].kill()
                workers[0].wait()
                requests += [asyncio.create_task(post(client, prompt)) for prompt in ("a", [1, 2])]
            return set(await asyncio.gather(*requests))

    assert asyncio.run(all_at_once()) <= {200, 500, 503}
    wait_until(lambda: is_idle(shared_client))
    assert one(shared_client, prompt="a", max_tokens=1)["index"] == 0
