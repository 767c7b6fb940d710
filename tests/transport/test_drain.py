"""`/health`, `/ready` and the shutdown of a server."""

from __future__ import annotations

import asyncio
import json
import resource
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
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

# ---- health and readiness


def get_json(
    path: str, engine: Engine | ModelManager, body: bytes | None = None, keys: bool = True, **settings: Any
) -> tuple[int, Any, bytes]:
    async def scenario() -> tuple[int, Any, bytes]:
        client = InMemoryServer(application(engine, keys, **settings)).connect()
        await client.send(get(path) if body is None else post(body, path=path))
        head, _, content = bytes(client.transport.written).partition(b"\r\n\r\n")
        return client.statuses[0], json.loads(content), head

    return asyncio.run(scenario())


@pytest.mark.parametrize(
    ("state", "expected", "health", "ready"),
    [
        ("starting", "starting", 200, 503),
        ("ready", "ready", 200, 200),
        ("restarting", "degraded", 200, 503),
        ("failing", "degraded", 503, 503),
        ("closed", "draining", 200, 503),
    ],
)
def test_health_and_ready_tell_the_truth(state: str, expected: str, health: int, ready: int) -> None:
    engine = Engine(scripted_engine.text_script("Hello"), state=state)
    assert get_json("/health", engine)[0] == health
    status, body, _ = get_json("/ready", engine)
    assert (status, body["status"]) == (ready, expected)
    assert (body["reason"] is None) is (expected == "ready")
    assert {"running", "waiting", "sequences", "restarts"} <= body.keys()


def test_readiness_is_draining_at_once() -> None:
    readiness, models = Readiness(), model_manager_of(Engine(scripted_engine.text_script("Hello")))
    assert readiness.state(models) == "ready"
    readiness.drain()
    assert readiness.state(models) == "draining"


@pytest.mark.parametrize(
    ("states", "expected", "health"),
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
def test_a_server_of_several_models_is_ready_while_one_is(states: tuple[str, str], expected: str, health: int) -> None:
    models = model_manager_of(*(Engine(scripted_engine.text_script("Hello"), state=state) for state in states))
    assert Readiness().state(models) == expected
    assert get_json("/health", models)[0] == health
    status, body, _ = get_json("/ready", models, keys=False)
    assert (status == 200) is (expected == "ready")
    assert [model["status"] for model in body["models"]] == list(states)


@pytest.mark.parametrize("path", ["/health", "/ready"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_health_and_ready_name_no_models_where_keys_are_required(path: str, count: int) -> None:
    models = model_manager_of(*(Engine(scripted_engine.text_script("Hello")) for _ in range(count)))
    status, body, _ = get_json(path, models)
    assert (status, "scripted" in str(body)) == (200, False)
    assert body["status"] in ("ok", "ready")
    assert str(get_json(path, models, keys=False)[1]).count("scripted") == count


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize", "/detokenize"])
def test_requests_to_a_model_that_is_loading_give_503(path: str) -> None:
    status, body, head = get_json(path, Engine(scripted_engine.text_script("Hello"), state="starting"), b"{}")
    assert (status, body["error"]["code"]) == (503, "loading")
    assert b"retry-after: " in head


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/load_lora_adapter", b'{"lora_name":"one","lora_path":"one.gguf"}'),
        ("/v1/unload_lora_adapter", b'{"lora_name":"one"}'),
    ],
)
def test_adapters_do_not_come_and_go_during_the_start(path: str, body: bytes, tmp_path: Path) -> None:
    """The start loads one model after the other, and their list must not change meanwhile."""
    states = ("ready", "starting")
    models = model_manager_of(*(Engine(scripted_engine.text_script("Hello"), state=state) for state in states))
    status, answer, head = get_json(path, models, body, lora_dir=tmp_path, lora_keys=("given-1",))
    assert (status, answer["error"]["code"]) == (503, "loading")
    assert b"retry-after: " in head


@pytest.mark.parametrize("path", ["/v1/models", "/tokenizer_info", "/openapi.json"])
def test_pages_about_a_model_that_is_loading_give_503(path: str) -> None:
    assert get_json(path, Engine(scripted_engine.text_script("Hello"), state="starting"))[0] == 503


def test_refused_clients_get_different_retry_after_values() -> None:
    engine = Engine(scripted_engine.text_script("Hello"), max_jobs=0)
    times = {
        get_json("/v1/completions", engine, b'{"prompt":"a"}')[2].split(b"retry-after: ")[1][:2] for _ in range(60)
    }
    assert times == {b"1\r", b"2\r", b"3\r", b"4\r", b"5\r"}


# ---- drain


class HeldResponse:
    """An application with responses that last until `release` is set."""

    def __init__(self) -> None:
        self.begun = asyncio.Semaphore(0)
        self.release = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"begun ", "more_body": True})
        self.begun.release()
        await self.release.wait()
        await send({"type": "http.response.body", "body": b"ended"})


@asynccontextmanager
async def serving(app: Any, **limits: Any) -> AsyncIterator[tuple[TransportServer, int]]:
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


def run(scenario: Any) -> None:
    asyncio.run(asyncio.wait_for(scenario, 30))


def test_drain_finishes_responses_and_refuses_new_connections() -> None:
    async def scenario() -> None:
        app = HeldResponse()
        async with serving(app) as (transport_server, port):
            idle = await asyncio.open_connection("127.0.0.1", port)
            clients = [await ask(port) for _ in range(5)]
            for _ in clients:
                await app.begun.acquire()
            draining = asyncio.create_task(transport_server.drain(0, 1000, asyncio.Event()))
            while not await refuses(port):
                await asyncio.sleep(0)
            assert await rest(idle) == b""
            assert not draining.done()
            app.release.set()
            assert all(b"begun" in answer and b"ended" in answer for answer in [await rest(each) for each in clients])
            await draining

    run(scenario())


def test_during_the_drain_delay_each_response_closes_its_connection() -> None:
    async def scenario() -> None:
        app, stop_waiting = HeldResponse(), asyncio.Event()
        app.release.set()
        async with serving(app) as (transport_server, port):
            draining = asyncio.create_task(transport_server.drain(1000, 1000, stop_waiting))
            await asyncio.sleep(0)
            answer = await rest(await ask(port))
            assert b"connection: close" in answer
            assert b"ended" in answer
            stop_waiting.set()
            await draining
            assert await refuses(port)

    run(scenario())


# ---- half-close and disconnect


class WaitingApp:
    """An application that reads the request, sends the response head if `begun`, and waits for `go_on`.

    `disconnected` is set when it receives `http.disconnect`.
    """

    def __init__(self, begun: bool) -> None:
        self.request_received, self.go_on, self.disconnected = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._begun = begun

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        start = {"type": "http.response.start", "status": 200, "headers": []}
        if self._begun:
            await send(start)
        self.request_received.set()
        message, go_on = asyncio.create_task(receive()), asyncio.create_task(self.go_on.wait())
        await asyncio.wait((message, go_on), return_when=asyncio.FIRST_COMPLETED)
        if message.done() and message.result()["type"] == "http.disconnect":
            self.disconnected.set()
        for task in (message, go_on):
            task.cancel()
        if not self._begun:
            await send(start)
        await send({"type": "http.response.body", "body": b"all of it"})


@pytest.mark.parametrize("begun", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("request_", [get("/"), post(b"{}"), get("/") * 2], ids=["GET", "POST", "sent ahead"])
def test_a_client_that_half_closes_gets_its_response(begun: bool, request_: bytes) -> None:
    async def scenario() -> None:
        app = WaitingApp(begun)
        async with serving(app) as (transport_server, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request_)
            await app.request_received.wait()
            writer.write_eof()
            await asyncio.sleep(0.3)  # longer than the probes that detect a disconnected client
            for connection in transport_server._connections():
                connection.check(transport_server._context.clock())
            app.go_on.set()
            received = await rest((reader, writer))
        assert not app.disconnected.is_set()
        assert b"all of it" in received
        assert b"connection: close" in received or begun

    run(scenario())


@pytest.mark.parametrize("begun", [False, True], ids=["whole", "stream"])
def test_a_disconnect_is_noticed_before_the_response_ends(begun: bool) -> None:
    async def scenario() -> None:
        app = WaitingApp(begun)
        async with serving(app) as (_, port):
            with socket.create_connection(("127.0.0.1", port)) as client:
                await asyncio.get_running_loop().run_in_executor(None, client.sendall, get("/"))
                await app.request_received.wait()
                if begun:
                    await asyncio.get_running_loop().run_in_executor(None, client.recv, 2**16)
            await app.disconnected.wait()

    run(scenario())


@pytest.mark.parametrize(
    "sent",
    [b"", get("/")[:20], post(b"{}")[:-1], get("/").replace(b"HTTP/1.1", b"HTTP/1.0")],
    ids=["nothing", "half a head", "half a body", "HTTP/1.0"],
)
def test_a_half_close_without_a_complete_request_closes_the_connection(sent: bytes) -> None:
    async def scenario() -> None:
        async with serving(WaitingApp(False)) as (_, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(sent)
            writer.write_eof()
            assert await rest((reader, writer)) == b""

    run(scenario())


@pytest.mark.parametrize("stops", [False, True], ids=["grace", "stopped"])
def test_drain_returns_while_a_late_response_runs(stops: bool) -> None:
    async def scenario() -> None:
        app, stop_waiting = HeldResponse(), asyncio.Event()
        async with serving(app) as (transport_server, port):
            clients = await ask(port)
            await app.begun.acquire()
            draining = asyncio.create_task(transport_server.drain(0, 1000 if stops else 0, stop_waiting))
            if stops:
                stop_waiting.set()
            await draining
            app.release.set()  # as when the engine closes: every response ends, most of them with an error
        assert b"ended" in await rest(clients)

    run(scenario())


def test_exit_cuts_a_response_that_does_not_end() -> None:
    async def scenario() -> None:
        async with serving(HeldResponse()) as (_, port):
            clients = await ask(port)
        assert b"ended" not in await rest(clients)

    run(scenario())


def test_the_first_and_the_second_signal_set_their_events() -> None:
    async def scenario() -> None:
        calls = []
        with ShutdownSignals(lambda: calls.append("first")) as signals:
            signal.raise_signal(signal.SIGINT)
            await signals.first.wait()
            assert (signals.interactive, signals.second.is_set(), calls) == (True, False, ["first"])
            signal.raise_signal(signal.SIGTERM)
            await signals.second.wait()
            assert calls == ["first"]

    run(scenario())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_sighup_shuts_down_as_sigterm_does(number: signal.Signals) -> None:
    async def scenario() -> None:
        with ShutdownSignals(lambda: None) as signals:
            signal.raise_signal(number)
            await signals.first.wait()
            assert (signals.interactive, signals.second.is_set()) == (False, False)
            signal.raise_signal(number)
            await signals.second.wait()

    before = signal.signal(number, signal.SIG_DFL)
    try:
        run(scenario())
    finally:
        signal.signal(number, before)


def test_an_ignored_sighup_stays_ignored() -> None:
    async def scenario() -> None:
        with ShutdownSignals(lambda: None) as signals:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGTERM)
            await signals.first.wait()
            await asyncio.sleep(0)
            assert not signals.second.is_set()

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        run(scenario())
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_cancels_the_work() -> None:
    async def scenario() -> None:
        with ShutdownSignals(lambda: None) as signals:

            async def load() -> None:
                signal.raise_signal(signal.SIGTERM)
                await asyncio.sleep(1000)

            assert not await signals.run_until_signal(load())
            assert not signals.interactive

    async def without_signal() -> None:
        with ShutdownSignals(lambda: None) as signals:
            assert await signals.run_until_signal(asyncio.sleep(0))
            with pytest.raises(ValueError, match="failed"):
                await signals.run_until_signal(fail())

    async def fail() -> None:
        raise ValueError("failed")

    run(scenario())
    run(without_signal())


def test_the_file_limit_reserves_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    current = {"limits": (100, 500)}
    monkeypatch.setattr("resource.getrlimit", lambda _: current["limits"])
    monkeypatch.setattr("resource.setrlimit", lambda _, limits: current.update(limits=limits))
    assert raise_file_limit(100) == 100
    assert current["limits"] == (328, 500), "each connection may open a file beside its socket"
    assert raise_file_limit(10_000) == 186
    assert current["limits"] == (500, 500)
    current["limits"] = (64, 64)
    assert raise_file_limit(10_000) == 16, "with a low limit, half of the files are reserved"
    current["limits"] = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    assert raise_file_limit(10_000) == 10_000
