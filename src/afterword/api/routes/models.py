"""`GET /v1/models`: the models of this server."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from afterword.api.responses import serialization
from afterword.api.service import Service
from afterword.engine.parent.model_manager import ManagedModel
from afterword.errors import ModelNotFound


async def list_models(request: Request) -> Response:
    service: Service = request.app.state.service
    service.models.check_started()
    return json_response({"object": "list", "data": [model_object(managed_model) for managed_model in service.models]})


async def get_model(request: Request) -> Response:
    """One model; its name may contain slashes. Raises `ModelNotFound`, and `Overloaded` while it is being loaded."""
    service: Service = request.app.state.service
    name: str = request.path_params["model"]
    if not name:  # `managed_model` would return the only model for it
        raise ModelNotFound(name)
    managed_model = service.managed_model(name)
    if service.models.keep_alive is None:
        service.models.check_loaded(managed_model)
    return json_response(model_object(managed_model))


def model_object(managed_model: ManagedModel) -> dict[str, Any]:
    """A model in OpenAI's format, with further members, some of which clients of other servers read.

    Members from the model info are null until the model has been loaded for the first time.
    """
    model_info = managed_model.model_info
    return {
        "id": managed_model.id,
        "object": "model",
        "created": managed_model.definition.created,
        "owned_by": "afterword",
        "status": managed_model.state,
        "max_model_len": managed_model.definition.context,
        "system_fingerprint": model_info.fingerprint if model_info else None,
        "reproducible": managed_model.promise,
        "infill": model_info.infill is not None if model_info else None,
        "infill_family": model_info.infill.family if model_info and model_info.infill else None,
        "prediction": model_info.verifies_drafts if model_info else None,
    }


def json_response(value: object, status: int = 200) -> Response:
    return Response(serialization.encode(value), status, media_type="application/json")
