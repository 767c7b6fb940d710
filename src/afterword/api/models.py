"""`GET /v1/models`: what is served here."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from afterword.api import wire
from afterword.api.service import Served, Service
from afterword.errors import ModelNotFound


async def list_models(request: Request) -> Response:
    """All models."""
    service: Service = request.app.state.service
    return json_answer({"object": "list", "data": [describe(service.find(None))]})


async def get_model(request: Request) -> Response:
    """One model; its name may contain slashes. Raises `ModelNotFound`."""
    service: Service = request.app.state.service
    name: str = request.path_params["model"]
    if not name:  # in a request's body that would mean whatever is served
        raise ModelNotFound(name)
    return json_answer(describe(service.find(name)))


def describe(served: Served) -> dict[str, Any]:
    """The API's model object, and what clients of other servers look for beside it."""
    card = served.engine.card
    return {
        "id": served.id,
        "object": "model",
        "created": served.created,
        "owned_by": "afterword",
        "max_model_len": card.context,
        "system_fingerprint": card.fingerprint,
        "reproducible": card.promise,
        "infill": card.infill is not None,
    }


def json_answer(value: object, status: int = 200) -> Response:
    """A value as JSON."""
    return Response(wire.encode(value), status, media_type="application/json")
