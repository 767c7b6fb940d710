"""Tests of how `afterword deploy` uses a Ray cluster, with a fake Ray that records the calls."""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
import sys
from types import ModuleType, SimpleNamespace

import pytest
from click.testing import CliRunner

from afterword.cli import main
from afterword.errors import SettingError

APPLICATION = "afterword.cli.ray_serve.application"
ROUTED = "afterword.cli.ray_serve.routed_application"


class FakeRay:
    """Ray and Serve. `calls`: what the command has called. `stop_at`: the call during which a signal arrives.

    Serve has `host`, `port` and the kind of ingress of `proxy`, as if another command had started it.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, object]] = []
        self.stop_at, self.signal = "", signal.SIGTERM
        self.host, self.port, self.proxy = "127.0.0.1", 8000, "HAProxyManager"
        self.applications: dict[str, object] = {}

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def call(self, name: str, value: object = None) -> None:
        self.calls.append((name, value))
        if name == self.stop_at:
            os.kill(os.getpid(), self.signal)

    def modules(self) -> dict[str, ModuleType]:
        ray, serve, context, exceptions = (
            ModuleType(name) for name in ("ray", "ray.serve", "ray.serve.context", "ray.serve.exceptions")
        )
        ray.init = self.init
        ray.get = lambda value: value
        ray.shutdown = lambda: self.call("ray.shutdown")
        ray.serve = serve
        serve.start = lambda **options: self.call("serve.start", options["http_options"])
        serve.run = self.run
        serve.delete = self.delete
        serve.status = lambda: SimpleNamespace(applications=self.applications)
        serve.shutdown = lambda: self.call("serve.shutdown")
        serve.ingress = lambda: lambda replica: replica
        bound = SimpleNamespace(bind=lambda *given: given)
        serve.deployment = lambda name: lambda replica: SimpleNamespace(options=lambda **_: bound, bind=bound.bind)
        context._get_global_client = self.client
        exceptions.RayServeException = Exception
        named = {"ray.serve.context": context, "ray.serve.exceptions": exceptions}
        return {"ray": ray, "ray.serve": serve, **named}

    def init(self, **options: object) -> None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # as Ray does
        self.call("ray.init", options["address"])

    def run(self, bound: object, name: str, route_prefix: str) -> None:
        self.applications[name] = route_prefix
        self.call("serve.run", bound)

    def delete(self, name: str, *, _blocking: bool) -> None:
        assert not _blocking
        self.call("serve.delete", name)
        del self.applications[name]

    def client(self) -> SimpleNamespace:
        handle = SimpleNamespace(_ray_actor_creation_function_descriptor=SimpleNamespace(class_name=self.proxy))
        proxies = SimpleNamespace(remote=lambda: {"node": handle})
        http = SimpleNamespace(host=self.host, port=self.port)
        return SimpleNamespace(http_config=http, _controller=SimpleNamespace(get_proxies=proxies))


@pytest.fixture
def ray(monkeypatch):
    fake = FakeRay()
    for name, module in fake.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in (APPLICATION, ROUTED):
        monkeypatch.delitem(sys.modules, name, raising=False)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    before = dict(os.environ)
    yield fake
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for name in (APPLICATION, ROUTED):
        sys.modules.pop(name, None)  # they have the fake
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


@pytest.fixture
def deploy(tmp_path):
    def run(text: str, *options: str) -> tuple[int, str]:
        file = tmp_path / "app.yaml"
        file.write_text(text)
        result = CliRunner().invoke(main, ["deploy", str(file), *options])
        return result.exit_code, result.output

    return run


@pytest.mark.parametrize(
    ("call", "number"),
    [
        ("ray.init", signal.SIGINT),  # for SIGTERM Ray has its own handler then
        *((call, number) for call in ("serve.start", "serve.run") for number in (signal.SIGTERM, signal.SIGINT)),
    ],
)
def test_a_signal_ends_the_command_before_the_replicas_run(ray, deploy, call, number):
    """`serve.run` waits without an end while the cluster lacks the resources of a replica."""
    ray.stop_at, ray.signal = call, number
    assert deploy("serve: {}")[0] == 0
    assert ray.names[-2:] == [call, "ray.shutdown"]


@pytest.fixture
def waits(monkeypatch):
    """The command waits for a signal: SIGTERM arrives when it does."""
    wait = SimpleNamespace(wait=lambda: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr("afterword.cli.ray_serve.run.threading", SimpleNamespace(Event=lambda: wait))


@pytest.mark.usefixtures("waits")
def test_a_cluster_of_its_own_is_new_and_ends_after_the_requests(ray, deploy, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    status, output = deploy("drain: 90\nserve: {}")
    assert status == 0, output
    assert ray.calls[0] == ("ray.init", "local")
    assert ray.names[-3:] == ["serve.delete", "serve.shutdown", "ray.shutdown"]
    assert "90 seconds" in output


@pytest.mark.usefixtures("waits")
def test_a_signal_during_the_drain_ends_it(ray, deploy):
    ray.stop_at = "serve.delete"
    assert deploy("serve: {}")[0] == 0
    assert ray.names[-2:] == ["serve.delete", "ray.shutdown"]


def test_with_an_address_nothing_on_the_cluster_is_stopped(ray, deploy):
    status, output = deploy("serve: {}", "--address", "auto")
    assert status == 0, output
    assert ray.names == ["ray.init", "serve.start", "serve.run", "ray.shutdown"]
    assert ray.calls[0] == ("ray.init", "auto")


def test_with_routing_the_ingress_gets_the_engine_replicas(ray, deploy):
    status, output = deploy("drain: 90\nrouting: prefix\nserve: {parallel: 2}", "--address", "auto")
    assert status == 0, output
    table = {"parallel": 2}
    assert dict(ray.calls)["serve.run"] == (table, "prefix", (table, 90.0))


@pytest.mark.parametrize(
    ("setting", "running", "message"),
    [
        ("host", "0.0.0.0", "host: 127.0.0.1, but Ray Serve already runs on this cluster with host: 0.0.0.0"),
        ("host", None, "with host: 0.0.0.0"),
        ("port", 9000, "port: 8000, but Ray Serve already runs on this cluster with port: 9000"),
        ("proxy", "ProxyActor", "ingress: haproxy, but Ray Serve already runs on this cluster with ingress: ray"),
    ],
)
def test_a_file_that_differs_from_the_running_serve_is_refused_by_name(ray, deploy, setting, running, message):
    """Serve would ignore the file's setting."""
    setattr(ray, setting, running)
    status, output = deploy("serve: {}", "--address", "auto")
    assert status == 2
    assert message in output
    assert "serve.run" not in ray.names
    assert "serve.shutdown" not in ray.names


def test_a_replica_needs_keys_if_serve_listens_for_others_whatever_the_file_says(ray):
    from afterword.cli.ray_serve.application import Replica

    ray.host = "0.0.0.0"
    with pytest.raises(SettingError, match="there are no API keys"):
        asyncio.run(Replica.__init__(SimpleNamespace(), {}))  # a true replica has a `__del__` that Serve awaits


class FakeReplicas:
    """Serve's handle for replicas: one answers with `facts`, one has an error, and one is silent."""

    def __init__(self, facts: object) -> None:
        self.results = [SimpleNamespace(get_async=each) for each in (self.silent, self.failing, self.answering)]
        self.facts = facts

    def broadcast(self, method: str) -> FakeReplicas:
        assert method == "facts"
        return self

    async def _fetch_replica_results_async(self) -> list[SimpleNamespace]:
        return self.results

    async def results_async(self, *, timeout_s: float, return_exceptions: bool) -> list[object]:
        """As in Ray: one time limit for all."""
        every = asyncio.gather(*(each.get_async() for each in self.results), return_exceptions=return_exceptions)
        return await asyncio.wait_for(every, timeout_s)

    async def silent(self) -> None:
        await asyncio.Event().wait()

    async def failing(self) -> None:
        raise RuntimeError("The replica has ended.")

    async def answering(self) -> object:
        return self.facts


def test_a_silent_replica_does_not_hide_the_others(ray, monkeypatch):
    routed = importlib.import_module(ROUTED)
    monkeypatch.setattr(routed, "_ANSWER_SECONDS", 0.01)
    facts = routed.ReplicaFacts(routed.ReplicaAddress("a", "127.0.0.1", 1, "secret"), ())
    assert asyncio.run(routed._find(FakeReplicas(facts))) == [facts]
