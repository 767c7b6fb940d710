"""The application of Ray Serve: a deployment whose replicas are whole servers. Imports Ray Serve.

A replica runs the ASGI application of `afterword serve` in Serve's own HTTP server, which takes the place of
`transport`: limits on connections and times are those of Serve's ingress. The worker process of a model ends with its
replica.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import ray
from ray import serve
from ray.serve.context import _get_global_client

from afterword.api.app import make_app
from afterword.api.middleware.request_ids import HEADER
from afterword.api.requests.request_recorder import REQUEST_ID_KEY
from afterword.cli.ray_serve.app_file import serve_options
from afterword.cli.ray_serve.configuration import DEPLOYMENT, ENGINE
from afterword.cli.run import closing, make_service, server_parts
from afterword.config import Config
from afterword.engine.parent.model_manager import ModelManager
from afterword.observability.request_log import open_request_log
from afterword.observability.traces import open_traces
from afterword.system.tasks import switch_threads_soon

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,100}")

Application = Callable[[Any, Any, Any], Awaitable[None]]


class Replica:
    """One replica. Serve calls its methods on the event loop on which the application runs."""

    _models: ModelManager
    _running: AsyncExitStack
    _app: Application

    async def __init__(self, table: Mapping[str, Any]) -> None:  # type: ignore[misc]
        """Load the models. `table`: the settings of `afterword serve`. Serve sends requests when this has returned.

        Whether keys are needed depends on the address on which Serve listens, whatever the deployed file says.
        """
        switch_threads_soon()
        options = serve_options(table, str(running_ingress()["host"]))
        await start(self, *server_parts(options["models"], options))

    def __serve_build_asgi_app__(self) -> Application:
        return _hosted(self._app)

    async def check_health(self) -> None:
        """Raise if every model is failing, so that Serve replaces the replica."""
        if all(managed_model.state == "failing" for managed_model in self._models):
            raise RuntimeError("every model of this replica is failing")

    async def __del__(self) -> None:
        """End the models. Serve calls this after the drain, if no request is left."""
        await self._running.aclose()


async def start(replica: Replica, models: ModelManager, config: Config) -> None:
    """Load the models of a replica and make its application."""
    replica._models, replica._running = models, AsyncExitStack()  # for `__del__`, if loading fails
    async with AsyncExitStack() as undo:
        log = undo.enter_context(open_request_log(config.log))
        traces = undo.enter_context(open_traces(config.traces))
        service = replace(make_service(config, models), request_log=log, traces=traces)
        await undo.enter_async_context(service.key_registry.syncing())
        await undo.enter_async_context(closing(models))
        await models.open()
        replica._app = make_app(service)
        replica._running = undo.pop_all()


deployment: Any = serve.deployment(name=DEPLOYMENT)(serve.ingress()(Replica))


def build(args: Mapping[str, Any]) -> Any:
    """The application of Serve for the `args` of a configuration, see `configuration.application_arguments`."""
    return bound(args, {})


def bound(args: Mapping[str, Any], options: Mapping[str, Mapping[str, Any]]) -> Any:
    """The application with the options of its deployments by name, see `configuration.deployments`."""
    table = dict(args["serve"])
    if "routing" not in args:
        return _with(deployment, options, DEPLOYMENT).bind(table)
    from afterword.cli.ray_serve.routed_application import engine, ingress

    replicas = _with(engine, options, ENGINE).bind(table, args["drain"])
    return _with(ingress, options, DEPLOYMENT).bind(table, args["routing"], replicas)


def _with(made: Any, options: Mapping[str, Mapping[str, Any]], name: str) -> Any:
    return made.options(**options[name]) if name in options else made


def running_ingress() -> dict[str, object]:
    """The host, the port and the kind of ingress that Serve has on this cluster.

    Serve's interface has no public function for them. `afterword[ray]` requires the version in which these exist.
    """
    client = _get_global_client()
    http = client.http_config
    proxies = ray.get(client._controller.get_proxies.remote())
    kinds = {each._ray_actor_creation_function_descriptor.class_name for each in proxies.values()}
    ingress = "haproxy" if "HAProxyManager" in kinds else "ray"
    return {"host": http.host or "0.0.0.0", "port": http.port, "ingress": ingress}


def _hosted(app: Application) -> Application:
    """The application as Serve needs it: it answers the messages of a lifespan, and takes its request ids from Serve.

    Serve adds its own `x-request-id` to every response, so that of the application is left out.
    """

    async def hosted(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            for phase in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{phase}.complete"})
            return
        given = next((value for name, value in scope.get("headers", ()) if name == HEADER), b"").decode("latin-1")
        if _REQUEST_ID.fullmatch(given):  # with Serve's own proxy a client can choose it
            scope[REQUEST_ID_KEY] = given

        async def send_without_id(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = message | {"headers": [each for each in message["headers"] if each[0].lower() != HEADER]}
            await send(message)

        await app(scope, receive, send_without_id)

    return hosted
