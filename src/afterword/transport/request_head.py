"""Checks of a request's line and headers beyond those of the parser. Pure.

They reject each request that a proxy and this server could read differently, since an attacker can smuggle a second
request past the proxy in such a request.
"""

from __future__ import annotations

import re

from afterword.transport import error_responses

_TARGET = re.compile(rb"/[!-\"$-~]*")
"""Visible ASCII that begins with a slash and has no fragment. It excludes an absolute URL and `*`."""


def check_head(method: bytes, target: bytes, version: str, headers: list[tuple[bytes, bytes]]) -> None:
    """Check a request head. The names of `headers` are in lower case. Raises `ErrorResponse`."""
    if version not in ("1.1", "1.0"):
        raise error_responses.VERSION_NOT_SUPPORTED
    if method == b"CONNECT" or not _TARGET.fullmatch(target):
        raise error_responses.INVALID_TARGET
    hosts = 0
    for name, value in headers:
        if name == b"host":
            hosts += 1
        elif name == b"transfer-encoding" and (value.lower() != b"chunked" or version == "1.0"):
            raise error_responses.UNKNOWN_TRANSFER_CODING
    if hosts > 1 or (not hosts and version == "1.1"):
        raise error_responses.INVALID_HOST
