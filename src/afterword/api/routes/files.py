"""`/v1/files`: what batches are read from and written to. A file belongs to the key that it came with."""

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
from afterword.batch.file_store import SortOrder, StoredFile
from afterword.batch.manager import BatchManager
from afterword.errors import RequestError

MAX_LISTED = 10_000
"""Files in one list."""
ANCHOR, SECONDS = "expires_after[anchor]", "expires_after[seconds]"
FIELDS = ("file", "purpose", ANCHOR, SECONDS)
SHORTEST, LONGEST = 3600, 2_592_000
"""Seconds after which a file may expire: an hour, 30 days."""
PURPOSES = ("batch", "batch_output")
_PARTS = (b"range", b"if-range")  # headers that ask for a part of a file: it comes whole


async def create(request: Request) -> Response:
    """Take in a file."""
    manager = manager_of(request)
    key = request_context_of(request.scope).key
    async with receive_upload(request, manager.file_store, manager.limits, key) as form:
        for name in form.fields:
            if name not in FIELDS:
                raise RequestError(f"Unrecognized request argument supplied: {name[:64]}", param=name[:64])
        if form.name is None:
            raise RequestError("'file' is required: a file in the form.", param="file")
        if form.fields.get("purpose") != "batch":
            raise RequestError("'purpose' must be 'batch': files are for nothing else here.", param="purpose")
        now, life = int(manager.clock()), _expiry_seconds(form.fields)
        expires = None if life is None else now + life
        file = StoredFile(form.path.name, key, form.name, "batch", form.size, now, expires)

        def keep() -> None:
            manager.file_store.add(file, manager.limits.max_stored, form.reserved_bytes)
            form.keep = True

        await in_thread(keep)
    return json_response(file_object(file))


async def list_files(request: Request) -> Response:
    """Some of a key's files."""
    query = QueryParameters(request, ("after", "limit", "order", "purpose"))
    purpose = query.choice("purpose", (*PURPOSES, ""), "") or None
    order: SortOrder = "asc" if query.choice("order", ("asc", "desc"), "desc") == "asc" else "desc"
    most = query.number("limit", 1, MAX_LISTED, MAX_LISTED)
    file_store = manager_of(request).file_store
    if not file_store.exists:
        return json_response(list_object([], False))
    after = query.text("after")
    key = request_context_of(request.scope).key
    files, more = await asyncio.to_thread(file_store.files, key, after, most, order, purpose)
    return json_response(list_object([file_object(file) for file in files], more))


async def get_file(request: Request) -> Response:
    """What is known of one file."""
    return json_response(file_object(await _file(request)))


async def get_content(request: Request) -> Response:
    """What is in it."""
    file = await _file(request)
    place = manager_of(request).file_store.contents(file.id)
    request.scope["headers"] = [header for header in request.scope["headers"] if header[0] not in _PARTS]
    return FileResponse(place, media_type="application/octet-stream")


async def delete(request: Request) -> Response:
    """Remove one file."""
    file = await _file(request)
    await asyncio.to_thread(manager_of(request).file_store.remove, file.key, file.id)
    return json_response({"id": file.id, "object": "file", "deleted": True})


def _expiry_seconds(fields: dict[str, str]) -> int | None:
    """Seconds that a file is kept, as OpenAI's clients say it; None: until it is deleted."""
    if ANCHOR not in fields and SECONDS not in fields:
        return None
    if fields.get(ANCHOR) != "created_at":
        raise RequestError(f"'{ANCHOR}' must be 'created_at'.", param=ANCHOR)
    seconds = fields.get(SECONDS, "")
    if not (seconds.isascii() and seconds.isdigit() and SHORTEST <= int(seconds) <= LONGEST):
        raise RequestError(f"'{SECONDS}' must be a whole number from {SHORTEST} to {LONGEST}.", param=SECONDS)
    return int(seconds)


def file_object(file: StoredFile) -> dict[str, Any]:
    """The API's file object."""
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
    """The API's list object."""
    first, last = (items[0]["id"], items[-1]["id"]) if items else (None, None)
    return {"object": "list", "data": items, "first_id": first, "last_id": last, "has_more": more}


def manager_of(request: Request) -> BatchManager:
    """The server's batches."""
    service: Service = request.app.state.service
    assert service.batches is not None  # a process without a server has nobody who asks
    return service.batches


async def _file(request: Request) -> StoredFile:
    file_store = manager_of(request).file_store
    if not file_store.exists:
        raise check_exists("file")
    return await asyncio.to_thread(file_store.file, request_context_of(request.scope).key, request.path_params["id"])


def check_exists(kind: str) -> RequestError:
    """There is nothing of that ID, and no folder is made to find that out."""
    return RequestError(f"There is no {kind} of that ID.", code="not_found", status=404)
