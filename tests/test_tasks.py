"""Background tasks: a failure is logged, and the task runs again or ends its process.

The tests inject a failure into each background task of the server.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

import scripted_engine
from afterword.batch.batch_limits import BatchLimits
from afterword.batch.file_store import FileStore
from afterword.batch.manager import BatchManager
from afterword.engine.parent.model_manager import ModelDefinition, ModelManager
from afterword.engine.protocol import Load
from afterword.errors import LoadFailed
from afterword.keys.key_registry import KeyRegistry
from afterword.keys.key_store import KeyStore
from afterword.observability.request_log import RequestLog
from afterword.system import tasks
from afterword.transport.server import TransportServer
from afterword.transport.transport_limits import TransportLimits


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "_FIRST_PAUSE", 0.0)


class Failing:
    """A function that raises `times` times and then calls `then`."""

    def __init__(self, then: Callable[..., Any], times: int = 2) -> None:
        self.left = times
        self.called = 0
        self._then = then

    def __call__(self, *arguments: Any) -> Any:
        self.called += 1
        if self.left:
            self.left -= 1
            raise RuntimeError("injected")
        return self._then(*arguments)


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not holds():
            await asyncio.sleep(0.001)


def failures(caplog: pytest.LogCaptureFixture, name: str) -> int:
    return sum(name in record.getMessage() and record.exc_info is not None for record in caplog.records)


# ---- afterword.system.tasks


def test_failed_work_is_logged_and_repeated(caplog):
    async def work() -> None:
        failing()

    failing = Failing(lambda: None, 3)
    recovered: list[int] = []

    async def main() -> None:
        await tasks.supervised(work, "some work", lambda: recovered.append(1))

    asyncio.run(main())
    assert (failing.called, failures(caplog, "some work"), len(recovered)) == (4, 3, 3)


def test_work_that_is_cancelled_ends(caplog):
    async def main() -> None:
        task = tasks.supervised(asyncio.Event().wait, "waiting")  # type: ignore[arg-type]
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    asyncio.run(main())
    assert not caplog.records


def test_a_clean_up_that_fails_does_not_end_the_task(caplog):
    async def work() -> None:
        failing()

    failing = Failing(lambda: None, 1)

    async def main() -> None:
        await tasks.supervised(work, "some work", Failing(lambda: None))

    asyncio.run(main())
    assert failing.called == 2
    assert failures(caplog, "some work") == 2


def test_the_pause_grows_while_work_fails(monkeypatch, caplog):
    monkeypatch.setattr(tasks, "_FIRST_PAUSE", 1.0)
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(tasks.asyncio, "sleep", sleep)
    failing = Failing(lambda: None, 8)

    async def work() -> None:
        failing()

    async def main() -> None:
        await tasks.supervised(work, "some work")

    asyncio.run(main())
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]


def test_run_logged_logs_the_exception(caplog):
    async def work() -> None:
        raise RuntimeError("injected")

    async def main() -> None:
        await tasks.run_logged(work, "some work")

    asyncio.run(main())
    assert failures(caplog, "some work") == 1


@pytest.mark.parametrize(
    ("problem", "logged"), [("RuntimeError('injected')", True), ("SystemExit(0)", True), ("BrokenPipeError()", False)]
)
def test_a_vital_thread_that_fails_ends_its_process(problem, logged):
    program = f"""
import threading
from afterword.system.tasks import vital_thread
def work(number): raise {problem}
vital_thread(work, 1, name="worker")
threading.Event().wait()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 70
    assert ("The thread worker has failed" in done.stderr) == logged


# ---- the server's tasks


def test_the_task_that_reads_keys(tmp_path, caplog, monkeypatch):
    store = KeyStore(tmp_path / "keys.db", create=True)
    key, text = store.create()
    key_registry = KeyRegistry((), store)
    monkeypatch.setattr("afterword.keys.key_registry._SYNC_SECONDS", 0.001)
    monkeypatch.setattr(key_registry, "sync", Failing(key_registry.sync))

    async def main() -> None:
        async with key_registry.syncing():
            store.revoke(key.id)
            await until(lambda: key_registry.find(text) is None)

    asyncio.run(main())
    assert failures(caplog, "key file") == 2


def test_the_task_that_starts_batches(tmp_path, caplog, monkeypatch):
    file_store = FileStore(tmp_path / "batches")
    file_store.upload()
    manager = BatchManager(file_store, BatchLimits())
    unfinished = Failing(file_store.unfinished_batches)
    monkeypatch.setattr(file_store, "unfinished_batches", unfinished)

    async def main() -> None:
        async with manager.running(Mock()):
            await until(lambda: unfinished.called == 3)

    asyncio.run(main())
    assert failures(caplog, "batches") == 2


def test_the_task_that_times_connections(caplog, monkeypatch):
    monkeypatch.setattr("afterword.transport.server._TICK", 0.001)
    transport_server = new_transport_server()
    check = Failing(lambda: [])
    monkeypatch.setattr(transport_server, "_connections", check)

    async def main() -> None:
        async with transport_server:
            await until(lambda: check.called >= 3)

    asyncio.run(main())
    assert failures(caplog, "connection times") == 2


def test_a_connection_that_cannot_be_started_does_not_stop_accepting(caplog, monkeypatch):
    transport_server = new_transport_server()
    port = transport_server._listener.getsockname()[1]
    monkeypatch.setattr(transport_server, "_connect", Failing(transport_server._connect))

    async def ask() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            return await reader.readline()
        except ConnectionError:
            return b""
        finally:
            writer.close()

    async def main() -> None:
        async with asyncio.timeout(30), transport_server:
            assert [(await ask())[:8] for _ in range(3)] == [b"", b"", b"HTTP/1.1"]

    asyncio.run(main())
    assert failures(caplog, "connection") == 2


def new_transport_server() -> TransportServer:
    async def app(_: Any, __: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    return TransportServer(app, socket.create_server(("127.0.0.1", 0)), TransportLimits())


def test_a_model_that_fails_in_an_unexpected_way_can_be_loaded_later(caplog):
    engine = scripted_engine.ScriptedEngine(scripted_engine.text_script("Hello"))
    model_manager = ModelManager(
        [ModelDefinition("model", 0, Failing(lambda: as_supervisor(engine), 1))], keep_alive=60
    )

    async def main() -> None:
        (managed_model,) = model_manager
        with pytest.raises(LoadFailed):
            await model_manager.acquire(managed_model)
        assert await model_manager.acquire(managed_model)
        model_manager.release(managed_model)

    asyncio.run(main())
    assert failures(caplog, "could not be loaded") == 1


def as_supervisor(engine: Any) -> Any:
    async def nothing() -> None:
        return None

    engine.open = engine.close = nothing
    engine.state, engine.load = "ready", Load()
    return engine


def test_a_model_that_cannot_be_unloaded_is_logged(caplog):
    engine = scripted_engine.ScriptedEngine(scripted_engine.text_script("Hello"))

    async def main() -> None:
        model_manager = ModelManager([ModelDefinition("model", 0, lambda: as_supervisor(engine))], keep_alive=0)
        (managed_model,) = model_manager
        await model_manager.acquire(managed_model)
        close = Failing(lambda: None)
        engine.close = lambda: call_close(close)
        model_manager.release(managed_model)
        await until(lambda: close.called)
        await model_manager.close()

    async def call_close(call: Failing) -> None:
        call()

    asyncio.run(main())
    assert failures(caplog, "unload") == 1


def test_the_thread_that_writes_the_log(tmp_path, caplog, monkeypatch):
    request_log = RequestLog(tmp_path / "log")
    monkeypatch.setattr(request_log, "_write", Failing(request_log._write))
    with caplog.at_level(logging.WARNING):
        for line in (b"a", b"b", b"c"):
            request_log.write(line)
        request_log.close()
    assert Path(tmp_path / "log").read_bytes() == b"c\n"
    assert len(caplog.records) == 1
