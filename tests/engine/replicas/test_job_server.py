"""Tests of the server of an engine replica, with engines that do what the test says, over TCP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from test_routed_engine import INFO, Recorder, job, replicas, run, until

from afterword.engine.messages import CloseJob, PassDone, PauseJob, ResumeJob, StartJob, TextTokens
from afterword.engine.protocol import Job, Step, Token
from afterword.engine.replicas import job_server, wire
from afterword.engine.replicas.connection import ReplicaConnection, connect
from afterword.engine.replicas.job_server import JobServer

LARGE = Step(sampled=((0, Token(1)),), error="x" * 2**18)
TOKEN = Step(sampled=((0, Token(1)),))


@asynccontextmanager
async def served(engine: Recorder) -> AsyncIterator[tuple[JobServer, ReplicaConnection]]:
    """A replica with the engine, and a connection to it."""
    async with replicas() as found:
        await found.add("a", engine)
        connection = await connect(found.addresses["a"], "model")
        try:
            yield found.servers["a"], connection
        finally:
            connection.close()


async def next_that(connection: ReplicaConnection, wanted: Callable[[wire.FromReplica], object]) -> wire.FromReplica:
    while (message := await connection.receive()) is not None:
        if wanted(message):
            return message
    raise AssertionError("The connection has ended.")


def has_steps(message: wire.FromReplica) -> bool:
    return isinstance(message, PassDone) and bool(message.steps)


@dataclass
class Flood(Recorder):
    """Jobs bring large steps while they are not paused. `brought`: their number."""

    going: asyncio.Event = field(default_factory=asyncio.Event)
    brought: int = 0

    def start(self, wanted: Job) -> Flood:
        self.going.set()
        return self

    async def __aiter__(self) -> AsyncIterator[Step]:
        while True:
            await self.going.wait()
            self.brought += 1
            yield LARGE
            await asyncio.sleep(0)

    def pause(self) -> None:
        super().pause()
        self.going.clear()

    def resume(self) -> None:
        super().resume()
        self.going.set()


def test_a_job_is_paused_while_the_network_is_behind():
    async def test() -> None:
        engine = Flood(INFO)
        async with served(engine) as (_, connection):
            connection.send(StartJob(1, job()))
            await until(lambda: engine.calls == ["pause"])
            await next_that(connection, lambda _: engine.calls[:2] == ["pause", "resume"])

    run(test)


def test_a_job_that_the_server_has_paused_stays_paused_when_the_network_is_free():
    async def test() -> None:
        engine = Flood(INFO)
        async with served(engine) as (_, connection):
            connection.send(StartJob(1, job()))
            await until(lambda: engine.calls == ["pause"])
            connection.send(PauseJob(1))
            await until(lambda: engine.calls == ["pause"] * 2)
            for _ in range(engine.brought):
                await next_that(connection, has_steps)
            connection.send(wire.ReadText(1, "x", False, ""))
            await next_that(connection, lambda message: isinstance(message, TextTokens))
            connection.send(ResumeJob(1))
            await until(lambda: "resume" in engine.calls)
            assert engine.calls[:4] == ["pause", "pause", "tokenize for ", "resume"]
            connection.send(CloseJob(1))

    run(test)


@dataclass
class Together(Recorder):
    """All jobs bring a token in the same turn of the event loop."""

    turn: asyncio.Event = field(default_factory=asyncio.Event)

    async def __aiter__(self) -> AsyncIterator[Step]:
        await self.turn.wait()
        yield TOKEN
        await asyncio.Event().wait()


@pytest.mark.parametrize(("most", "frames"), [(10**6, [3]), (2 * TOKEN.size, [2, 1])])
def test_the_steps_of_one_turn_are_one_frame_of_a_bounded_size(monkeypatch, most, frames):
    monkeypatch.setattr(job_server, "HELD_BYTES", most, raising=False)

    async def test() -> None:
        engine = Together(INFO)
        async with served(engine) as (_, connection):
            for job_id in range(3):
                connection.send(StartJob(job_id, job()))
            await until(lambda: len(engine.prompts) == 3)
            engine.turn.set()
            found = []
            while sum(found) < 3:
                message = await next_that(connection, has_steps)
                assert isinstance(message, PassDone)
                found.append(len(message.steps))
            assert found == frames

    run(test)
