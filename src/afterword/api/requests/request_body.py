"""Reads JSON bodies up to the limit `max_body`."""

from __future__ import annotations

from starlette.requests import Request

from afterword.errors import RequestError


async def read_json(request: Request) -> bytes:
    """The bytes of a JSON body. Raises `RequestError` for another media type, a compressed or a too large body."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(
            "The body must be JSON, and the request must have the header 'Content-Type: application/json'.", status=400
        )
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise RequestError("The body must not be compressed: send it without the header Content-Encoding.", status=415)
    limit: int = request.app.state.service.config.transport.max_body
    too_large = RequestError(f"The body is larger than {limit} bytes.", status=413)
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limit:
        raise too_large
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise too_large
    return bytes(body)
