"""The request log: one line per request, without any text from the client."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from completion_requests import complete, stream, wait_until

from afterword.keys.key import Allowance
from afterword.keys.key_store import KeyStore

FIELDS = {
    *("time", "id", "peer", "key", "user", "route", "model", "status", "code", "finish"),
    *("prompt_tokens", "generated_tokens", "cached_tokens", "first_ms", "total_ms"),
}
Line = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logged")


@pytest.fixture(scope="module")
def store(folder: Path) -> KeyStore:
    return KeyStore(folder / "keys.db", create=True)


@pytest.fixture(scope="module")
def logged(serve: Any, folder: Path, store: KeyStore) -> Iterator[httpx.Client]:
    """A client of a server with a request log and a key store."""
    _, text = store.create()
    arguments = ("--log", str(folder / "requests.jsonl"), "--keys-file", str(store.path), "--wrong-keys", "0")
    with serve(*arguments, "--parallel", "2", key=None, stderr=folder / "stderr") as server, server.http(text) as http:
        yield http


@pytest.fixture
def line_of(folder: Path) -> Callable[[str], Line]:
    """A function that waits for the log line of the request with an id."""

    def find(name: str) -> Line:
        def found() -> list[Line]:
            lines = (folder / "requests.jsonl").read_text().splitlines()
            return [line for line in map(json.loads, lines) if line["id"] == name]

        wait_until(lambda: bool(found()))
        (line,) = found()
        return line

    return find


def test_a_log_line_has_every_field_of_a_request(logged, line_of, store):
    body = {"prompt": "Once", "n": 2, "max_tokens": 3, "seed": 1, "user": "alice"}
    response = logged.post("/v1/completions", json=body)
    answer = response.json()
    line = line_of(response.headers["x-request-id"])
    assert line.keys() == FIELDS
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line["time"])
    assert (line["peer"], line["key"]) == ("127.0.0.1", store.all()[0].id)
    assert line["user"] == store.pseudonym("alice")
    assert (line["route"], line["model"]) == ("/v1/completions", answer["model"])
    assert (line["status"], line["code"]) == (200, None)
    assert line["finish"] == [choice["finish_reason"] for choice in answer["choices"]]
    assert line["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    assert line["generated_tokens"] >= answer["usage"]["completion_tokens"]
    assert 0 < line["first_ms"] <= line["total_ms"]


def test_a_stream_has_the_log_line_of_a_whole_response(logged, line_of):
    body = {"prompt": "Once", "max_tokens": 5, "seed": 1}
    whole = logged.post("/v1/completions", json=body)
    streamed = logged.post("/v1/completions", json=body | {"stream": True})
    lines = [line_of(each.headers["x-request-id"]) for each in (whole, streamed)]
    for name in FIELDS - {"time", "id", "cached_tokens", "first_ms", "total_ms"}:
        assert lines[0][name] == lines[1][name], name


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("POST", "/v1/completions", ("/v1/completions", 400, None)),
        ("GET", "/v1/models/x", ("/v1/models/{model:path}", 404, "model_not_found")),
        ("GET", "/nope", (None, 404, "unknown_url")),
        ("POST", "/v1/chat/completions", ("/v1/chat/completions", 404, "unknown_url")),
        ("POST", "/v1/v1/completions", ("/v1/v1/completions", 404, "unknown_url")),
        ("PUT", "/version", ("/version", 405, "method_not_supported")),
    ],
)
def test_refusals_are_logged_with_code_and_route_pattern(logged, line_of, method, path, expected):
    line = line_of(logged.request(method, path).headers["x-request-id"])
    assert (line["route"], line["status"], line["code"]) == expected
    assert (line["finish"], line["first_ms"]) == ([], None)


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        ({"requests": 1}, "rate_limit_exceeded"),
        ({"tokens": 5}, "rate_limit_exceeded"),
        ({"quota": 5}, "insufficient_quota"),
    ],
    ids=str,
)
def test_a_request_beyond_a_limit_is_logged_with_key_and_route(logged, line_of, store, limits, code):
    key, text = store.create(allowance=Allowance(**limits))
    headers = {"Authorization": f"Bearer {text}"}
    wait_until(lambda: line_of(logged.get("/nope", headers=headers).headers["x-request-id"])["key"] == key.id)
    answers = [logged.post("/v1/completions", json={"prompt": "Once"}, headers=headers) for _ in range(2)]
    line = line_of(answers[-1].headers["x-request-id"])
    assert (line["status"], line["code"], line["key"], line["route"]) == (429, code, key.id, "/v1/completions")


@pytest.mark.parametrize(
    ("request_line", "route"),
    [
        (("GET", "/nope"), None),
        (("GET", "/v1/models/x"), "/v1/models/{model:path}"),
        (("POST", "/ready"), "/ready"),
    ],
)
def test_unknown_paths_are_logged_with_the_key(logged, line_of, store, request_line, route):
    line = line_of(logged.request(*request_line).headers["x-request-id"])
    assert (line["key"], line["route"]) == (store.all()[0].id, route)
    anonymous = line_of(logged.request(*request_line, headers={"Authorization": "Bearer x"}).headers["x-request-id"])
    assert anonymous["key"] is None


def test_a_wrong_key_is_logged_without_it(logged, line_of):
    response = logged.get("/version", headers={"Authorization": "Bearer wrong-key"})
    line = line_of(response.headers["x-request-id"])
    assert (line["status"], line["code"], line["key"]) == (401, "invalid_api_key", None)


def test_a_disconnect_is_logged_with_the_tokens_computed(logged, line_of, endless):
    body = {"prompt": "Once", "max_tokens": 1900, "n": 8, "logit_bias": endless, "stream": True}
    with logged.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    line = line_of(answer.headers["x-request-id"])
    assert (line["status"], line["prompt_tokens"]) == (200, 1)
    assert 0 < line["generated_tokens"] < 8 * 1900
    assert len(line["finish"]) < 8


def test_health_checks_are_not_logged(logged, line_of, folder):
    names = [logged.get(path).headers["x-request-id"] for path in ("/health", "/ready", "/version")]
    line_of(names[-1])
    text = (folder / "requests.jsonl").read_text()
    assert [name in text for name in names] == [False, False, True]


def test_only_the_owner_can_read_the_log(logged, folder):
    assert (folder / "requests.jsonl").stat().st_mode & 0o777 == 0o600


def test_no_word_of_a_caller_is_anywhere(logged, line_of, folder, store):
    """Canary words in every text of a request appear in no log, no error and no database.

    Names of fields are not tested: an error quotes the name of an invalid field.
    """
    words = [f"canary{secrets.token_hex(8)}" for _ in range(9)]
    prompt, suffix, stop, user, salt, value, key, model, path = words
    good = {"prompt": prompt, "suffix": suffix, "stop": [stop], "user": user, "cache_salt": salt, "max_tokens": 3}
    bodies = [
        good,
        good | {"stream": True},
        good | {"best_of": 3},
        good | {"unknown_field": value},
        good | {"temperature": value},
        good | {"logit_bias": {"1": value}},
        good | {"stop": [stop] * 100},
        good | {"prompt": [[prompt]]},
        good | {"user": {"name": user}},
        good | {"max_tokens": 10**6},
        good | {"prompt": prompt * 10_000},
    ]
    answers = [logged.post("/v1/completions", json=body) for body in bodies]
    answers.append(logged.post("/v1/completions", content=f'{{"prompt": "{prompt}"', headers=JSON))
    answers.append(logged.post("/tokenize", json={"prompt": [prompt], "other": value}))
    answers.append(logged.post("/v1/completions", json=good, headers={"Authorization": f"Bearer {key}-{key}"}))
    answers.append(logged.get("/version", headers={"X-Forwarded-For": f"{value}, {value}", "User-Agent": value}))
    assert [answer.status_code for answer in answers[:3]] == [200] * 3
    responses_with_text = [answer for answer in answers if answer.status_code >= 400]
    assert len(responses_with_text) >= 10
    responses_with_text += [
        logged.get(f"/{name}") for name in ("health", "ready", "version", "metrics", "openapi.json", "v1/models")
    ]
    quiet = logged.post("/v1/completions", json=good | {"model": model}), logged.get(f"/{path}?{path}")
    wait_until(lambda: dict(store.usage("user")).get(store.pseudonym(user)) is not None)
    line_of(quiet[-1].headers["x-request-id"])
    files = [each.read_bytes() for each in folder.iterdir()]
    assert len(files) == 3, "the request log, the standard error stream and the key store"
    for word in words:
        assert not any(word in answer.text for answer in responses_with_text)
        assert not any(word.encode() in file for file in files)
    secret = logged.headers["authorization"].split("_")[-1].encode()
    assert not any(secret in file for file in files)


JSON = {"Content-Type": "application/json"}


def test_lines_can_go_to_the_standard_error_stream(serve, tmp_path):
    stderr = tmp_path / "stderr"
    with serve("--log", "-", "--parallel", "1", key=None, stderr=stderr) as server, server.http() as http:
        complete(http, prompt="a", max_tokens=1, user="alice")
        wait_until(lambda: bool(stderr.read_text()))
    line = json.loads(stderr.read_text())
    assert (line["route"], line["key"], line["user"]) == ("/v1/completions", None, None), (
        "there are no pseudonyms without a key store"
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full does not exist")
def test_a_full_disk_loses_log_lines_only_and_is_logged_once(serve, tmp_path):
    stderr = tmp_path / "stderr"
    with serve("--log", "/dev/full", "--parallel", "1", key=None, stderr=stderr) as server, server.http() as http:
        for _ in range(3):
            assert complete(http, prompt="a", max_tokens=1)
            assert stream(http, prompt="a", max_tokens=1)
    assert stderr.read_text().count("/dev/full") == 1
