"""`/v1/files`: the input and output files of batches. A file belongs to the API key that uploaded it."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, Response

from afterword.api.requests.multipart_upload import receive_upload
from afterword.api.requests.query_parameters import QueryParameters
from afterword.api.requests.request_context import request_context_of
from afterword.api.routes.models import json_response
from afterword.api.service import Service
from afterword.batch.batch_job import in_thread
from afterword.batch.file_store import SortOrder
from afterword.batch.manager import BatchManager
from afterword.batch.stored_items import StoredFile
from afterword.errors import RequestError

MAX_LISTED = 10_000
"""The most files in one response."""
ANCHOR, SECONDS = "expires_after[anchor]", "expires_after[seconds]"
FIELDS = ("file", "purpose", ANCHOR, SECONDS)
MIN_LIFETIME, MAX_LIFETIME = 3600, 2_592_000
"""Seconds from upload to expiry: at least an hour, at most 30 days."""
PURPOSES = ("batch", "batch_output")
_RANGE_HEADERS = (b"range", b"if-range")  # ignored: the whole file is sent


async def create(request: Request) -> Response:
    """Receive a file and add it to the file store. Raises `RequestError` and `StorageFailed`."""
    manager = manager_of(request)
    key = request_context_of(request.scope).key
    async with receive_upload(request, manager.file_store, manager.limits, key) as form:
        for name in form.fields:
            if name not in FIELDS:
                raise RequestError(f"Unrecognized request argument supplied: {name[:64]}", param=name[:64])
        if form.name is None:
            raise RequestError("'file' is required: the form must have a file.", param="file")
        if form.fields.get("purpose") != "batch":
            raise RequestError(
                "'purpose' must be 'batch', the only purpose that this server supports.", param="purpose"
            )
        now, lifetime = int(manager.clock()), _lifetime_seconds(form.fields)
        expires = None if lifetime is None else now + lifetime
        file = StoredFile(form.path.name, key, form.name, "batch", form.size, now, expires)

        def keep() -> None:
            manager.file_store.add(file, manager.limits.max_stored, form.reserved_bytes)
            form.keep = True

        await in_thread(keep)
    return json_response(file_object(file))


async def list_files(request: Request) -> Response:
    """One page of the files of the API key."""
    query = QueryParameters(request, ("after", "limit", "order", "purpose"))
    purpose = query.choice("purpose", (*PURPOSES, ""), "") or None
    order: SortOrder = "asc" if query.choice("order", ("asc", "desc"), "desc") == "asc" else "desc"
    limit = query.number("limit", 1, MAX_LISTED, MAX_LISTED)
    file_store = manager_of(request).file_store
    if not file_store.exists:
        return json_response(list_object([], False))
    after = query.text("after")
    key = request_context_of(request.scope).key
    files, more = await asyncio.to_thread(file_store.files, key, after, limit, order, purpose)
    return json_response(list_object([file_object(file) for file in files], more))


async def get_file(request: Request) -> Response:
    return json_response(file_object(await _file(request)))


async def get_content(request: Request) -> Response:
    """The bytes of one file."""
    file = await _file(request)
    path = manager_of(request).file_store.contents(file.id)
    request.scope["headers"] = [header for header in request.scope["headers"] if header[0] not in _RANGE_HEADERS]
    return FileResponse(path, media_type="application/octet-stream")


async def delete(request: Request) -> Response:
    file = await _file(request)
    await asyncio.to_thread(manager_of(request).file_store.remove, file.key, file.id)
    return json_response({"id": file.id, "object": "file", "deleted": True})


def _lifetime_seconds(fields: dict[str, str]) -> int | None:
    """Seconds from `expires_after`, after which the file is removed; None: the file does not expire."""
    if ANCHOR not in fields and SECONDS not in fields:
        return None
    if fields.get(ANCHOR) != "created_at":
        raise RequestError(f"'{ANCHOR}' must be 'created_at'.", param=ANCHOR)
    seconds = fields.get(SECONDS, "")
    if not (seconds.isascii() and seconds.isdigit() and MIN_LIFETIME <= int(seconds) <= MAX_LIFETIME):
        raise RequestError(f"'{SECONDS}' must be a whole number from {MIN_LIFETIME} to {MAX_LIFETIME}.", param=SECONDS)
    return int(seconds)


def file_object(file: StoredFile) -> dict[str, Any]:
    """A file in OpenAI's format."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.size,
        "created_at": file.created,
        "expires_at": file.expires,
        "filename": file.name,
        "purpose": file.purpose,
        "status": "processed",
    }


def list_object(items: list[dict[str, Any]], more: bool) -> dict[str, Any]:
    """One page of a list in OpenAI's format. `more`: more items follow after this page."""
    first, last = (items[0]["id"], items[-1]["id"]) if items else (None, None)
    return {"object": "list", "data": items, "first_id": first, "last_id": last, "has_more": more}


def manager_of(request: Request) -> BatchManager:
    service: Service = request.app.state.service
    if service.batches is None:
        raise RequestError(
            "Files and batches are not available here: this server is one of several replicas with separate folders. "
            "`afterword batch FILE --url` sends the lines of a batch file to them.",
            code="batches_not_available",
            status=404,
        )
    return service.batches


async def _file(request: Request) -> StoredFile:
    file_store = manager_of(request).file_store
    if not file_store.exists:
        raise not_found_error("file")
    return await asyncio.to_thread(file_store.file, request_context_of(request.scope).key, request.path_params["id"])


def not_found_error(kind: str) -> RequestError:
    """The error for an unknown id. Routes raise it without creating the file store's folder."""
    return RequestError(f"There is no {kind} with this ID.", code="not_found", status=404)
