"""Error responses for requests that never reach the application, as the bytes of whole HTTP responses."""

from __future__ import annotations

import json
from dataclasses import dataclass
from http import HTTPStatus


@dataclass(frozen=True)
class ErrorResponse(Exception):
    """A response after which the connection reads nothing more. It contains nothing of the request.

    The parser's callbacks raise it to reject a request.
    """

    status: int
    message: str
    type: str = "invalid_request_error"
    code: str | None = None
    retry_after: int | None = None

    @property
    def response(self) -> bytes:
        """The bytes of the response, with OpenAI's error object as its body."""
        error = {"message": self.message, "type": self.type, "param": None, "code": self.code}
        body = json.dumps({"error": error}, separators=(",", ":")).encode()
        retry = f"retry-after: {self.retry_after}\r\n" if self.retry_after is not None else ""
        head = (
            f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n{retry}x-content-type-options: nosniff\r\nconnection: close\r\n\r\n"
        )
        return head.encode() + body


NOT_HTTP = ErrorResponse(400, "This is not a valid HTTP/1.1 request.")
INVALID_TARGET = ErrorResponse(400, "The request target must be a path of visible ASCII characters that begins with /.")
INVALID_HOST = ErrorResponse(400, "The request must have exactly one Host header.")
UNKNOWN_TRANSFER_CODING = ErrorResponse(400, "The only supported transfer coding is 'chunked', in HTTP/1.1.")
TRAILERS_NOT_ACCEPTED = ErrorResponse(400, "Trailers (headers after the body) are not supported.")
FRAMING_TOO_LARGE = ErrorResponse(400, "The chunks of the body are too small, or their extensions are too large.")
VERSION_NOT_SUPPORTED = ErrorResponse(505, "This server supports HTTP/1.1 and HTTP/1.0.")
HEAD_TOO_LARGE = ErrorResponse(431, "The request's headers are too large, or there are too many of them.")
REQUEST_TIMEOUT = ErrorResponse(408, "The request did not arrive in time.", code="request_timeout")
TOO_MANY_CONNECTIONS = ErrorResponse(
    503, "Too many connections are open. Please try again later.", "server_error", "too_many_connections", 2
)
