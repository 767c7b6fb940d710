"""`GET /v1/models`: the models of this server."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from afterword.api.responses import serialization
from afterword.api.service import NamedModel, Service
from afterword.completion.infill import RERANK
from afterword.config import Config
from afterword.errors import ModelNotFound


async def list_models(request: Request) -> Response:
    service: Service = request.app.state.service
    service.models.check_started()
    return json_response(
        {"object": "list", "data": [model_object(each, service.config) for each in service.named_models()]}
    )


async def get_model(request: Request) -> Response:
    """One model; its name may contain slashes. Raises `ModelNotFound`, and `Overloaded` while it is being loaded."""
    service: Service = request.app.state.service
    name: str = request.path_params["model"]
    if not name:  # `managed_model` would return the only model for it
        raise ModelNotFound(name)
    named_model = service.named_model(name)
    if service.models.keep_alive is None:
        service.models.check_loaded(named_model.managed_model)
    return json_response(model_object(named_model, service.config))


def model_object(named_model: NamedModel, config: Config) -> dict[str, Any]:
    """A model in OpenAI's format, with further members, some of which clients of other servers read.

    Members from the model info are null until the model has been loaded for the first time.
    """
    managed_model = named_model.managed_model
    model_info = managed_model.model_info
    layout = model_info and (model_info.infill or (RERANK if config.infill_rerank else None))
    return {
        "id": named_model.name,
        "object": "model",
        "created": managed_model.definition.created,
        "owned_by": "afterword",
        "root": managed_model.id,
        "parent": managed_model.definition.parent,
        "defaults": named_model.defaults,
        "status": managed_model.state,
        "max_model_len": managed_model.shape.context,
        "system_fingerprint": model_info.fingerprint if model_info else None,
        "reproducible": managed_model.promise,
        "infill": layout is not None if model_info else None,
        "infill_family": layout.family if layout else None,
        "infill_files": bool(layout and layout.file) if model_info else None,
        "prediction": model_info.verifies_drafts if model_info else None,
    }


def json_response(value: object, status: int = 200) -> Response:
    return Response(serialization.encode(value), status, media_type="application/json")
