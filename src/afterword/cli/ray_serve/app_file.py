"""Reads the file of `afterword deploy`: the replicas, and the settings of the server that each replica runs.

Both parts are checked as the tables of a settings file are, so an error names the file and the setting. Imports PyYAML,
which Ray requires too, but not Ray.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from afterword.batch.batch_limits import BatchLimits
from afterword.cli import settings
from afterword.engine.replicas.routing import RULES
from afterword.errors import SettingError
from afterword.settings.durations import parse_duration
from afterword.settings.limit_table import limit_entries
from afterword.transport.transport_limits import TransportLimits

INSTALL = "afterword deploy needs Ray Serve. Install it into Afterword's environment: pip install 'afterword[ray]'"
REFUSED = {
    "host": "give host beside serve: Ray Serve listens",
    "port": "give port beside serve: Ray Serve listens",
    "proxy": "Ray Serve's ingress is the only proxy that a replica sees",
    "drain-delay": "give drain beside serve",
    "grace": "give drain beside serve",
    "print-limits": "use afterword serve --print-limits",
    "json": "use afterword serve --print-limits",
    "batch-dir": "replicas have no files and batches, since their folders are separate",
    "lora-dir": "a request reaches one replica, so only that one would load the adapter",
    "lora-key": "a request reaches one replica, so only that one would load the adapter",
    "api-key": "Ray's dashboard would show it. Give api-key-file or keys, or set AFTERWORD_API_KEY for the Ray nodes",
}
"""Settings of `afterword serve` that a replica cannot have, with the reason."""

UNUSED_LIMITS = {
    each.name: reason
    for table, reason in (
        (TransportLimits(), "Serve's HTTP server, which has no such limit, reads the requests"),
        (BatchLimits(), "replicas have no files and batches"),
    )
    for each in limit_entries(table)
    if each.name != "max_body"  # the application checks it
}
"""Limits that nothing in a replica applies, with the reason."""

WHOLE_SERVERS = "connections"
"""The value of `routing` for replicas that are whole servers, among which Serve's ingress chooses by connections."""

_POSITIVE, _CORES = click.IntRange(min=1), click.FloatRange(min=0)
_APP = click.Command(
    "app",
    params=[
        click.Option(["--name"], default="afterword"),
        click.Option(["--host"], default="127.0.0.1"),
        click.Option(["--port"], type=click.IntRange(1, 65535), default=8000),
        click.Option(["--ingress"], type=click.Choice(["haproxy", "ray"]), default="haproxy"),
        click.Option(["--routing"], type=click.Choice([WHOLE_SERVERS, *RULES]), default=WHOLE_SERVERS),
        click.Option(["--replicas"], type=_POSITIVE),
        click.Option(["--min-replicas"], type=_POSITIVE),
        click.Option(["--max-replicas"], type=_POSITIVE),
        click.Option(["--requests-per-replica"], type=_POSITIVE, default=16),
        click.Option(["--surge"], type=click.IntRange(0, 100), default=25),
        click.Option(["--cpus"], type=_CORES, default=1.0),
        click.Option(["--gpus"], type=_CORES, default=0.0),
        click.Option(["--drain"], type=parse_duration, default="60"),
        click.Option(["--image"]),
    ],
)


@dataclass(frozen=True, slots=True)
class ServeApp:
    """An application of Ray Serve.

    - `ingress`: `haproxy` sends connections to the replicas; `ray` is Ray's own proxy in Python.
    - `routing`: `connections` for replicas that are whole servers. Otherwise one ingress with this rule of
      `engine.replicas.routing` is in front of engine replicas.
    - `requests_per_replica`: running and waiting requests of a replica at which the autoscaler aims.
    - `surge`: percent of the replicas that a rolling update may start before it stops old ones.
    - `cpus`, `gpus`: what one replica reserves. `drain`: seconds that a replica's requests have to end.
    - `serve`: the settings of `afterword serve` by name; `max_queue` is among them.
    """

    name: str
    host: str
    port: int
    ingress: str
    routing: str
    min_replicas: int
    max_replicas: int
    requests_per_replica: int
    surge: int
    cpus: float
    gpus: float
    drain: float
    image: str | None
    serve: Mapping[str, Any]
    max_queue: int


def read_app(path: Path) -> ServeApp:
    """Read and check an application's file. Raises `SettingError`."""
    where, table = f"{path}: ", _table(path)
    serve = table.pop("serve", {})
    if not isinstance(serve, dict):
        raise SettingError(f"{where}serve: expected the settings of afterword serve, such as 'models: [model.gguf]'.")
    check_serve(f"{where}serve: ", serve)
    values = settings.read_command(where, table, _APP)
    with _APP.make_context("app", [], default_map=values) as ctx:
        fields = dict(ctx.params)
    low, high = _replicas(where, fields)
    _check_routing(where, fields["routing"], low, high, serve)
    fields |= {"min_replicas": low, "max_replicas": high, "serve": serve}
    fields["max_queue"] = serve_options(serve, fields["host"])["max_queue"]
    del fields["replicas"]
    return ServeApp(**fields)


def check_serve(where: str, table: Mapping[str, Any]) -> dict[str, Any]:
    """Check settings of `afterword serve`; returns them by parameter name. Raises `SettingError`."""
    for name, reason in REFUSED.items():
        if name in table:
            raise SettingError(f"{where}{name} cannot be set for replicas: {reason}.")
    values = settings.read_command(where, table, serve_command())
    _refuse_unused_limits(where, values.get("limit", ()))
    return values


def serve_options(table: Mapping[str, Any], host: str) -> dict[str, Any]:
    """The options of `afterword serve` for these settings, as on a command line. Raises `SettingError`.

    Environment variables of the process take precedence over the settings, as over a settings file. No settings file
    is read: the settings are in its place.
    """
    values = check_serve("serve: ", table)
    try:
        with serve_command().make_context("serve", [], default_map=values) as ctx:
            _refuse_unused_limits("", ctx.params["limit"])  # an environment variable can set limits too
            return ctx.params | {"host": host}
    except click.UsageError as error:  # from an environment variable
        raise SettingError(error.format_message()) from None


def serve_command() -> click.Command:
    """`afterword serve` without its option `--config`, and without variables for settings that replicas cannot have."""
    from afterword.cli.commands import main

    params = []
    for each in main.commands["serve"].params:
        parameter = copy.copy(each)
        if settings.name(each) in REFUSED and not settings.is_secret(each):
            parameter.envvar = None
        if settings.name(each) != "config":
            params.append(parameter)
    return click.Command("serve", params=params)


def _table(path: Path) -> dict[str, Any]:
    try:
        import yaml
    except ImportError:
        raise SettingError(INSTALL) from None
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, yaml.YAMLError) as error:
        raise SettingError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table):
        raise SettingError(f"{path}: expected settings by name, such as 'replicas: 2'.")
    return table


def _replicas(where: str, fields: Mapping[str, Any]) -> tuple[int, int]:
    """The least and the most replicas."""
    fixed, low, high = fields["replicas"], fields["min_replicas"], fields["max_replicas"]
    if fixed is not None and (low, high) != (None, None):
        name = "min-replicas" if high is None else "max-replicas"
        raise SettingError(f"{where}replicas cannot be used with {name}.")
    if low is not None and high is None:
        raise SettingError(f"{where}min-replicas needs max-replicas.")
    low, high = fixed or low or 1, fixed or high or 1
    if low > high:
        raise SettingError(f"{where}min-replicas: {low} is more than max-replicas, {high}.")
    return low, high


def _check_routing(where: str, routing: str, low: int, high: int, serve: Mapping[str, Any]) -> None:
    """Refuse what engine replicas behind an ingress cannot have."""
    if routing == WHOLE_SERVERS:
        return
    if low != high:
        raise SettingError(
            f"{where}max-replicas cannot be used with routing: {routing}, since Serve sees no requests of engine "
            "replicas by which it could choose their number. Give replicas."
        )
    if "keep-alive" in serve:
        raise SettingError(f"{where}serve: keep-alive cannot be used with routing: {routing}. All models stay loaded.")


def _refuse_unused_limits(where: str, limits: Iterable[str]) -> None:
    """Check arguments `NAME=NUMBER`."""
    for each in limits:
        name = each.partition("=")[0]
        if name in UNUSED_LIMITS:
            raise SettingError(f"{where}limit: {name} cannot be set for replicas: {UNUSED_LIMITS[name]}.")
