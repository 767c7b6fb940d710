"""Implements `afterword ps`: asks a running server for its models, their states and their load."""

from __future__ import annotations

import json
from typing import Any

import click
import httpx2

from afterword.errors import AfterwordError, SettingError

_TIMEOUT = httpx2.Timeout(10)  # seconds
_HEAD = ("NAME", "STATUS", "CONTEXT", "SEQUENCES", "RUNNING", "WAITING")


def print_status(url: str, key: str | None, as_json: bool) -> None:
    """Print a line for each model of the server at `url`. Raises `AfterwordError`."""
    base = url.rstrip("/").removesuffix("/v1")
    if not base.startswith(("http://", "https://")):
        raise SettingError(f"--url {url} is not an HTTP URL. Write http://HOST:PORT or https://HOST.")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx2.Client(base_url=base, headers=headers, timeout=_TIMEOUT) as client:
            listed = _json_of(client.get("/v1/models"), (200,))
            ready = _json_of(client.get("/ready"), (200, 503))
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise AfterwordError(
            f"No server answers at {url} ({error or type(error).__name__}). Start one with afterword serve, or give "
            "its address with --url."
        ) from None
    models = [_described(model, ready) for model in listed.get("data", [])]
    if as_json:
        click.echo(json.dumps({"status": ready.get("status"), "models": models}, indent=2))
        return
    rows = [_HEAD, *(tuple(map(_shown, model.values())) for model in models)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def _json_of(response: httpx2.Response, expected: tuple[int, ...]) -> dict[str, Any]:
    """The object in a response. Raises `AfterwordError` with the server's message for another status."""
    try:
        body = response.json()
        if response.status_code in expected and isinstance(body, dict):
            return body
        message = str(body["error"]["message"])
    except (ValueError, LookupError, TypeError):
        message = f"{response.url} responded with status {response.status_code}, and not as an Afterword server does."
    raise AfterwordError(message)


def _described(model: dict[str, Any], ready: dict[str, Any]) -> dict[str, Any]:
    """A model's values for the columns; None where the server does not report one.

    Further names of a model have the load of its engine, which `root` names.
    """
    engine = model.get("root", model["id"])
    load: dict[str, Any] = next((each for each in ready.get("models") or () if each["id"] == engine), {})
    numbers = {name: load.get(name) for name in ("sequences", "running", "waiting")}
    return {"id": model["id"], "status": model.get("status"), "context": model.get("max_model_len"), **numbers}


def _shown(value: object) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
