"""The static files of the playground over HTTP: public, cacheable, and no other files."""

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
def anonymous(server: Any) -> Iterator[httpx.Client]:
    """A client without an API key, on a server with keys."""
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        yield client


def test_all_routes_but_these_are_protected(server: Any) -> None:
    assert all(type(route) is ProtectedRoute for route in PROTECTED_ROUTES)
    assert {route.path for route in PUBLIC_ROUTES} == {"/health", "/ready"}
    assert {route.path for route in routes(RequestLimits())} == {"/", "/docs", "/playground/{file}"}
    assert all(type(route) is Route and route.methods == {"GET", "HEAD"} for route in routes(RequestLimits()))


@pytest.mark.parametrize("path", ["/", *(f"/playground/{name}" for name in FILES), "/playground/fields.json"])
def test_static_files_need_no_key_and_can_be_revalidated(anonymous: httpx.Client, path: str) -> None:
    response = anonymous.get(path)
    assert response.status_code == 200
    assert response.headers["content-security-policy"].startswith("default-src 'self'; ")
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cache-control"] == "no-cache"
    assert anonymous.head(path).headers["content-length"] == str(len(response.content))
    for known in (response.headers["etag"], f'"other", W/{response.headers["etag"]}'):
        again = anonymous.get(path, headers={"If-None-Match": known})
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
def test_other_paths_are_unknown(anonymous: httpx.Client, server: Any, path: str) -> None:
    assert problem(anonymous.get(server.url + path), 404)["code"] == "unknown_url"


def test_pages_need_get_and_an_allowed_host(anonymous: httpx.Client, serve: Any) -> None:
    assert problem(anonymous.post("/"), 405)["code"] == "method_not_supported"
    with serve(key=None) as server, server.http() as client:
        assert client.get("/").status_code == 200
        assert problem(client.get("/", headers={"Host": "evil.example"}), 400)["code"] == "unknown_host"


def test_fields_json_lists_the_fields_of_requests(anonymous: httpx.Client) -> None:
    described = anonymous.get("/playground/fields.json").json()
    assert set(described) == set(FIELDS) | set(EXTENSIONS)
    assert described["n"] == {"type": "integer", "minimum": 1, "maximum": 128}
    assert "continuous_usage_stats" in described["stream_options"]["members"]
    assert set(fields(RequestLimits(strict=True))) == set(FIELDS)
