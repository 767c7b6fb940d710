"""`/health`, `/ready`, `/version`: whether the process works, whether it accepts requests, and its version."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from afterword import __version__
from afterword.api.readiness import STATE_REASONS
from afterword.api.routes.models import json_response
from afterword.api.service import Service
from afterword.engine.parent.model_manager import ManagedModel


async def health(request: Request) -> Response:
    """200 while the process works. 503 if every model is failing, so that only a restart of the process could help."""
    service: Service = request.app.state.service
    is_failing = all(managed_model.state == "failing" for managed_model in service.models)
    body = {"status": "failing" if is_failing else "ok"} | _by_name(
        service, {managed_model.id: managed_model.state for managed_model in service.models}
    )
    return json_response(body, 503 if is_failing else 200)


async def ready(request: Request) -> Response:
    """200 while the server accepts requests, otherwise 503 with the reason. Both with the load of the engines."""
    service: Service = request.app.state.service
    state = service.readiness.state(service.models)
    models = [_load(managed_model) for managed_model in service.models]
    sums = {name: sum(model[name] for model in models) for name in ("sequences", "running", "waiting", "restarts")}
    body = {"status": state, "reason": STATE_REASONS[state], **sums} | _by_name(service, models)
    return json_response(body, 200 if state == "ready" else 503)


def _by_name(service: Service, models: object) -> dict[str, object]:
    """The member `models`. Absent on a server with API keys, since these routes need no key."""
    return {} if service.config.requires_key else {"models": models}


def _load(managed_model: ManagedModel) -> dict[str, Any]:
    load = managed_model.load
    return {
        "id": managed_model.id,
        "status": managed_model.state,
        "sequences": load.sequences,
        "running": load.running,
        "waiting": load.waiting,
        "restarts": managed_model.restarts,
    }


async def version(_: Request) -> Response:
    return json_response({"version": __version__})
