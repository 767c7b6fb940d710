"""Keys, host check and CORS: every protected route requires a key, also for unusual spellings of its path."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any
from unittest.mock import Mock

import pytest
from in_memory_connection import InMemoryServer, application, get

from afterword.api.app import PROTECTED_ROUTES, PUBLIC_ROUTES
from afterword.config import Config
from afterword.engine.parent.model_manager import ModelDefinition, ModelManager
from afterword.errors import SettingError

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
PATHS = [route.path.replace("{model:path}", "some/model") for route in (*PROTECTED_ROUTES, *PUBLIC_ROUTES)]
PUBLIC_PATHS = [route.path for route in PUBLIC_ROUTES]
PATH_VARIANTS = {
    "plain": lambda path: path,
    "double slash": lambda path: "/" + path,
    "double slash within": lambda path: path.replace("/", "//"),
    "dot": lambda path: "/." + path,
    "dots": lambda path: "/x/.." + path,
    "encoded dots": lambda path: "/x/%2e%2e" + path,
    "encoded letter": lambda path: f"/%{ord(path[1]):02x}{path[2:]}",
    "encoded slash": lambda path: "/" + path[1:].replace("/", "%2f"),
    "upper case": str.upper,
    "trailing slash": lambda path: path + "/",
    "trailing dot": lambda path: path + "/.",
    "query": lambda path: path + "?key=x",
    "parameter": lambda path: path + ";x",
    "nul": lambda path: path + "%00",
    "after a public path": lambda path: "/health/.." + path,
    "absolute": lambda path: "http://127.0.0.1" + path,
    "backslash": lambda path: path.replace("/", "\\"),
    "fragment": lambda path: "/health#" + path,
}
OVERRIDES = (
    "X-HTTP-Method-Override: GET",
    "X-Original-URL: /health",
    "X-Rewrite-URL: /health",
    "X-Forwarded-For: 127.0.0.1",
)


async def statuses(server: InMemoryServer, *requests: bytes) -> list[int]:
    found = []
    for request in requests:
        client = server.connect()
        await client.send(request)
        (status,) = client.statuses
        found.append(status)
        client.disconnect()
    return found


@pytest.mark.parametrize("variant", PATH_VARIANTS)
def test_without_a_key_only_public_paths_are_answered(variant: str) -> None:
    async def scenario() -> dict[tuple[str, str], int]:
        server = InMemoryServer(application())
        pairs = [(method, PATH_VARIANTS[variant](path)) for method, path in itertools.product(METHODS, PATHS)]
        pairs = [pair for pair in pairs if pair[1] not in PUBLIC_PATHS]
        found = await statuses(server, *(get(path, *OVERRIDES, method=method, key=None) for method, path in pairs))
        return dict(zip(pairs, found, strict=True))

    found = asyncio.run(scenario())
    answered = {pair for pair, status in found.items() if status not in (400, 401, 404, 405)}
    # another spelling of a public path may be answered too
    assert all(path.replace("%68", "h").replace("%72", "r").partition("?")[0] in PUBLIC_PATHS for _, path in answered)
    assert not any("v1" in path or "token" in path for _, path in answered)


@pytest.mark.parametrize("path", PUBLIC_PATHS)
def test_public_routes_accept_get_and_head_only(path: str) -> None:
    found = asyncio.run(
        statuses(InMemoryServer(application()), *(get(path, method=method, key=None) for method in METHODS))
    )
    assert dict(zip(METHODS, found, strict=True)) == {
        method: 200 if method in ("GET", "HEAD") else 405 for method in METHODS
    }


def hosts(*names: str, **settings: Any) -> list[int]:
    return asyncio.run(
        statuses(InMemoryServer(application(**settings)), *(get("/version", host=name) for name in names))
    )


LOCAL = (
    "localhost",
    "localhost:8000",
    "LOCALHOST",
    "127.0.0.1:1",
    "[::1]:8000",
    "192.168.1.7",
    "[fe80::1]",
    "localhost.",
)
NAMES = ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "mine.example")
INVALID_HOSTS = ("a b", "localhost/x", "localhost:x", "[::1", "a@localhost", "")


def test_without_keys_only_addresses_and_allowed_hosts_are_accepted() -> None:
    """A web page can make a host name of its own resolve to this machine, but it cannot do so with an address."""
    assert set(hosts(*LOCAL, keys=False)) == {200}
    assert set(hosts(*NAMES, *INVALID_HOSTS, keys=False)) == {400}
    assert hosts("mine.example:80", "Mine.Example", "evil.example", keys=False, allowed_hosts=("mine.example",)) == [
        200,
        200,
        400,
    ]
    assert set(hosts(*LOCAL, *NAMES, keys=False, allowed_hosts=("*",))) == {200}
    assert hosts("my-box", "other", keys=False, host="my-box", allow_open=True) == [200, 400]


def test_with_keys_any_host_is_accepted_unless_some_are_allowed() -> None:
    assert set(hosts(*LOCAL, *NAMES)) == {200}
    assert set(hosts(*INVALID_HOSTS)) == {400}
    assert hosts("mine.example", "evil.example", "localhost", allowed_hosts=("mine.example",)) == [200, 400, 200]


def origins(*names: str, method: str = "POST", host: str = "192.168.1.7:8000", **settings: Any) -> list[int]:
    requests = (get("/v1/completions", f"Origin: {name}", method=method, host=host) for name in names)
    return asyncio.run(statuses(InMemoryServer(application(**settings)), *requests))


def test_without_keys_a_foreign_page_changes_nothing() -> None:
    foreign = ("https://evil.example", "null", "http://localhost.evil.example", "http://192.168.1.8:8000", "file://")
    assert set(origins(*foreign, keys=False)) == {403}
    allowed = ("http://localhost:3000", "http://127.0.0.1", "http://192.168.1.7:8000", "https://mine.example")
    assert 403 not in origins(*allowed, keys=False, cors_origins=("https://mine.example",))
    assert 403 not in origins(*foreign, method="GET", keys=False)


def test_with_keys_any_origin_is_accepted() -> None:
    assert 403 not in origins("https://evil.example", "null")


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("path", ["/tokenizer_info?model=m", "/tokenizer_info", "/v1/models/m", "/ready", "/metrics"])
def test_no_get_loads_a_model_without_a_key(method: str, path: str) -> None:
    """Any web page can make a browser send a GET: an image, a link, a frame."""
    make = Mock(side_effect=SettingError("It would have been loaded."))

    async def scenario(keys: bool) -> bytes:
        models = ModelManager([ModelDefinition("m", 0, make)], keep_alive=60)
        response = await InMemoryServer(application(models, keys=keys)).connect().send(get(path, method=method))
        await models.close()
        return response

    response = asyncio.run(scenario(keys=False))
    assert not make.called
    if path.startswith("/tokenizer_info"):
        assert b" 503 " in response
        assert method == "HEAD" or b"POST /tokenize" in response
        asyncio.run(scenario(keys=True))
        assert make.called


# ---- CORS preflight requests


def headers_of(response: bytes) -> dict[str, str]:
    lines = response.partition(b"\r\n\r\n")[0].decode().split("\r\n")[1:]
    return {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}


def preflight(origin: str, wanted: str, **settings: Any) -> dict[str, str]:
    headers = (f"Origin: {origin}", "Access-Control-Request-Method: POST", f"Access-Control-Request-Headers: {wanted}")

    async def scenario() -> bytes:
        return (
            await InMemoryServer(application(**settings))
            .connect()
            .send(get("/v1/completions", *headers, method="OPTIONS"))
        )

    return headers_of(asyncio.run(scenario()))


@pytest.mark.parametrize(
    "wanted",
    [
        "authorization,content-type",
        "openai-organization,openai-project,x-request-id,x-title,cache-control",
        "x-stainless-arch,x-stainless-lang,x-stainless-os,x-stainless-retry-count,x-stainless-timeout",
    ],
)
def test_an_allowed_page_may_send_any_header(wanted: str) -> None:
    for settings in ({}, {"keys": False}, {"keys": False, "cors_origins": ("https://mine.example",)}):
        origin = "https://mine.example" if settings.get("cors_origins") else "http://localhost:3000"
        response = preflight(origin, wanted, **settings)
        assert response["access-control-allow-headers"] == wanted
        assert response["access-control-allow-origin"] in ("*", origin)


def test_a_preflight_of_a_foreign_page_allows_nothing() -> None:
    assert "access-control-allow-origin" not in preflight("https://evil.example", "x-title", keys=False)


@pytest.mark.parametrize(
    "origin",
    [
        *(
            "https://mine.example/",
            "https://Mine.example",
            "mine.example",
            "https://mine.example/page",
            "localhost:3000",
        ),
        *("https://mine.example:443", "http://mine.example:80", "https://", "https://a b", "https://x:0", "", "**"),
    ],
)
def test_an_invalid_origin_is_refused_at_the_start(origin: str) -> None:
    with pytest.raises(SettingError, match="write SCHEME://HOST"):
        Config(cors_origins=("https://mine.example", origin))


def test_origins_of_all_kinds_are_accepted() -> None:
    origins = ("*", "null", "https://mine.example", "http://[::1]:3000", "app://obsidian.md", "chrome-extension://abc")
    assert Config(cors_origins=origins).cors_origins == origins


# ---- methods


def test_a_405_lists_all_methods_of_the_path() -> None:
    paths: dict[str, set[str]] = {}
    for route in (*PROTECTED_ROUTES, *PUBLIC_ROUTES):
        paths.setdefault(route.path, set()).update(route.methods or ())

    async def scenario(path: str) -> bytes:
        target = path.replace("{model:path}", "some/model").replace("{id}", "file-1")
        return await InMemoryServer(application()).connect().send(get(target, method="PUT"))

    assert len(paths) > 12
    for path, methods in paths.items():
        response = asyncio.run(scenario(path))
        assert response.startswith(b"HTTP/1.1 405 "), path
        assert headers_of(response)["allow"] == ", ".join(sorted(methods)), path
    assert paths["/v1/files/{id}"] == {"GET", "HEAD", "DELETE"}
