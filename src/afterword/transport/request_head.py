"""What a request's line and headers must be like, beyond what the parser sees to. Pure.

Whatever two readers could understand differently is refused: that is how requests are smuggled past a proxy.
"""

from __future__ import annotations

import re

from afterword.transport import error_responses

_TARGET = re.compile(rb"/[!-\"$-~]*")
"""Visible ASCII without a fragment, from a slash on: no other server's address, no `*`."""


def check_head(method: bytes, target: bytes, version: str, headers: list[tuple[bytes, bytes]]) -> None:
    """Refuse what is not clear. Names of headers are in lower case. Raises `Refusal`."""
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
