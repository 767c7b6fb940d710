"""What is done for a request before its answer begins ends when the client leaves."""

from __future__ import annotations

import asyncio

import pytest
from starlette.requests import ClientDisconnect
from starlette.types import Message

from afterword.api.requests.disconnect import cancel_on_disconnect


class Client:
    """A client that stays until it is told to leave."""

    def __init__(self) -> None:
        self.left = asyncio.Event()

    async def receive(self) -> Message:
        await self.left.wait()
        return {"type": "http.disconnect"}


async def result(value: int) -> int:
    await asyncio.sleep(0)
    return value


async def fail() -> int:
    raise ValueError("a reason")


async def for_ever(cancelled: asyncio.Event) -> int:
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        cancelled.set()
        raise
    return 0


def test_work_whose_client_stays_has_its_result() -> None:
    assert asyncio.run(cancel_on_disconnect(Client().receive, result(5))) == 5
    with pytest.raises(ValueError, match="a reason"):
        asyncio.run(cancel_on_disconnect(Client().receive, fail()))


def test_work_ends_when_the_client_leaves() -> None:
    async def test() -> None:
        client, cancelled = Client(), asyncio.Event()
        waiting = asyncio.create_task(cancel_on_disconnect(client.receive, for_ever(cancelled)))
        await asyncio.sleep(0)
        client.left.set()
        with pytest.raises(ClientDisconnect):
            await waiting
        assert cancelled.is_set()

    asyncio.run(asyncio.wait_for(test(), 30))


def test_work_ends_with_the_request() -> None:
    async def test() -> None:
        cancelled = asyncio.Event()
        waiting = asyncio.create_task(cancel_on_disconnect(Client().receive, for_ever(cancelled)))
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert cancelled.is_set()

    asyncio.run(asyncio.wait_for(test(), 30))
