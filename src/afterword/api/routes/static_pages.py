"""The files of the playground and of the page `/docs`. They contain no data, so their routes need no API key.

`routes` reads the files once at the start; a request never reads the disk. `fields.json` is generated from the request
parsers. The Content-Security-Policy allows the pages to load from and to send requests to their own origin only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from afterword.api.responses import serialization
from afterword.completion.request import schema
from afterword.completion.request_limits import RequestLimits

PLAYGROUND = Path(__file__).resolve().parents[2] / "playground"
INDEX, DOCS, FIELDS = "index.html", "docs.html", "fields.json"
MEDIA_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".json": "application/json",
    ".svg": "image/svg+xml",
}
SHOWN_KEYWORDS = ("type", "minimum", "maximum")
POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"


@dataclass(frozen=True, slots=True)
class Page:
    """The body and the headers of one file."""

    body: bytes
    headers: Mapping[str, str]


def routes(limits: RequestLimits) -> tuple[Route, ...]:
    """The routes of the playground (`/`), of the API page (`/docs`) and of the files that both load."""
    pages = {
        path.name: _page(path.name, path.read_bytes()) for path in PLAYGROUND.iterdir() if path.suffix in MEDIA_TYPES
    }
    pages[FIELDS] = _page(FIELDS, serialization.encode(fields(limits)))
    index, docs = pages.pop(INDEX), pages.pop(DOCS)

    async def page(request: Request) -> Response:
        return _respond(request, index)

    async def reference(request: Request) -> Response:
        return _respond(request, docs)

    async def file(request: Request) -> Response:
        found = pages.get(request.path_params["file"])
        if found is None:
            raise HTTPException(404)
        return _respond(request, found)

    return (
        Route("/", page, methods=["GET"]),
        Route("/docs", reference, methods=["GET"]),
        Route("/playground/{file}", file, methods=["GET"]),
    )


def fields(limits: RequestLimits) -> dict[str, Any]:
    """The fields of a request, by name, with their types and ranges."""
    return {name: _range(described) for name, described in schema(limits)["properties"].items()}


def _range(described: dict[str, Any]) -> dict[str, Any]:
    """The type and range of a field without null; for an object, also the names of its members."""
    plain = [schema for schema in described.get("anyOf", [described]) if schema.get("type") != "null"]
    found = {key: plain[0][key] for key in SHOWN_KEYWORDS if key in plain[0]} if len(plain) == 1 else {}
    members = sorted(plain[0].get("properties", {}))
    return found | ({"members": members} if members else {})


def _page(name: str, body: bytes) -> Page:
    headers = {
        "content-type": f"{MEDIA_TYPES[Path(name).suffix]}; charset=utf-8",
        "etag": f'"{hashlib.blake2b(body, digest_size=12).hexdigest()}"',
        "cache-control": "no-cache",  # cached, but revalidated each time, so that a new version appears at once
        "content-security-policy": POLICY,
        "referrer-policy": "no-referrer",
    }
    return Page(body, headers)


def _respond(request: Request, page: Page) -> Response:
    known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    if page.headers["etag"] in known:
        return Response(status_code=304, headers=dict(page.headers))
    return Response(page.body, headers=dict(page.headers))
