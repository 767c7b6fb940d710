"""Refuses requests with an unknown `Host` header or, where they change something, with an `Origin` not allowed.

A web page can make a browser send requests to this server in two ways: with a domain name of its own that resolves to
this machine (DNS rebinding; the check of `Host` prevents it), or across sites (the check of `Origin` prevents it).
"""

from __future__ import annotations

import ipaddress
import re

from starlette.types import ASGIApp, Receive, Scope, Send

from afterword.api.requests.request_recorder import recorder_of
from afterword.api.responses.error_response import error_response
from afterword.config import Config
from afterword.errors import RequestError

LOCAL_PAGES = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"
"""A regular expression for the origins of web pages that this machine serves."""

_HOST = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(?::\d{1,5})?")
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


class HostCheck:
    """ASGI middleware that refuses these requests with an error and passes on all others."""

    def __init__(self, app: ASGIApp, config: Config) -> None:
        self._app = app
        self._names = {name.lower() for name in (*config.allowed_hosts, config.host, "localhost")}
        self._any_name = "*" in self._names or (config.requires_key and not config.allowed_hosts)
        self._origins = {*config.cors_origins}
        self._any_origin = config.requires_key or "*" in self._origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = self._find_error(scope) if scope["type"] == "http" else None
        if problem is not None:
            recorder_of(scope).record_error(problem)
        await (error_response(problem) if problem else self._app)(scope, receive, send)

    def _find_error(self, scope: Scope) -> RequestError | None:
        host = origin = None
        for name, value in scope["headers"]:
            if name == b"host":
                host = value.decode("latin-1")
            elif name == b"origin":
                origin = value.decode("latin-1")
        if host is not None and not self._is_known_host(host):
            return RequestError(
                "This server does not allow the name in the Host header. Its operator can add it with --allowed-host.",
                code="unknown_host",
            )
        if origin is not None and scope["method"] not in _SAFE_METHODS and not self._allows_origin(origin, host):
            return RequestError(
                "The web page in the Origin header may not send this request. The server's operator can allow it with "
                "--cors-origin.",
                code="foreign_origin",
                status=403,
            )
        return None

    def _is_known_host(self, host: str) -> bool:
        """An IP address is always allowed: only a name can be made to resolve to this machine by its owner."""
        parsed = _HOST.fullmatch(host)
        if parsed is None:
            return False
        name = parsed["name"].lower().removesuffix(".")
        return self._any_name or name in self._names or _is_address(name.strip("[]"))

    def _allows_origin(self, origin: str, host: str | None) -> bool:
        return (
            self._any_origin
            or origin in self._origins
            or re.fullmatch(LOCAL_PAGES, origin) is not None
            or (host is not None and origin in (f"http://{host}", f"https://{host}"))  # a page that this server sent
        )


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
