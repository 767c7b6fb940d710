"""`GET /v1/models`: what is served here."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from afterword.api import wire
from afterword.api.service import Service
from afterword.engine.roster import Host
from afterword.errors import ModelNotFound


async def list_models(request: Request) -> Response:
    """All models."""
    service: Service = request.app.state.service
    service.models.check_started()
    return json_answer({"object": "list", "data": [describe(host) for host in service.models]})


async def get_model(request: Request) -> Response:
    """One model; its name may contain slashes. Raises `ModelNotFound`."""
    service: Service = request.app.state.service
    name: str = request.path_params["model"]
    if not name:  # in a request's body that would mean whatever is served
        raise ModelNotFound(name)
    host = service.host(name)
    if service.models.keep_alive is None:
        service.models.check_loaded(host)
    return json_answer(describe(host))


def describe(host: Host) -> dict[str, Any]:
    """The API's model object, and what clients of other servers look for beside it.

    What only the engine knows is null until the model has been loaded for the first time.
    """
    card = host.card
    return {
        "id": host.id,
        "object": "model",
        "created": host.offer.created,
        "owned_by": "afterword",
        "status": host.state,
        "max_model_len": host.offer.context,
        "system_fingerprint": card.fingerprint if card else None,
        "reproducible": host.promise,
        "infill": card.infill is not None if card else None,
    }


def json_answer(value: object, status: int = 200) -> Response:
    """A value as JSON."""
    return Response(wire.encode(value), status, media_type="application/json")
