"""API keys, limits of request bodies, error responses of routing, and CORS."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from completion_requests import complete, problem

LIMIT = 8 * 2**20
PUBLIC = ("/health", "/ready")
PROTECTED = (
    ("POST", "/v1/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/some/model"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
    ("GET", "/tokenizer_info"),
    ("GET", "/version"),
)
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def anonymous(server: Any) -> Iterator[httpx.Client]:
    """A client without an API key."""
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        yield client


@pytest.mark.parametrize("path", PUBLIC)
def test_a_load_balancer_needs_no_key(anonymous: httpx.Client, path: str) -> None:
    assert anonymous.get(path).status_code == 200


@pytest.mark.parametrize(("method", "path"), PROTECTED, ids=[path for _, path in PROTECTED])
def test_every_other_route_needs_a_key(anonymous: httpx.Client, method: str, path: str) -> None:
    response = anonymous.request(method, path)
    assert problem(response, 401)["message"].startswith("You didn't provide an API key.")
    assert response.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize(("allowed", "path"), PROTECTED, ids=[path for _, path in PROTECTED])
def test_every_method_needs_a_key(anonymous: httpx.Client, allowed: str, path: str) -> None:
    for method in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"} - {allowed}:
        assert anonymous.request(method, path).status_code == 401, method


@pytest.mark.parametrize("path", ["/v1//completions", "/V1/completions", "/v1/completions/", "//tokenize", "/health/"])
def test_a_path_similar_to_a_route_needs_a_key_or_is_unknown(anonymous: httpx.Client, server: Any, path: str) -> None:
    for method in ("GET", "POST"):
        assert anonymous.request(method, server.url + path).status_code in (401, 404)


@pytest.mark.parametrize("scheme", ["Bearer ", "bearer ", "BEARER ", "Bearer   "], ids=repr)
def test_the_authorization_scheme_ignores_case(anonymous: httpx.Client, server: Any, scheme: str) -> None:
    response = anonymous.get("/version", headers={"Authorization": scheme + server.key})
    assert response.status_code == 200


@pytest.mark.parametrize("header", ["", "Bearer", "Basic {key}", "{key}", "Token {key}", "Bearer{key}"])
def test_other_authorization_schemes_are_no_key(anonymous: httpx.Client, server: Any, header: str) -> None:
    error = problem(anonymous.get("/version", headers={"Authorization": header.format(key=server.key)}), 401)
    assert error["code"] is None


def test_an_empty_bearer_token_is_no_key(server: Any) -> None:
    assert status_for_an_empty_bearer(server.url) == 401


def status_for_an_empty_bearer(url: str) -> int:
    """The status for an empty bearer token, which some clients without a key send. httpx cannot send it."""
    request = urllib.request.Request(f"{url}/version", headers={"Authorization": "Bearer "})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return int(error.code)


@pytest.mark.parametrize("change", [str.upper, lambda key: key[:-1], lambda key: key + "x", lambda key: key + " x"])
def test_a_key_must_match_completely(anonymous: httpx.Client, server: Any, change: Any) -> None:
    error = problem(anonymous.get("/version", headers={"Authorization": f"Bearer {change(server.key)}"}), 401)
    assert error["code"] == "invalid_api_key"


@pytest.mark.parametrize("key", ["short", "a-key-of-13-c", "sk-wrong-key-of-some-length", "ключ" * 5, "x" * 5000])
def test_an_error_does_not_contain_the_wrong_key(anonymous: httpx.Client, key: str) -> None:
    response = anonymous.get("/version", headers={"Authorization": b"Bearer " + key.encode()})
    problem(response, 401)
    assert key not in response.text
    assert len(response.content) < 1000


def test_an_error_does_not_contain_the_right_key(http: httpx.Client, server: Any) -> None:
    answers = [http.get("/nope"), http.put("/version"), http.post("/v1/completions", json={"n": server.key})]
    assert all(server.key not in answer.text for answer in answers)


def test_keys_from_option_and_file_are_accepted(serve: Any, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of two people\nfile-key-one\n\n  file-key-two  \n")
    arguments = ("--api-key", "given-key", "--api-key-file", str(file), "--parallel", "1")
    with serve(*arguments, key="first-key") as server:
        for key in ("first-key", "given-key", "file-key-one", "file-key-two"):
            with server.http(key) as http:
                assert complete(http, prompt="a", max_tokens=1)
        for key in ("# of two people", "of", "first-key given-key"):
            with server.http(key) as http:
                problem(http.get("/v1/models"), 401)


def test_without_keys_an_empty_bearer_token_is_accepted(one_text_client: httpx.Client) -> None:
    assert status_for_an_empty_bearer(str(one_text_client.base_url)) == 200


@pytest.mark.parametrize("header", [{}, {"Authorization": "Bearer any"}, {"Authorization": "Basic any"}], ids=str)
def test_without_keys_every_request_is_accepted(one_text_client: httpx.Client, header: dict[str, str]) -> None:
    response = one_text_client.post("/v1/completions", json={"prompt": "(", "max_tokens": 1}, headers=header)
    assert response.status_code == 200


@pytest.mark.parametrize("kind", ["application/json", "application/json; charset=utf-8", "Application/JSON"])
def test_parameters_and_case_of_the_json_media_type_are_ignored(http: httpx.Client, kind: str) -> None:
    body = b'{"prompt":"a","max_tokens":1}'
    assert http.post("/v1/completions", content=body, headers={"Content-Type": kind}).status_code == 200


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize", "/detokenize"])
@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/jsonx", ""])
def test_a_body_needs_the_json_media_type(http: httpx.Client, path: str, kind: str) -> None:
    problem(http.post(path, content=b"{}", headers={"Content-Type": kind}), 400)


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize", "/detokenize"])
@pytest.mark.parametrize("chunked", [False, True], ids=["announced", "chunked"])
def test_a_body_may_not_be_too_large(http: httpx.Client, path: str, chunked: bool) -> None:
    parts = [b" " * 2**16] * (LIMIT // 2**16) + [b"{}"]
    content = iter(parts) if chunked else b"".join(parts)
    error = problem(http.post(path, content=content, headers=JSON), 413)
    assert error["type"] == "invalid_request_error"
    assert http.get("/version").status_code == 200


def test_a_body_may_be_as_large_as_the_limit(http: httpx.Client) -> None:
    body = b'{"prompt":"a","max_tokens":1}'
    assert http.post("/v1/completions", content=body + b" " * (LIMIT - len(body)), headers=JSON).status_code == 200


@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/nope"), ("POST", "/nope"), ("DELETE", "/v1")], ids=str)
def test_an_unknown_path_gets_a_404_error(http: httpx.Client, method: str, path: str) -> None:
    error = problem(http.request(method, path), 404)
    assert (error["type"], error["code"]) == ("invalid_request_error", "unknown_url")
    assert f"{method} {path}" in error["message"]


@pytest.mark.parametrize(("allowed", "path"), PROTECTED, ids=[path for _, path in PROTECTED])
def test_a_wrong_method_gets_a_405_error(http: httpx.Client, allowed: str, path: str) -> None:
    response = http.delete(path)
    error = problem(response, 405)
    assert (error["type"], error["code"]) == ("invalid_request_error", "method_not_supported")
    assert allowed in response.headers["allow"]


def test_request_ids_are_unique(http: httpx.Client, anonymous: httpx.Client) -> None:
    paths = ("/version", "/v1/models", "/nope", "/v1/completions", "/health")
    answers = [each.get(path) for each in (http, anonymous) for path in paths for _ in range(5)]
    assert len({answer.headers["x-request-id"] for answer in answers}) == len(answers)


# ---- web pages


def preflight(client: httpx.Client, origin: str) -> httpx.Response:
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    return client.options("/v1/completions", headers=headers)


def test_with_keys_any_origin_is_allowed(http: httpx.Client) -> None:
    answer = preflight(http, "https://pages.example")
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "authorization" in answer.headers["access-control-allow-headers"].lower()
    refusal = httpx.post(f"{http.base_url}/v1/completions", json={}, headers={"Origin": "https://pages.example"})
    assert (refusal.status_code, refusal.headers["access-control-allow-origin"]) == (401, "*")


def test_without_keys_only_local_and_configured_origins_are_allowed(serve: Any) -> None:
    with serve("--cors-origin", "https://mine.example", "--parallel", "1", key=None) as server, server.http() as client:
        for origin in ("http://localhost:3000", "http://127.0.0.1", "https://mine.example"):
            assert preflight(client, origin).headers["access-control-allow-origin"] == origin
        for origin in ("https://pages.example", "null", "http://localhost.pages.example", "http://localhost:1@x"):
            assert preflight(client, origin).status_code == 400
