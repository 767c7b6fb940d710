"""`POST /v1/load_lora_adapter` and `/v1/unload_lora_adapter`: vLLM's routes that change which adapters are served.

A request names a file on the server's disk, so it needs one of the API keys of `--lora-key`, and the file must be in
the folder of `--lora-dir`.
"""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from afterword.api.requests.request_body import read_json
from afterword.api.requests.request_context import request_context_of
from afterword.api.service import Service
from afterword.completion.json_body import parse_object, run_in_thread_if_large
from afterword.config import Config
from afterword.engine.parent.model_manager import ModelDefinition, ModelManager
from afterword.errors import ModelNotFound, Overloaded, RequestError, SettingError

_MAX_NAME = 256  # characters
_MAX_PATH = 4096  # bytes: the longest path of Linux
_OFF = "This server loads no adapters at run time: it was started without --lora-dir and --lora-key."
_MAY_NOT = "This API key may not load or unload adapters. The server's option --lora-key names the keys that may."


async def load(request: Request) -> Response:
    """`{"lora_name", "lora_path"}`: serve an adapter under a name. The response comes when it is loaded.

    Raises `RequestError`, and `Overloaded` during the start and if the memory is in use.
    """
    service: Service = request.app.state.service
    folder = _permitted_folder(request, service.config)
    service.models.check_started()
    body = await _read(request, ("lora_name", "lora_path", "load_inplace"))
    if body.get("load_inplace"):
        raise RequestError("'load_inplace' is not supported: unload the adapter first.", param="load_inplace")
    name, path = _text(body, "lora_name", _MAX_NAME), _text(body, "lora_path", _MAX_PATH)
    if not name.isprintable():
        raise RequestError("'lora_name' must consist of printable characters.", param="lora_name")
    file = await asyncio.to_thread(_file_in, folder, path)
    _check_free(service, name)
    try:
        await service.models.add(name, partial(_define, service.models, name, file))
    except SettingError as problem:
        reason = problem.message.replace(str(file), path)
        raise RequestError(f"The adapter could not be loaded: {reason}", param="lora_path") from None
    if service.models.get(name):  # it may have been unloaded already
        service.metrics.add_model(name)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


async def unload(request: Request) -> Response:
    """`{"lora_name"}`: serve an adapter no longer. Requests that use it continue.

    Raises `RequestError`, and `Overloaded` during the start.
    """
    service: Service = request.app.state.service
    _permitted_folder(request, service.config)
    service.models.check_started()
    body = await _read(request, ("lora_name", "lora_int_id"))
    if body.get("lora_int_id") is not None:
        raise RequestError("'lora_int_id' is not supported: adapters have no numbers.", param="lora_int_id")
    name = _text(body, "lora_name", _MAX_NAME)
    managed_model = service.models.get(name)
    if managed_model is None:
        raise ModelNotFound(name, param="lora_name")
    if managed_model.definition.parent is None:
        raise RequestError(f"{name} is a model and no adapter, so it cannot be unloaded.", param="lora_name")
    if further := [each.name for each in service.config.defaults if each.model == name]:
        raise RequestError(f"{name} has further names ({', '.join(further)}) in --defaults.", param="lora_name")
    service.models.remove(managed_model)
    service.metrics.remove_model(name)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


async def _define(models: ModelManager, name: str, file: Path, available: int) -> ModelDefinition:
    assert models.define_adapter is not None
    return await asyncio.to_thread(models.define_adapter, name, file, available)


def _permitted_folder(request: Request, config: Config) -> Path:
    """The folder of adapters. Raises `RequestError` if the request's key may not change which are served."""
    if config.lora_dir is None:
        raise RequestError(_OFF, status=403, code="adapters_disabled")
    if request_context_of(request.scope).key not in config.lora_keys:
        raise RequestError(_MAY_NOT, status=403, code="permission_denied")
    return config.lora_dir


async def _read(request: Request, known: tuple[str, ...]) -> dict[str, Any]:
    body = await run_in_thread_if_large(parse_object, await read_json(request))
    for key in body:
        if key not in known:
            raise RequestError(f"Unrecognized request argument supplied: {key[:64]}", param=key[:64])
    return body


def _text(body: dict[str, Any], field: str, most: int) -> str:
    value = body.get(field)
    if not isinstance(value, str) or not 0 < len(value) <= most or "\0" in value:
        raise RequestError(f"'{field}' must be a string of 1 to {most} characters.", param=field)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RequestError(f"'{field}' has a surrogate that stands alone.", param=field) from None
    return value


def _file_in(folder: Path, path: str) -> Path:
    """The file that a path names, relative to the folder or absolute. Links are followed before the folder counts.

    Raises `RequestError`, which says nothing about files outside of the folder.
    """
    root = folder.resolve()
    try:
        file = (root / path).resolve()
        inside, exists, is_file = file.is_relative_to(root), file.exists(), file.is_file()
    except (OSError, RuntimeError):  # a name that is too long, or a loop of links
        inside = exists = is_file = False
    if not inside:
        raise RequestError("'lora_path' must name a file in the server's folder of adapters.", param="lora_path")
    if not exists:
        raise RequestError(f"There is no adapter {path} in the server's folder.", param="lora_path", status=404)
    if not is_file:
        raise RequestError(f"{path} is no file. An adapter is a GGUF file.", param="lora_path")
    return file


def _check_free(service: Service, name: str) -> None:
    """Raise an error if the name is taken or the number of adapters has reached its limit."""
    if service.models.has(name) or any(each.name == name for each in service.config.defaults):
        raise RequestError(
            f"There is already a model with the name {name}. Unload it first, or choose another name.",
            param="lora_name",
        )
    if service.models.adapters >= service.models.policy.adapters:
        raise Overloaded(
            f"{service.models.adapters} adapters are loaded, and the server allows no more. Unload one first.",
            code="too_many_adapters",
        )
