"""Declares `afterword deploy`. Its implementation (`ray_serve`) is imported when the command runs."""

from __future__ import annotations

from pathlib import Path

import click

from afterword.cli.options import GroupedCommand, option


@click.command(cls=GroupedCommand)
@click.argument("app", metavar="APP.yaml", type=click.Path(path_type=Path))
@option(
    "Cluster", "--address", help="A running Ray cluster, or auto for the one of this machine.  [default: a new one]"
)
@option(
    "Configuration",
    "--print",
    "printed",
    type=click.Choice(["serve", "kuberay"]),
    help="Print the configuration of Ray Serve, or a KubeRay manifest, and deploy nothing.",
)
def deploy(app: Path, address: str | None, printed: str | None) -> None:
    """Run replicas of the server with Ray Serve.

    APP.yaml has the number of replicas and, under serve, the settings of afterword serve. Without --address a Ray
    cluster on this machine runs until Ctrl+C. With it the application is deployed, or updated without a pause, and the
    command ends. It needs afterword[ray]; see docs/scale.md.

    \b
    Examples:
      afterword deploy app.yaml                  # on this machine
      afterword deploy app.yaml --address auto   # deploy or update
      afterword deploy app.yaml --print serve    # for `serve deploy`
      afterword deploy app.yaml --print kuberay  # for `kubectl apply`
    """
    from afterword.cli.ray_serve import run

    if printed:
        run.print_configuration(app, printed)
    else:
        run.deploy(app, address)
