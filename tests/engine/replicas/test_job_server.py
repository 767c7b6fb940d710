"""Tests of the server of an engine replica, with engines that do what the test says, over TCP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import msgspec
import pytest
from test_routed_engine import INFO, Recorder, job, replicas, run, until

from afterword.engine.messages import (
    HEADER,
    CancelTokenize,
    CloseJob,
    PassDone,
    PauseJob,
    ResumeJob,
    StartJob,
    TextTokens,
)
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


async def is_closed(reader: asyncio.StreamReader) -> bool:
    """Whether the replica ends the connection, before it would for a peer that says nothing."""
    try:
        async with asyncio.timeout(job_server.HELLO_SECONDS / 2):
            return await reader.read() == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def nested(start: bytes) -> bytes:
    """A frame with 2,000 arrays in arrays."""
    body = start + b"\x91" * 2000 + b"\xc0"
    return HEADER.pack(len(body)) + body


def test_a_hello_of_nested_arrays_is_refused_and_its_connection_closed():
    async def test() -> None:
        async with replicas() as found:
            await found.add("a", Recorder(INFO))
            reader, writer = await asyncio.open_connection("127.0.0.1", found.addresses["a"].port)
            writer.write(nested(b"\x94\xa5Hello\xa1s\xa5model"))
            assert await is_closed(reader)
            writer.close()

    run(test)


def test_a_frame_of_a_replica_with_nested_arrays_counts_as_the_end():
    async def test() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(nested(b"\x92\xa7Leaving"))
        assert await wire.read_from_replica(reader) is None

    run(test)


def test_connections_without_a_hello_are_limited_and_those_with_one_do_not_count(monkeypatch):
    monkeypatch.setattr(job_server, "MOST_STRANGERS", 2, raising=False)
    monkeypatch.setattr(job_server, "HELLO_SECONDS", 20.0)

    async def test() -> None:
        async with AsyncExitStack() as stack:
            found = await stack.enter_async_context(replicas())
            await found.add("a", Recorder(INFO))
            for _ in range(3):
                stack.callback((await connect(found.addresses["a"], "model")).close)
            open_ones = []
            for _ in range(3):
                open_ones.append(await asyncio.open_connection("127.0.0.1", found.addresses["a"].port))
                stack.callback(open_ones[-1][1].transport.abort)
            assert await is_closed(open_ones[2][0])
            open_ones[0][1].transport.abort()
            await until(lambda: found.servers["a"]._strangers == 1)
            stack.callback((await connect(found.addresses["a"], "model")).close)

    run(test)


def test_a_text_that_is_cancelled_before_it_begins_does_not_keep_the_replica_busy():
    async def test() -> None:
        engine = Recorder(INFO)
        async with served(engine) as (server, connection):
            connection._writer.write(wire.frame(wire.ReadText(1, "x", False, "")) + wire.frame(CancelTokenize(1)))
            connection.send(wire.ReadText(2, "x", False, ""))
            answer = await next_that(connection, lambda message: isinstance(message, TextTokens))
            assert isinstance(answer, TextTokens)
            assert (answer.call, engine.calls) == (2, ["tokenize for "]), "the first has not begun"
            await until(lambda: not any(each.busy for each in server._connections))

    run(test)


def replace_model(engine: Recorder) -> None:
    engine.model_info = msgspec.structs.replace(INFO, fingerprint="fp_other")


async def rest(connection: ReplicaConnection) -> list[wire.FromReplica]:
    """The messages up to the end of the connection, but those without steps."""
    found = []
    while (message := await connection.receive()) is not None:
        if has_steps(message) or not isinstance(message, PassDone):
            found.append(message)
    return found


@pytest.mark.parametrize("message", [StartJob(1, job()), wire.ReadText(1, "x", False, "")])
def test_another_model_takes_no_work_that_was_meant_for_the_first(monkeypatch, message):
    monkeypatch.setattr(job_server, "BEAT_SECONDS", 10**6)

    async def test() -> None:
        engine = Recorder(INFO)
        async with served(engine) as (_, connection):
            await next_that(connection, lambda message: isinstance(message, PassDone))  # the only heartbeat
            replace_model(engine)
            connection.send(message)
            assert await rest(connection) == []
            assert engine.prompts == []

    run(test)


def test_another_model_does_not_bring_steps_of_jobs_of_the_first(monkeypatch):
    monkeypatch.setattr(job_server, "BEAT_SECONDS", 10**6)

    async def test() -> None:
        engine = Together(INFO)
        async with served(engine) as (_, connection):
            connection.send(StartJob(1, job()))
            await until(lambda: bool(engine.prompts))
            replace_model(engine)
            engine.turn.set()
            assert await rest(connection) == []

    run(test)


@dataclass
class Faulty(Recorder):
    """Raises errors that no engine should raise. The first job fails at its start, others after a step."""

    def start(self, wanted: Job) -> Recorder:
        if not self.prompts:
            self.prompts.append(wanted.prompt)
            raise ValueError("start")
        return super().start(wanted)

    async def tokenize(self, text: str, special: bool, client: str = "") -> Sequence[int]:
        raise ValueError("text")

    async def __aiter__(self) -> AsyncIterator[Step]:
        yield TOKEN
        raise ValueError("step")


def test_an_unexpected_error_fails_one_job_or_text_and_is_logged(caplog):
    async def test() -> None:
        engine = Faulty(INFO)
        async with served(engine) as (server, connection):
            for message in (StartJob(1, job()), StartJob(2, job()), wire.ReadText(3, "x", False, "")):
                connection.send(message)
            found: dict[int, str] = {}
            while len(found) < 3:
                answer = await connection.receive()
                assert answer is not None, "the connection stays"
                if isinstance(answer, wire.JobFailed):
                    found[answer.job_id] = answer.failure.kind
                elif isinstance(answer, wire.TextFailed):
                    found[answer.call] = answer.failure.kind
            assert found == {1: "EngineFailure", 2: "EngineFailure", 3: "EngineFailure"}
            assert engine.calls == ["close"], "the job that had begun"
            await until(lambda: not any(each.busy for each in server._connections))

    run(test)
    assert {str(record.exc_info[1]) for record in caplog.records if record.exc_info} == {"start", "step", "text"}
