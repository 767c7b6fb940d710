"""Implements `afterword deploy`: prints configurations, or runs an application on a Ray cluster."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from afterword.cli.ray_serve.app_file import INSTALL, ServeApp, read_app, serve_options
from afterword.cli.ray_serve.configuration import (
    application_arguments,
    cluster_variables,
    deployments,
    kuberay_manifest,
    serve_configuration,
    shutdown_seconds,
)
from afterword.cli.run import server_parts
from afterword.errors import AfterwordError, SettingError
from afterword.settings.durations import format_duration

_STOP_SECONDS = 10  # in which Serve stops a replica without requests


def print_configuration(path: Path, kind: str) -> None:
    """Write the configuration of Ray Serve, or a KubeRay manifest, to standard output. Raises `SettingError`."""
    app = read_app(path)
    import yaml

    made = serve_configuration(app) if kind == "serve" else kuberay_manifest(app)
    click.echo(yaml.safe_dump(made, sort_keys=False), nl=False)


def deploy(path: Path, address: str | None) -> None:
    """Deploy an application. Without an address a cluster runs until SIGTERM or SIGINT. Raises `AfterwordError`."""
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
    if address is None:
        _run_until_signal(ray, serve, app)
        return
    try:
        ray.init(address=address, log_to_driver=False)
    except (ConnectionError, ValueError) as error:
        raise AfterwordError(f"There is no Ray cluster at --address {address}: {error}") from None
    try:
        _run(serve, app)
    finally:
        ray.shutdown()  # only disconnects: the cluster and all its applications go on


def _run_until_signal(ray: Any, serve: Any, app: ServeApp) -> None:
    """Run a cluster of its own. A signal ends it at any time; one during the drain ends it at once."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        # Without `local` Ray would join a cluster that RAY_ADDRESS names, and the end would stop others' applications.
        ray.init(address="local", include_dashboard=False, log_to_driver=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray has set its own handler
        _run(serve, app)
        click.echo("Ctrl+C stops the cluster.")
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
        click.echo(f"Waiting up to {format_duration(app.drain)} for running requests. Ctrl+C again ends them.")
        _drain(serve, app)
    except KeyboardInterrupt:
        pass
    finally:
        ray.shutdown()


def _drain(serve: Any, app: ServeApp) -> None:
    """Delete the application, wait for its requests, and stop Serve, which alone would close the ingress at once."""
    serve.delete(app.name, _blocking=False)  # blocking, it would wait for 60 seconds at most
    deadline = time.monotonic() + shutdown_seconds(app) + _STOP_SECONDS
    while app.name in serve.status().applications and time.monotonic() < deadline:
        time.sleep(0.2)
    serve.shutdown()


def _run(serve: Any, app: ServeApp) -> None:
    """Deploy the application, and wait until its replicas run."""
    from afterword.cli.ray_serve.application import bound, running_ingress

    serve.start(
        proxy_location="EveryNode",
        http_options={"host": app.host, "port": app.port},
        controller_options={"runtime_env": {"env_vars": cluster_variables(app)}},
    )
    check_ingress(app, running_ingress())
    try:
        serve.run(bound(application_arguments(app), deployments(app)), name=app.name, route_prefix="/")
    except RuntimeError as error:
        raise AfterwordError(f"Ray Serve could not deploy {app.name}: {error}") from None
    host = f"[{app.host}]" if ":" in app.host else app.host
    click.echo(f"Ray Serve runs {app.name} at http://{host}:{app.port}")


def check_ingress(app: ServeApp, running: Mapping[str, object]) -> None:
    """Compare the file with what Serve runs: Serve ignores other settings if it runs already. Raises `SettingError`."""
    for name, value in running.items():
        wanted = getattr(app, name)
        if value != wanted:
            raise SettingError(
                f"{name}: {wanted}, but Ray Serve already runs on this cluster with {name}: {value}. "
                "Give that, or end Serve and all its applications with: serve shutdown"
            )
