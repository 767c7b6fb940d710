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


def test_an_error_of_work_that_is_cancelled_is_not_that_of_the_request() -> None:
    async def fail_in_the_end() -> int:
        try:
            await asyncio.Event().wait()
        finally:
            await fail()
        return 0

    async def test() -> None:
        client = Client()
        waiting = asyncio.create_task(cancel_on_disconnect(client.receive, fail_in_the_end()))
        await asyncio.sleep(0)
        client.disconnected.set()
        with pytest.raises(ClientDisconnect):
            await waiting
        assert not waiting.cancelling()

    asyncio.run(asyncio.wait_for(test(), 30))


def test_nothing_is_cancelled_by_a_disconnect_after_the_work() -> None:
    async def test() -> None:
        client = Client()
        assert await cancel_on_disconnect(client.receive, result(5)) == 5
        client.disconnected.set()
        await asyncio.sleep(0.01)
        assert len(asyncio.all_tasks()) == 1, "no task waits for the disconnect any more"

    asyncio.run(test())


def test_a_request_that_is_cancelled_while_its_client_disconnects_is_cancelled() -> None:
    async def test() -> None:
        client, cancelled = Client(), asyncio.Event()
        waiting = asyncio.create_task(cancel_on_disconnect(client.receive, never_ending(cancelled)))
        await asyncio.sleep(0)
        client.disconnected.set()
        for _ in range(2):  # the disconnect has been noticed, and the work not yet cancelled
            await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(test())


def test_work_is_cancelled_with_its_request() -> None:
    async def test() -> None:
        cancelled = asyncio.Event()
        waiting = asyncio.create_task(cancel_on_disconnect(Client().receive, never_ending(cancelled)))
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert cancelled.is_set()

    asyncio.run(asyncio.wait_for(test(), 30))
