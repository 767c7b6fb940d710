"""The life of a server: what it says of itself, and how it ends."""

from __future__ import annotations

import asyncio
import json
import resource
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from in_memory_connection import Engine, InMemoryServer, application, get, model_manager_of, post

import scripted_engine
from afterword.api.readiness import Readiness
from afterword.engine.parent.model_manager import ModelManager
from afterword.transport.connection_limiter import raise_file_limit
from afterword.transport.server import TransportServer
from afterword.transport.shutdown_signals import ShutdownSignals
from afterword.transport.transport_limits import TransportLimits

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]

# ---- what it says


def told(
    path: str, engine: Engine | ModelManager, body: bytes | None = None, keys: bool = True
) -> tuple[int, Any, bytes]:
    async def scenario() -> tuple[int, Any, bytes]:
        client = InMemoryServer(application(engine, keys)).connect()
        await client.send(get(path) if body is None else post(body, path=path))
        head, _, content = bytes(client.transport.written).partition(b"\r\n\r\n")
        return client.statuses[0], json.loads(content), head

    return asyncio.run(scenario())


@pytest.mark.parametrize(
    ("state", "shown", "health", "ready"),
    [
        ("starting", "starting", 200, 503),
        ("ready", "ready", 200, 200),
        ("restarting", "degraded", 200, 503),
        ("failing", "degraded", 503, 503),
        ("closed", "draining", 200, 503),
    ],
)
def test_health_and_ready_tell_the_truth(state: str, shown: str, health: int, ready: int) -> None:
    engine = Engine(scripted_engine.says("Hello"), state=state)
    assert told("/health", engine)[0] == health
    status, said, _ = told("/ready", engine)
    assert (status, said["status"]) == (ready, shown)
    assert (said["reason"] is None) is (shown == "ready")
    assert {"running", "waiting", "sequences", "restarts"} <= said.keys()


def test_a_server_that_is_to_end_says_so_at_once_and_answers_on() -> None:
    readiness, models = Readiness(), model_manager_of(Engine(scripted_engine.says("Hello")))
    assert readiness.state(models) == "ready"
    readiness.drain()
    assert readiness.state(models) == "draining"


@pytest.mark.parametrize(
    ("states", "shown", "health"),
    [
        (("ready", "ready"), "ready", 200),
        (("ready", "starting"), "starting", 200),
        (("ready", "restarting"), "ready", 200),
        (("failing", "ready"), "ready", 200),
        (("failing", "restarting"), "degraded", 200),
        (("failing", "failing"), "degraded", 503),
        (("closed", "ready"), "draining", 200),
    ],
)
def test_a_server_of_several_is_ready_while_one_can_answer(states: tuple[str, str], shown: str, health: int) -> None:
    models = model_manager_of(*(Engine(scripted_engine.says("Hello"), state=state) for state in states))
    assert Readiness().state(models) == shown
    assert told("/health", models)[0] == health
    status, said, _ = told("/ready", models, keys=False)
    assert (status == 200) is (shown == "ready")
    assert [model["status"] for model in said["models"]] == list(states)


@pytest.mark.parametrize("path", ["/health", "/ready"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_where_keys_are_asked_for_no_names_are_told_without_one(path: str, count: int) -> None:
    models = model_manager_of(*(Engine(scripted_engine.says("Hello")) for _ in range(count)))
    status, said, _ = told(path, models)
    assert (status, "scripted" in str(said)) == (200, False)
    assert said["status"] in ("ok", "ready")
    assert str(told(path, models, keys=False)[1]).count("scripted") == count


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize", "/detokenize"])
def test_nothing_is_asked_of_a_model_that_is_not_there_yet(path: str) -> None:
    status, said, head = told(path, Engine(scripted_engine.says("Hello"), state="starting"), b"{}")
    assert (status, said["error"]["code"]) == (503, "loading")
    assert b"retry-after: " in head


@pytest.mark.parametrize("path", ["/v1/models", "/tokenizer_info", "/openapi.json"])
def test_nothing_is_told_of_a_model_that_is_not_there_yet(path: str) -> None:
    assert told(path, Engine(scripted_engine.says("Hello"), state="starting"))[0] == 503


def test_those_who_are_sent_away_are_told_different_times() -> None:
    engine = Engine(scripted_engine.says("Hello"), room=0)
    times = {told("/v1/completions", engine, b'{"prompt":"a"}')[2].split(b"retry-after: ")[1][:2] for _ in range(60)}
    assert times == {b"1\r", b"2\r", b"3\r", b"4\r", b"5\r"}


# ---- how it ends


class Stage:
    """An application whose answers last until they are let go."""

    def __init__(self) -> None:
        self.begun = asyncio.Semaphore(0)
        self.curtain = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"begun ", "more_body": True})
        self.begun.release()
        await self.curtain.wait()
        await send({"type": "http.response.body", "body": b"ended"})


@asynccontextmanager
async def house(app: Any, **limits: Any) -> AsyncIterator[tuple[TransportServer, int]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        async with TransportServer(app, listener, TransportLimits(**limits)) as transport_server:
            yield transport_server, port


async def ask(port: int) -> Streams:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(get("/"))
    return reader, writer


async def rest(streams: Streams) -> bytes:
    try:
        return await streams[0].read()
    except ConnectionResetError:
        return b""
    finally:
        streams[1].close()


async def refuses(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionRefusedError:
        return True
    writer.close()
    return False


def play(scenario: Any) -> None:
    asyncio.run(asyncio.wait_for(scenario, 30))


def test_answers_finish_and_nobody_else_comes_in() -> None:
    async def scenario() -> None:
        stage = Stage()
        async with house(stage) as (transport_server, port):
            idle = await asyncio.open_connection("127.0.0.1", port)
            asking = [await ask(port) for _ in range(5)]
            for _ in asking:
                await stage.begun.acquire()
            leaving = asyncio.create_task(transport_server.drain(0, 1000, asyncio.Event()))
            while not await refuses(port):
                await asyncio.sleep(0)
            assert await rest(idle) == b""
            assert not leaving.done()
            stage.curtain.set()
            assert all(b"begun" in answer and b"ended" in answer for answer in [await rest(each) for each in asking])
            await leaving

    play(scenario())


def test_for_a_while_it_goes_on_as_if_nothing_were_but_keeps_no_connection() -> None:
    async def scenario() -> None:
        stage, hurry = Stage(), asyncio.Event()
        stage.curtain.set()
        async with house(stage) as (transport_server, port):
            leaving = asyncio.create_task(transport_server.drain(1000, 1000, hurry))
            await asyncio.sleep(0)
            answer = await rest(await ask(port))
            assert b"connection: close" in answer
            assert b"ended" in answer
            hurry.set()
            await leaving
            assert await refuses(port)

    play(scenario())


# ---- who ends its sending, and who leaves


class Reading:
    """An application that reads the request, sends the head of its answer if it is `begun`, and waits for its cue.

    `left`: it was told that its client has left.
    """

    def __init__(self, begun: bool) -> None:
        self.came, self.cue, self.left = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._begun = begun

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        start = {"type": "http.response.start", "status": 200, "headers": []}
        if self._begun:
            await send(start)
        self.came.set()
        gone, cue = asyncio.create_task(receive()), asyncio.create_task(self.cue.wait())
        await asyncio.wait((gone, cue), return_when=asyncio.FIRST_COMPLETED)
        if gone.done() and gone.result()["type"] == "http.disconnect":
            self.left.set()
        for task in (gone, cue):
            task.cancel()
        if not self._begun:
            await send(start)
        await send({"type": "http.response.body", "body": b"all of it"})


@pytest.mark.parametrize("begun", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("request_", [get("/"), post(b"{}"), get("/") * 2], ids=["GET", "POST", "sent ahead"])
def test_a_client_that_ends_its_sending_gets_its_answer(begun: bool, request_: bytes) -> None:
    async def scenario() -> None:
        app = Reading(begun)
        async with house(app) as (transport_server, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request_)
            await app.came.wait()
            writer.write_eof()
            await asyncio.sleep(0.3)  # time enough to be taken for one that has left
            for connection in transport_server._connections():
                connection.check(transport_server._context.clock())
            app.cue.set()
            told = await rest((reader, writer))
        assert not app.left.is_set()
        assert b"all of it" in told
        assert b"connection: close" in told or begun

    play(scenario())


@pytest.mark.parametrize("begun", [False, True], ids=["whole", "stream"])
def test_a_client_that_leaves_is_noticed_while_its_answer_is_made(begun: bool) -> None:
    async def scenario() -> None:
        app = Reading(begun)
        async with house(app) as (_, port):
            with socket.create_connection(("127.0.0.1", port)) as client:
                await asyncio.get_running_loop().run_in_executor(None, client.sendall, get("/"))
                await app.came.wait()
                if begun:
                    await asyncio.get_running_loop().run_in_executor(None, client.recv, 2**16)
            await app.left.wait()

    play(scenario())


@pytest.mark.parametrize(
    "sent",
    [b"", get("/")[:20], post(b"{}")[:-1], get("/").replace(b"HTTP/1.1", b"HTTP/1.0")],
    ids=["nothing", "half a head", "half a body", "HTTP/1.0"],
)
def test_a_client_that_ends_its_sending_without_a_whole_request_is_let_go(sent: bytes) -> None:
    async def scenario() -> None:
        async with house(Reading(False)) as (_, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(sent)
            writer.write_eof()
            assert await rest((reader, writer)) == b""

    play(scenario())


@pytest.mark.parametrize("hurries", [False, True], ids=["too late", "hurried"])
def test_what_does_not_end_in_time_is_left_to_the_engine(hurries: bool) -> None:
    async def scenario() -> None:
        stage, hurry = Stage(), asyncio.Event()
        async with house(stage) as (transport_server, port):
            asking = await ask(port)
            await stage.begun.acquire()
            leaving = asyncio.create_task(transport_server.drain(0, 1000 if hurries else 0, hurry))
            if hurries:
                hurry.set()
            await leaving
            stage.curtain.set()  # as the engine does when it is closed: every run ends, most with an error
        assert b"ended" in await rest(asking)

    play(scenario())


def test_a_door_that_closes_waits_for_nobody_who_says_nothing() -> None:
    async def scenario() -> None:
        async with house(Stage()) as (_, port):
            asking = await ask(port)
        assert b"ended" not in await rest(asking)

    play(scenario())


def test_the_first_signal_asks_and_the_second_insists() -> None:
    async def scenario() -> None:
        heard = []
        with ShutdownSignals(lambda: heard.append("first")) as signals:
            signal.raise_signal(signal.SIGINT)
            await signals.first.wait()
            assert (signals.interactive, signals.second.is_set(), heard) == (True, False, ["first"])
            signal.raise_signal(signal.SIGTERM)
            await signals.second.wait()
            assert heard == ["first"]

    play(scenario())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_hangup_asks_as_politely_as_sigterm(number: signal.Signals) -> None:
    async def scenario() -> None:
        with ShutdownSignals(lambda: None) as signals:
            signal.raise_signal(number)
            await signals.first.wait()
            assert (signals.interactive, signals.second.is_set()) == (False, False)
            signal.raise_signal(number)
            await signals.second.wait()

    before = signal.signal(number, signal.SIG_DFL)
    try:
        play(scenario())
    finally:
        signal.signal(number, before)


def test_a_hangup_that_is_ignored_stays_so() -> None:
    async def scenario() -> None:
        with ShutdownSignals(lambda: None) as signals:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGTERM)
            await signals.first.wait()
            await asyncio.sleep(0)
            assert not signals.second.is_set()

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup starts it
    try:
        play(scenario())
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_ends_what_was_to_be_waited_for() -> None:
    async def scenario() -> None:
        with ShutdownSignals(lambda: None) as signals:

            async def loads() -> None:
                signal.raise_signal(signal.SIGTERM)
                await asyncio.sleep(1000)

            assert not await signals.run_until_signal(loads())
            assert not signals.interactive

    async def others() -> None:
        with ShutdownSignals(lambda: None) as signals:
            assert await signals.run_until_signal(asyncio.sleep(0))
            with pytest.raises(ValueError, match="broken"):
                await signals.run_until_signal(breaks())

    async def breaks() -> None:
        raise ValueError("broken")

    play(scenario())
    play(others())


def test_places_leave_files_for_ourselves(monkeypatch: pytest.MonkeyPatch) -> None:
    current = {"limits": (100, 500)}
    monkeypatch.setattr("resource.getrlimit", lambda _: current["limits"])
    monkeypatch.setattr("resource.setrlimit", lambda _, limits: current.update(limits=limits))
    assert raise_file_limit(100) == 100
    assert current["limits"] == (328, 500), "each connection may have a file open beside its socket"
    assert raise_file_limit(10_000) == 186
    assert current["limits"] == (500, 500)
    current["limits"] = (64, 64)
    assert raise_file_limit(10_000) == 16, "where few are allowed, half of them are kept"
    current["limits"] = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    assert raise_file_limit(10_000) == 10_000
