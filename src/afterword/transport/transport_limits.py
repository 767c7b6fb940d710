"""The limits on connections and on the parts of a request, before the application sees it."""

from __future__ import annotations

from dataclasses import dataclass

from afterword.settings.limit_table import limit

UPLOAD_PATHS = (b"/v1/files",)
"""Paths to which file uploads are posted: bodies may take `upload_seconds` there instead of `body_seconds`."""


@dataclass(frozen=True, slots=True)
class TransportLimits:
    """The table of limits. Sizes are in bytes, times in seconds, rates in bytes a second."""

    max_connections: int = limit(1024, "open connections")
    max_per_peer: int | None = limit(
        None, "open connections from one address (64 where other machines can connect, else no separate limit)"
    )
    max_head: int = limit(32 * 1024, "bytes of a request line and its headers")
    max_headers: int = limit(100, "headers of a request")
    max_body: int = limit(8 * 2**20, "bytes of a request body")
    max_framing: int = limit(64 * 1024, "bytes of chunk framing beyond the size of a chunked body")
    head_seconds: float = limit(10.0, "seconds to receive a request line and headers")
    body_seconds: float = limit(30.0, "seconds to receive a request body")
    upload_seconds: float = limit(600.0, "seconds to receive an uploaded file")
    body_grace: float = limit(5.0, "seconds before body_rate applies to a body")
    body_rate: int = limit(1024, "bytes per second that a body must keep at least")
    idle_seconds: float = limit(130.0, "seconds between two requests on a connection; more than proxies keep one open")
    stall_seconds: float = limit(30.0, "seconds in which a client reads nothing of a response")
    rest_seconds: float = limit(5.0, "seconds to receive the rest of a body after its response")
