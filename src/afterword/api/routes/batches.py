"""`/v1/batches`: create, list, read and cancel batches; and the function that sends the requests of batch lines."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from afterword.api.in_process_client import in_process_client
from afterword.api.requests.query_parameters import QueryParameters
from afterword.api.requests.request_body import read_json
from afterword.api.requests.request_context import request_context_of
from afterword.api.responses import serialization
from afterword.api.routes.files import list_object, manager_of, not_found_error
from afterword.api.routes.models import json_response
from afterword.api.service import Service
from afterword.batch.input_lines import ENDPOINT
from afterword.batch.output_lines import SendRequest, ServerReply
from afterword.batch.stored_items import BatchStatus, StoredBatch, new_id
from afterword.completion.json_body import parse_object, run_in_thread_if_large
from afterword.errors import Overloaded, RequestError, Unauthorized

FIELDS = ("input_file_id", "endpoint", "completion_window", "metadata")
WINDOW = "24h"
MAX_LISTED = 100
"""The most batches in one response."""
MAX_METADATA_MEMBERS, MAX_METADATA_NAME, MAX_METADATA_VALUE = 16, 64, 512
"""Limits of `metadata`: pairs, characters of a key, characters of a value."""
TIMES: tuple[tuple[str, BatchStatus], ...] = (
    ("in_progress_at", "in_progress"),
    ("finalizing_at", "finalizing"),
    ("completed_at", "completed"),
    ("failed_at", "failed"),
    ("expired_at", "expired"),
    ("cancelling_at", "cancelling"),
    ("cancelled_at", "cancelled"),
)
"""The time members of a batch object, and the status that began at each time."""


async def create(request: Request) -> Response:
    """Store a new batch and wake the batch manager. Raises `RequestError` and `StorageFailed`."""
    manager = manager_of(request)
    body = await run_in_thread_if_large(parse_object, await read_json(request))
    for name in body:
        if name not in FIELDS:
            raise RequestError(f"Unrecognized request argument supplied: {name[:64]}", param=name[:64])
    now = int(manager.clock())
    batch = StoredBatch(
        id=new_id("batch_"),
        key=request_context_of(request.scope).key,
        endpoint=_only(body, "endpoint", ENDPOINT),
        window=_only(body, "completion_window", WINDOW),
        input_file=_file(body),
        created=now,
        expires=now + int(manager.limits.batch_seconds),
        metadata=_metadata(body.get("metadata")),
    )
    if not manager.file_store.exists:
        raise not_found_error("file")
    await asyncio.to_thread(manager.file_store.add_batch, batch, manager.limits.max_batches)
    manager.notify()
    return json_response(batch_object(batch))


async def list_batches(request: Request) -> Response:
    """One page of the batches of the API key, the newest first."""
    query = QueryParameters(request, ("after", "limit"))
    after, limit = query.text("after"), query.number("limit", 1, MAX_LISTED, 20)
    manager = manager_of(request)
    if not manager.file_store.exists:
        return json_response(list_object([], False))
    batches, more = await asyncio.to_thread(
        manager.file_store.batches, request_context_of(request.scope).key, after, limit
    )
    return json_response(list_object([batch_object(manager.with_progress(batch)) for batch in batches], more))


async def get_batch(request: Request) -> Response:
    manager = manager_of(request)
    if not manager.file_store.exists:
        raise not_found_error("batch")
    batch = await asyncio.to_thread(
        manager.file_store.batch, request_context_of(request.scope).key, request.path_params["id"]
    )
    return json_response(batch_object(manager.with_progress(batch)))


async def cancel(request: Request) -> Response:
    manager = manager_of(request)
    if not manager.file_store.exists:
        raise not_found_error("batch")
    return json_response(
        batch_object(await manager.cancel(request_context_of(request.scope).key, request.path_params["id"]))
    )


def batch_object(batch: StoredBatch) -> dict[str, Any]:
    """A batch in OpenAI's format."""
    errors = [{"code": each.code, "line": each.line, "message": each.message, "param": None} for each in batch.errors]
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "errors": {"object": "list", "data": errors} if errors else None,
        "input_file_id": batch.input_file,
        "completion_window": batch.window,
        "status": batch.status,
        "output_file_id": batch.output_file,
        "error_file_id": batch.error_file,
        "created_at": batch.created,
        "expires_at": batch.expires,
        **{name: batch.times.get(status) for name, status in TIMES},
        "request_counts": {"total": batch.lines, "completed": batch.succeeded, "failed": batch.failed},
        "usage": {
            "input_tokens": batch.prompt,
            "input_tokens_details": {"cached_tokens": batch.cached},
            "output_tokens": batch.completion,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": batch.prompt + batch.completion,
        },
        "metadata": batch.metadata,
    }


def make_batch_client(app: ASGIApp, service: Service) -> Callable[[str], SendRequest]:
    """A function that maps the id of an API key to the function that sends the requests of its batch lines.

    At most half as many requests run at a time as the largest number of sequences of a model, so that requests of
    waiting clients find free slots. If the key is no longer valid, each reply is an error.
    """
    sequences = max(managed_model.shape.sequences for managed_model in service.models)
    running = asyncio.Semaphore(max(1, sequences // 2))

    def client_for(key: str) -> SendRequest:
        async def send_request(method: str, path: str, body: bytes) -> ServerReply:
            async with running:
                try:
                    account = service.key_registry.account(key)
                except Overloaded as problem:
                    return ServerReply(
                        problem.status,
                        serialization.encode(serialization.error(problem)),
                        retry=float(problem.retry_after),
                    )
                if service.config.requires_key and account is None:
                    invalid = Unauthorized("The API key of this batch is no longer valid.", code="invalid_api_key")
                    return ServerReply(invalid.status, serialization.encode(serialization.error(invalid)))
                return await in_process_client(app, account)(method, path, body)

        return send_request

    return client_for


def _only(body: dict[str, Any], name: str, value: str) -> str:
    if body.get(name) != value:
        raise RequestError(f"'{name}' must be '{value}'.", param=name)
    return value


def _file(body: dict[str, Any]) -> str:
    file = body.get("input_file_id")
    if not isinstance(file, str):
        raise RequestError("'input_file_id' must be a string, the ID of a file.", param="input_file_id")
    return file


def _metadata(metadata: object) -> dict[str, str] | None:
    if metadata is None:
        return None
    is_small_dict = isinstance(metadata, dict) and len(metadata) <= MAX_METADATA_MEMBERS
    if not is_small_dict or not all(
        len(name) <= MAX_METADATA_NAME and isinstance(value, str) and len(value) <= MAX_METADATA_VALUE
        for name, value in metadata.items()  # type: ignore[attr-defined]
    ):
        raise RequestError(
            f"'metadata' must be an object with at most {MAX_METADATA_MEMBERS} members. A name may have at most "
            f"{MAX_METADATA_NAME} characters; a value must be a string of at most {MAX_METADATA_VALUE} characters.",
            param="metadata",
        )
    return dict(metadata)  # type: ignore[call-overload, no-any-return]
