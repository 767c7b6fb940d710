"""Cancels the work for a request when its client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

T = TypeVar("T")


async def wait_for_disconnect(receive: Receive) -> None:
    """Return when the client has disconnected. The request's body must have been read to its end before."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def cancel_on_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. If the client disconnects first, cancel `work` and raise `ClientDisconnect`.

    `work` runs in the present task: one more for each request would cost more than waiting for the disconnect.
    """
    task = asyncio.current_task()
    assert task is not None
    disconnected = False

    def cancel(disconnect: asyncio.Task[None]) -> None:
        nonlocal disconnected
        if not disconnect.cancelled():
            disconnected = True
            task.cancel()

    disconnect = asyncio.ensure_future(wait_for_disconnect(receive))
    disconnect.add_done_callback(cancel)
    try:
        return await work
    except BaseException:
        if disconnected and task.cancelling() == 1:  # not also cancelled by others
            raise ClientDisconnect() from None
        raise
    finally:
        disconnect.remove_done_callback(cancel)
        disconnect.cancel()
        if disconnected:
            task.uncancel()
