"""Implements `afterword deploy`: prints configurations, or runs an application on a Ray cluster."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import click

from afterword.cli.ray_serve.app_file import INSTALL, ServeApp, read_app, serve_options
from afterword.cli.ray_serve.configuration import (
    cluster_variables,
    deployment_options,
    kuberay_manifest,
    serve_configuration,
)
from afterword.cli.run import server_parts
from afterword.errors import AfterwordError, SettingError


def print_configuration(path: Path, kind: str) -> None:
    """Write the configuration of Ray Serve, or a KubeRay manifest, to standard output. Raises `SettingError`."""
    app = read_app(path)
    import yaml

    made = serve_configuration(app) if kind == "serve" else kuberay_manifest(app)
    click.echo(yaml.safe_dump(made, sort_keys=False), nl=False)


def deploy(path: Path, address: str | None) -> None:
    """Deploy an application. Without an address the cluster runs until SIGTERM or SIGINT. Raises `AfterwordError`."""
    app = read_app(path)
    if address is None:  # the replicas have this machine's files, so errors in settings are found before Ray starts
        options = serve_options(app.serve, app.host)
        server_parts(options["models"], options)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    for name, value in cluster_variables(app).items():
        os.environ.setdefault(name, value)  # before the import: Ray reads them then
    try:
        import ray
        from ray import serve
    except ImportError:
        raise SettingError(INSTALL) from None
    stopped = threading.Event()
    if address is None:
        ray.init(include_dashboard=False, log_to_driver=True)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stopped.set())
    else:
        _connect(ray, address)
    try:
        _run(serve, app)
        if address is None:
            click.echo("Ctrl+C stops the cluster.")
            stopped.wait()
            serve.shutdown()
    finally:
        ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    try:
        ray.init(address=address, log_to_driver=False)
    except (ConnectionError, ValueError) as error:
        raise AfterwordError(f"There is no Ray cluster at --address {address}: {error}") from None


def _run(serve: Any, app: ServeApp) -> None:
    """Deploy the application, and wait until its replicas run."""
    from afterword.cli.ray_serve.application import deployment

    serve.start(
        proxy_location="EveryNode",
        http_options={"host": app.host, "port": app.port},
        controller_options={"runtime_env": {"env_vars": cluster_variables(app)}},
    )
    replica = deployment.options(**deployment_options(app))
    try:
        serve.run(replica.bind(dict(app.serve), app.host), name=app.name, route_prefix="/")
    except RuntimeError as error:
        raise AfterwordError(f"Ray Serve could not deploy {app.name}: {error}") from None
    host = f"[{app.host}]" if ":" in app.host else app.host
    click.echo(f"Ray Serve runs {app.name} at http://{host}:{app.port}")
