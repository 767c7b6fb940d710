"""`/health`, `/ready`, `/version`: whether the process lives, whether it can answer, and what it is."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from afterword import __version__
from afterword.api.life import REASONS
from afterword.api.models import json_answer
from afterword.api.service import Service
from afterword.engine.roster import Host


async def health(request: Request) -> Response:
    """200 while this process lives and does its part. 503 where only another start of all of it could help."""
    service: Service = request.app.state.service
    broken = all(host.state == "failing" for host in service.models)
    body = {"status": "failing" if broken else "ok"} | _named(service, {host.id: host.state for host in service.models})
    return json_answer(body, 503 if broken else 200)


async def ready(request: Request) -> Response:
    """200 while requests are answered at once; else why they are not. And how busy the engines are."""
    service: Service = request.app.state.service
    state = service.life.state(service.models)
    models = [_busyness(host) for host in service.models]
    sums = {name: sum(model[name] for model in models) for name in ("sequences", "running", "waiting", "restarts")}
    body = {"status": state, "reason": REASONS[state], **sums} | _named(service, models)
    return json_answer(body, 200 if state == "ready" else 503)


def _named(service: Service, models: object) -> dict[str, object]:
    """What is said of each model by name: nothing where keys are asked for, since these routes ask for none."""
    return {} if service.config.guarded else {"models": models}


def _busyness(host: Host) -> dict[str, Any]:
    load = host.load
    return {
        "id": host.id,
        "status": host.state,
        "sequences": load.sequences,
        "running": load.running,
        "waiting": load.waiting,
        "restarts": host.restarts,
    }


async def version(_: Request) -> Response:
    """What this is."""
    return json_answer({"version": __version__})
