"""Uploads: a file may take longer than other bodies, but must keep the same rate."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from in_memory_connection import InMemoryClient, InMemoryServer, post

from afterword.api.app import PROTECTED_ROUTES
from afterword.transport.transport_limits import UPLOAD_PATHS, TransportLimits

LARGE = 10**6
REQUEST = post(b'{"prompt": "a"}')


async def read_body(_: Any, receive: Any, send: Any) -> None:
    """An application that reads the whole body."""
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        more = message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


def send_upload(path: str, piece: int, seconds: int, limits: TransportLimits | None = None) -> InMemoryClient:
    """Send `piece` bytes of a body per second, for `seconds` seconds."""

    async def scenario() -> InMemoryClient:
        client = InMemoryServer(app=read_body, limits=limits or TransportLimits()).connect()
        await client.send(post(b"x" * LARGE, path=path)[:-LARGE])
        for _ in range(seconds):
            if client.transport.ended or client.closed:
                break
            await client.send(b"x" * piece)
            await client.wait(1.0)
        return client

    return asyncio.run(scenario())


def test_an_upload_may_take_longer_than_other_bodies() -> None:
    assert send_upload("/v1/files", 5000, 200).statuses == [200]
    assert send_upload("/v1/files?x=1", 5000, 200).statuses == [200]
    for path in ("/v1/completions", "/v1/files/file-1", "/v1/filesystem"):
        slow = send_upload(path, 5000, 200)
        assert (slow.statuses, slow.server.now) == ([408], pytest.approx(1031))


def test_an_upload_must_keep_the_rate_and_the_time_limit() -> None:
    slow = send_upload("/v1/files", 500, 200)
    assert (slow.statuses, slow.server.now) == ([408], pytest.approx(1010, abs=3))
    slow = send_upload("/v1/files", 5000, 200, TransportLimits(upload_seconds=60))
    assert (slow.statuses, slow.server.now) == ([408], pytest.approx(1061))


@pytest.mark.parametrize("cut", [0, 1, 30, len(REQUEST)])
def test_the_rest_of_a_rejected_body_and_the_next_request_may_arrive_together(cut: int) -> None:
    async def scenario() -> InMemoryClient:
        client = InMemoryServer().connect()
        wrong = post(b" " * LARGE, key="no-key-of-this-server")
        await client.send(wrong[:5000])
        assert client.statuses == [401]
        await client.send(wrong[5000:] + REQUEST[:cut])
        await client.send(REQUEST[cut:])
        return client

    assert asyncio.run(scenario()).statuses == [401, 200]


def test_every_upload_path_has_a_post_route() -> None:
    posted = {route.path for route in PROTECTED_ROUTES if "POST" in (route.methods or ())}
    assert {path.decode() for path in UPLOAD_PATHS} <= posted
