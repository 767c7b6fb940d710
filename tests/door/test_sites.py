"""Nobody gets in by another name: every route asks for the key, whatever the path looks like and whoever sends it."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest
from wire import Hall, application, get

from afterword.api.app import GUARDED, OPEN

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
PATHS = [route.path.replace("{model:path}", "some/model") for route in (*GUARDED, *OPEN)]
OPEN_PATHS = [route.path for route in OPEN]
TRICKS = {
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
    "behind an open one": lambda path: "/health/.." + path,
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


async def statuses(hall: Hall, *requests: bytes) -> list[int]:
    found = []
    for request in requests:
        visitor = hall.visitor()
        await visitor.say(request)
        (status,) = visitor.statuses
        found.append(status)
        visitor.leave()
    return found


@pytest.mark.parametrize("trick", TRICKS)
def test_without_a_key_only_two_paths_are_open(trick: str) -> None:
    async def scenario() -> dict[tuple[str, str], int]:
        hall = Hall(application())
        pairs = [(method, TRICKS[trick](path)) for method, path in itertools.product(METHODS, PATHS)]
        pairs = [pair for pair in pairs if pair[1] not in OPEN_PATHS]
        found = await statuses(hall, *(get(path, *OVERRIDES, method=method, key=None) for method, path in pairs))
        return dict(zip(pairs, found, strict=True))

    found = asyncio.run(scenario())
    let_in = {pair for pair, status in found.items() if status not in (400, 401, 404, 405)}
    # The open ones under another spelling of the very same path are no more than open.
    assert all(path.replace("%68", "h").replace("%72", "r").partition("?")[0] in OPEN_PATHS for _, path in let_in)
    assert not any("v1" in path or "token" in path for _, path in let_in)


@pytest.mark.parametrize("path", OPEN_PATHS)
def test_the_open_ones_say_nothing_to_other_methods(path: str) -> None:
    found = asyncio.run(statuses(Hall(application()), *(get(path, method=method, key=None) for method in METHODS)))
    assert dict(zip(METHODS, found, strict=True)) == {
        method: 200 if method in ("GET", "HEAD") else 405 for method in METHODS
    }


def hosts(*names: str, **settings: Any) -> list[int]:
    return asyncio.run(statuses(Hall(application(**settings)), *(get("/version", host=name) for name in names)))


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
BAD = ("a b", "localhost/x", "localhost:x", "[::1", "a@localhost", "")


def test_without_keys_only_addresses_and_known_names_are_answered_to() -> None:
    """A name can be made to point here by a page in somebody's browser; an address cannot."""
    assert set(hosts(*LOCAL, keys=False)) == {200}
    assert set(hosts(*NAMES, *BAD, keys=False)) == {400}
    assert hosts("mine.example:80", "Mine.Example", "evil.example", keys=False, allowed_hosts=("mine.example",)) == [
        200,
        200,
        400,
    ]
    assert set(hosts(*LOCAL, *NAMES, keys=False, allowed_hosts=("*",))) == {200}
    assert hosts("my-box", "other", keys=False, host="my-box", allow_open=True) == [200, 400]


def test_with_keys_any_name_will_do_unless_some_are_chosen() -> None:
    assert set(hosts(*LOCAL, *NAMES)) == {200}
    assert set(hosts(*BAD)) == {400}
    assert hosts("mine.example", "evil.example", "localhost", allowed_hosts=("mine.example",)) == [200, 400, 200]


def origins(*names: str, method: str = "POST", host: str = "192.168.1.7:8000", **settings: Any) -> list[int]:
    requests = (get("/v1/completions", f"Origin: {name}", method=method, host=host) for name in names)
    return asyncio.run(statuses(Hall(application(**settings)), *requests))


def test_without_keys_a_foreign_page_changes_nothing() -> None:
    foreign = ("https://evil.example", "null", "http://localhost.evil.example", "http://192.168.1.8:8000", "file://")
    assert set(origins(*foreign, keys=False)) == {403}
    allowed = ("http://localhost:3000", "http://127.0.0.1", "http://192.168.1.7:8000", "https://mine.example")
    assert 403 not in origins(*allowed, keys=False, cors_origins=("https://mine.example",))
    assert 403 not in origins(*foreign, method="GET", keys=False)


def test_with_keys_any_page_that_has_one_may() -> None:
    assert 403 not in origins("https://evil.example", "null")
