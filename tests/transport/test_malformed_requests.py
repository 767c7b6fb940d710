"""The corpus against the real protocol and application, without a network. `tests/chaos` has it over sockets."""

from __future__ import annotations

import asyncio

import pytest
from in_memory_connection import InMemoryClient, InMemoryServer, application, get

from malformed_requests import CLOSED, Case, cases

CASES = cases()


@pytest.fixture(scope="module")
def hall() -> InMemoryServer:
    """One for all, so that what a case breaks shows in the next."""
    return InMemoryServer(application())


def test_the_corpus_is_large() -> None:
    assert len(CASES) >= 200


@pytest.mark.parametrize("size", [None, 100], ids=["whole", "in pieces"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_is_refused_or_closed_and_the_next_visitor_served(
    case: Case, size: int | None, in_memory_server: InMemoryServer
) -> None:
    async def scenario() -> tuple[InMemoryClient, InMemoryClient]:
        visitor = in_memory_server.visitor()
        await visitor.say(case.data, size if len(case.data) < 10_000 else None)
        if len(case.data) > 2**16 and not case.right & {CLOSED, 408}:
            while not visitor.statuses:  # a large body is parsed in another thread
                await asyncio.sleep(0.01)
        if not visitor.statuses:
            await visitor.wait(40)
        visitor.leave()
        await visitor.settle()
        following = in_memory_server.visitor()
        await following.say(get("/version"))
        following.leave()
        return visitor, following

    visitor, following = asyncio.run(asyncio.wait_for(scenario(), 30))
    assert (visitor.statuses or [CLOSED])[0] in case.right, bytes(visitor.wire.told)[:500]
    assert 200 not in visitor.statuses
    assert all(status < 500 or status == 505 for status in visitor.statuses)
    assert all(len(answer) < 2500 for answer in bytes(visitor.wire.told).split(b"HTTP/1.1 "))
    assert following.statuses == [200]
    assert in_memory_server.context.connection_limiter.open_connections == 0
    assert not in_memory_server.state.tasks
