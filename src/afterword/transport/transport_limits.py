"""How much one connection may cost, before anything is known of who it is."""

from __future__ import annotations

from dataclasses import dataclass

from afterword.settings.limit_table import limit

UPLOAD_PATHS = (b"/v1/files",)
"""Paths to which bodies may be posted for as long as a file takes."""


@dataclass(frozen=True, slots=True)
class TransportLimits:
    """Sizes in bytes, times in seconds."""

    max_connections: int = limit(1024, "connections at once")
    max_per_peer: int | None = limit(
        None, "of them from one address (64 where other machines can connect, else as many as there may be)"
    )
    max_head: int = limit(32 * 1024, "bytes of a request's line and headers")
    max_headers: int = limit(100, "headers of a request")
    max_body: int = limit(8 * 2**20, "bytes of a request's body")
    max_framing: int = limit(64 * 1024, "bytes that the framing of a body in chunks may be larger than the body")
    head_seconds: float = limit(10.0, "seconds for a request's line and headers")
    body_seconds: float = limit(30.0, "seconds for a request's body")
    upload_seconds: float = limit(600.0, "seconds for a file that is uploaded")
    body_grace: float = limit(5.0, "seconds before a body has to come at body_rate")
    body_rate: int = limit(1024, "bytes a second, at least, of a body")
    idle_seconds: float = limit(130.0, "seconds between two requests on one connection, more than proxies keep one")
    stall_seconds: float = limit(30.0, "seconds in which a reader takes nothing of an answer")
    rest_seconds: float = limit(5.0, "seconds for what still comes of a body that has been answered already")
