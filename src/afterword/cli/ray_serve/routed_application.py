"""The deployments of an application with `routing`: engine replicas with the models, and one ingress in front of them.

The ingress is a whole server, but its engines are `RoutedEngine`. It finds the replicas through Serve, and sends jobs
to them over TCP: a token takes no way through Serve's handles. Imports Ray Serve.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any

import ray
from ray import serve
from ray.serve.exceptions import RayServeException

from afterword.cli.ray_serve.app_file import serve_options
from afterword.cli.ray_serve.application import Replica, running_ingress, start
from afterword.cli.ray_serve.configuration import DEPLOYMENT, DRAIN_SECONDS, ENGINE
from afterword.cli.ray_serve.replica_answers import replica_answers
from afterword.cli.run import closing, parts_with_models, server_parts
from afterword.completion.request_limits import RequestLimits
from afterword.engine.parent.job_queue import QueuePolicy
from afterword.engine.parent.model_manager import ModelDefinition, ModelManager
from afterword.engine.replicas.job_server import JobServer
from afterword.engine.replicas.routed_engine import FIND_SECONDS, RoutedEngine, RoutedModel
from afterword.engine.replicas.routing import RULES
from afterword.engine.replicas.wire import ReplicaAddress
from afterword.system.tasks import switch_threads_soon

_ANSWER_SECONDS = 5.0  # in which a replica says where it listens; others are asked again soon
_OF_THE_INGRESS = {"api_key_file": None, "keys": False, "keys_file": None, "defaults": None}
"""Options whose files only the ingress reads."""
_FACTS = ("id", "created", "context", "sequences", "capacity", "trained_context", "promise", "parent")


@dataclass(frozen=True, slots=True)
class ReplicaFacts:
    """Where an engine replica listens, and the facts about its models with which the ingress makes its own."""

    address: ReplicaAddress
    models: tuple[dict[str, Any], ...]


class EngineReplica:
    """A replica with the models and their workers, and without an HTTP API."""

    async def __init__(self, table: Mapping[str, Any], drain: float) -> None:  # type: ignore[misc]
        """Load the models. `table`: the settings of `afterword serve`. `drain`: seconds that jobs have at the end."""
        switch_threads_soon()
        options = serve_options(table, "127.0.0.1") | _OF_THE_INGRESS
        models, _ = server_parts(options["models"], options)
        self._models, self._drain, self._running = models, drain, AsyncExitStack()  # for `__del__`, if loading fails
        async with AsyncExitStack() as undo:
            await undo.enter_async_context(closing(models))
            await models.open()
            engines = {each.id: each.engine for each in models if each.engine}
            self._server = JobServer(engines)
            host = ray.util.get_node_ip_address()
            port = await self._server.open(host)
            undo.push_async_callback(self._server.close)
            self._running = undo.pop_all()
        name = serve.get_replica_context().replica_id.unique_id
        self._facts = ReplicaFacts(
            ReplicaAddress(name, host, port, self._server.secret, _hash(table)),
            tuple({fact: getattr(each.definition, fact) for fact in _FACTS} for each in models),
        )

    def facts(self) -> ReplicaFacts:
        """The ingress asks every replica, again and again."""
        return self._facts

    async def check_health(self) -> None:
        """Raise if every model is failing, so that Serve replaces the replica."""
        if all(managed_model.state == "failing" for managed_model in self._models):
            raise RuntimeError("every model of this replica is failing")

    async def __del__(self) -> None:
        """Serve knows nothing of the jobs, so the drain is here."""
        if hasattr(self, "_facts"):
            await self._server.leave(DRAIN_SECONDS, self._drain)
        await self._running.aclose()


class Ingress(Replica):
    """The server in front of the engine replicas."""

    async def __init__(self, table: Mapping[str, Any], routing: str, replicas: Any) -> None:  # type: ignore[misc]
        """Wait for the first replica with the same settings. `replicas`: Serve's handle for them."""
        switch_threads_soon()
        options, settings = serve_options(table, str(running_ingress()["host"])), _hash(table)
        find = partial(_find, replicas)

        async def addresses() -> Sequence[ReplicaAddress]:
            return [each.address for each in await find()]

        while not (facts := [each for each in await find() if each.address.settings == settings]):
            await asyncio.sleep(FIND_SECONDS)

        def make_models(policy: QueuePolicy, _: RequestLimits) -> ModelManager:
            definitions = []
            for model in facts[0].models:
                routed = RoutedModel(model["id"], RULES[routing](), policy, settings)
                definitions.append(ModelDefinition(**model, make_engine=partial(RoutedEngine, routed, addresses)))
            return ModelManager(definitions, policy=policy)

        await start(self, *parts_with_models(options, make_models))


async def _find(replicas: Any) -> list[ReplicaFacts]:
    """The facts of the replicas that answer in time."""
    try:
        found = await replica_answers(replicas, "facts", _ANSWER_SECONDS)
    except (RayServeException, TimeoutError):  # there is no replica at present
        return []
    return [each for each in found if isinstance(each, ReplicaFacts)]


def _hash(table: Mapping[str, Any]) -> str:
    text = json.dumps(dict(table), sort_keys=True, default=str)
    return blake2b(text.encode(), digest_size=16).hexdigest()


engine: Any = serve.deployment(name=ENGINE)(EngineReplica)
ingress: Any = serve.deployment(name=DEPLOYMENT)(serve.ingress()(Ingress))
