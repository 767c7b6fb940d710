"""`/health`, `/ready`, `/version`: whether the process lives, whether it can answer, and what it is."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from afterword import __version__
from afterword.api.models import json_answer
from afterword.api.service import Service


async def health(request: Request) -> Response:
    """200 while requests can be answered, 503 while the engine is down."""
    service: Service = request.app.state.service
    alive = service.served.engine.state == "ready"
    return json_answer({"status": "ok" if alive else service.served.engine.state}, 200 if alive else 503)


async def ready(request: Request) -> Response:
    """How busy the engine is. 503 while it is down."""
    service: Service = request.app.state.service
    engine = service.served.engine
    load = engine.load
    body = {
        "status": engine.state,
        "model": service.served.id,
        "sequences": load.sequences,
        "running": load.running,
        "waiting": load.waiting,
        "restarts": engine.restarts,
    }
    return json_answer(body, 200 if engine.state == "ready" else 503)


async def version(_: Request) -> Response:
    """What this is."""
    return json_answer({"version": __version__})
