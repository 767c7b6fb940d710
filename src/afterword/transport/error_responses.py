"""What is answered to requests that never reach the application, as the bytes of whole responses."""

from __future__ import annotations

import json
from dataclasses import dataclass
from http import HTTPStatus


@dataclass(frozen=True)
class ErrorResponse(Exception):
    """A response after which nothing more is read from the connection. Nothing of the request is in it."""

    status: int
    message: str
    type: str = "invalid_request_error"
    code: str | None = None
    retry_after: int | None = None

    @property
    def response(self) -> bytes:
        """The response, in the shape of all errors."""
        error = {"message": self.message, "type": self.type, "param": None, "code": self.code}
        body = json.dumps({"error": error}, separators=(",", ":")).encode()
        retry = f"retry-after: {self.retry_after}\r\n" if self.retry_after is not None else ""
        head = (
            f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n{retry}x-content-type-options: nosniff\r\nconnection: close\r\n\r\n"
        )
        return head.encode() + body


NOT_HTTP = ErrorResponse(400, "This is not a valid HTTP/1.1 request.")
INVALID_TARGET = ErrorResponse(400, "The target of a request must be a path: visible ASCII that begins with a slash.")
INVALID_HOST = ErrorResponse(400, "A request must have exactly one Host header.")
UNKNOWN_TRANSFER_CODING = ErrorResponse(400, "The only transfer coding that is understood is 'chunked', in HTTP/1.1.")
TRAILERS_NOT_ACCEPTED = ErrorResponse(400, "Headers after a body are not accepted.")
FRAMING_TOO_LARGE = ErrorResponse(400, "The body comes in chunks that are too small or have too large extensions.")
VERSION_NOT_SUPPORTED = ErrorResponse(505, "This server speaks HTTP/1.1.")
HEAD_TOO_LARGE = ErrorResponse(431, "The request's headers are too large or too many.")
REQUEST_TIMEOUT = ErrorResponse(408, "The request did not come in time.", code="request_timeout")
TOO_MANY_CONNECTIONS = ErrorResponse(
    503, "Too many connections. Please try again later.", "server_error", "too_many_connections", 2
)
