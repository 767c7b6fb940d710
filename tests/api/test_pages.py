"""The playground's files as they are sent: to anyone who may know this server, and nothing but them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from completion_requests import problem
from starlette.routing import Route

from afterword.api.app import PROTECTED_ROUTES, PUBLIC_ROUTES
from afterword.api.middleware.authentication import ProtectedRoute
from afterword.api.routes.static_pages import MEDIA_TYPES, PLAYGROUND, fields, routes
from afterword.completion.request import EXTENSIONS, FIELDS
from afterword.completion.request_limits import RequestLimits

FILES = sorted(path.name for path in PLAYGROUND.iterdir() if path.suffix in MEDIA_TYPES and path.suffix != ".html")


@pytest.fixture(scope="module")
def stranger(server: Any) -> Iterator[httpx.Client]:
    """A client that shows no key, to a server that has some."""
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        yield client


def test_routes_are_guarded_but_for_these(server: Any) -> None:
    assert all(type(route) is ProtectedRoute for route in PROTECTED_ROUTES)
    assert {route.path for route in PUBLIC_ROUTES} == {"/health", "/ready"}
    assert {route.path for route in routes(RequestLimits())} == {"/", "/docs", "/playground/{file}"}
    assert all(type(route) is Route and route.methods == {"GET", "HEAD"} for route in routes(RequestLimits()))


@pytest.mark.parametrize("path", ["/", *(f"/playground/{name}" for name in FILES), "/playground/fields.json"])
def test_files_need_no_key_and_are_asked_for_again_cheaply(stranger: httpx.Client, path: str) -> None:
    response = stranger.get(path)
    assert response.status_code == 200
    assert response.headers["content-security-policy"].startswith("default-src 'self'; ")
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cache-control"] == "no-cache"
    assert stranger.head(path).headers["content-length"] == str(len(response.content))
    for known in (response.headers["etag"], f'"other", W/{response.headers["etag"]}'):
        again = stranger.get(path, headers={"If-None-Match": known})
        assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(
    "path",
    [
        "/playground/",
        "/playground/index.html",
        "/playground/none.js",
        "/playground/../api/app.py",
        "/playground/%2e%2e%2fapi%2fapp.py",
        "/playground/__init__.py",
        "/playground",
        "/index.html",
    ],
)
def test_nothing_else_is_there(stranger: httpx.Client, server: Any, path: str) -> None:
    assert problem(stranger.get(server.url + path), 404)["code"] == "unknown_url"


def test_pages_are_only_read_and_only_under_known_names(stranger: httpx.Client, serve: Any) -> None:
    assert problem(stranger.post("/"), 405)["code"] == "method_not_supported"
    with serve(key=None) as server, server.http() as client:
        assert client.get("/").status_code == 200
        assert problem(client.get("/", headers={"Host": "evil.example"}), 400)["code"] == "unknown_host"


def test_the_page_is_told_which_fields_the_server_takes(stranger: httpx.Client) -> None:
    told = stranger.get("/playground/fields.json").json()
    assert set(told) == set(FIELDS) | set(EXTENSIONS)
    assert told["n"] == {"type": "integer", "minimum": 1, "maximum": 128}
    assert "continuous_usage_stats" in told["stream_options"]["members"]
    assert set(fields(RequestLimits(strict=True))) == set(FIELDS)
