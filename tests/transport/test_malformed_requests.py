"""Malformed requests, sent to the real protocol and application without a network.

`tests/chaos` sends the same requests over sockets.
"""

from __future__ import annotations

import asyncio

import pytest
from in_memory_connection import InMemoryClient, InMemoryServer, application, get

from malformed_requests import CLOSED, Case, cases

CASES = cases()


@pytest.fixture(scope="module")
def server() -> InMemoryServer:
    """One server for all cases, so that damage from one case shows in the next."""
    return InMemoryServer(application())


def test_the_corpus_has_at_least_200_cases() -> None:
    assert len(CASES) >= 200


@pytest.mark.parametrize("size", [None, 100], ids=["whole", "in pieces"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_case_is_refused_and_the_next_client_is_served(
    case: Case, size: int | None, server: InMemoryServer
) -> None:
    async def scenario() -> tuple[InMemoryClient, InMemoryClient]:
        client = server.connect()
        await client.send(case.data, size if len(case.data) < 10_000 else None)
        if len(case.data) > 2**16 and not case.right & {CLOSED, 408}:
            while not client.statuses:  # a large body is parsed in another thread
                await asyncio.sleep(0.01)
        if not client.statuses:
            await client.wait(40)
        client.disconnect()
        await client.settle()
        following = server.connect()
        await following.send(get("/version"))
        following.disconnect()
        return client, following

    client, following = asyncio.run(asyncio.wait_for(scenario(), 30))
    assert (client.statuses or [CLOSED])[0] in case.right, bytes(client.transport.written)[:500]
    assert 200 not in client.statuses
    assert all(status < 500 or status == 505 for status in client.statuses)
    assert all(len(answer) < 2500 for answer in bytes(client.transport.written).split(b"HTTP/1.1 "))
    assert following.statuses == [200]
    assert server.context.connection_limiter.open_connections == 0
    assert not server.state.tasks
