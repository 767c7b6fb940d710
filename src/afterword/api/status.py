"""`/health`, `/ready`, `/version`: whether the process lives, whether it can answer, and what it is."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from afterword import __version__
from afterword.api.life import REASONS
from afterword.api.models import json_answer
from afterword.api.service import Service


async def health(request: Request) -> Response:
    """200 while this process lives and does its part. 503 where only another start of all of it could help."""
    service: Service = request.app.state.service
    broken = service.served.engine.state == "failing"
    return json_answer({"status": "failing" if broken else "ok"}, 503 if broken else 200)


async def ready(request: Request) -> Response:
    """200 while requests are answered at once; else why they are not. And how busy the engine is."""
    service: Service = request.app.state.service
    engine = service.served.engine
    state, load = service.life.state(engine), engine.load
    body = {
        "status": state,
        "reason": REASONS[state],
        "model": service.served.id,
        "sequences": load.sequences,
        "running": load.running,
        "waiting": load.waiting,
        "restarts": engine.restarts,
    }
    return json_answer(body, 200 if state == "ready" else 503)


async def version(_: Request) -> Response:
    """What this is."""
    return json_answer({"version": __version__})
