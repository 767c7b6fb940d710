"""`cancel_on_disconnect` cancels the work for a request when its client disconnects."""

from __future__ import annotations

import asyncio

import pytest
from starlette.requests import ClientDisconnect
from starlette.types import Message

from afterword.api.requests.disconnect import cancel_on_disconnect


class Client:
    """A client that stays connected until the test sets `disconnected`."""

    def __init__(self) -> None:
        self.disconnected = asyncio.Event()

    async def receive(self) -> Message:
        await self.disconnected.wait()
        return {"type": "http.disconnect"}


async def result(value: int) -> int:
    await asyncio.sleep(0)
    return value


async def fail() -> int:
    raise ValueError("a reason")


async def never_ending(cancelled: asyncio.Event) -> int:
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        cancelled.set()
        raise
    return 0


def test_work_returns_its_result_while_the_client_stays() -> None:
    assert asyncio.run(cancel_on_disconnect(Client().receive, result(5))) == 5
    with pytest.raises(ValueError, match="a reason"):
        asyncio.run(cancel_on_disconnect(Client().receive, fail()))


def test_work_is_cancelled_when_the_client_disconnects() -> None:
    async def test() -> None:
        client, cancelled = Client(), asyncio.Event()
        waiting = asyncio.create_task(cancel_on_disconnect(client.receive, never_ending(cancelled)))
        await asyncio.sleep(0)
        client.disconnected.set()
        with pytest.raises(ClientDisconnect):
            await waiting
        assert cancelled.is_set()

    asyncio.run(asyncio.wait_for(test(), 30))


def test_work_is_cancelled_with_its_request() -> None:
    async def test() -> None:
        cancelled = asyncio.Event()
        waiting = asyncio.create_task(cancel_on_disconnect(Client().receive, never_ending(cancelled)))
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert cancelled.is_set()

    asyncio.run(asyncio.wait_for(test(), 30))
