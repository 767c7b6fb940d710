"""API keys that are created, limited and revoked while the server runs."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import psutil
import pytest
from click.testing import CliRunner
from completion_requests import complete, problem, wait_until

from afterword.cli import main
from afterword.keys.key import Allowance
from afterword.keys.key_store import KeyStore

try:
    import resource
except ImportError:  # not on every system
    resource = None  # type: ignore[assignment]

ASK = {"prompt": "Once upon a time", "max_tokens": 5, "seed": 1}
LONG = {"max_tokens": 1900, "n": 16, "stream": True}
OPTION_KEY = "given-key-of-the-operator"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> KeyStore:
    return KeyStore(tmp_path_factory.mktemp("keys") / "keys.db", create=True)


@pytest.fixture(scope="module")
def keyed(serve: Any, store: KeyStore) -> Iterator[Any]:
    """A server with the keys of the key store, and one key from `--api-key`."""
    arguments = ("--keys-file", str(store.path), "--api-key", OPTION_KEY, "--wrong-keys", "0", "--parallel", "4")
    with serve(*arguments, key=None) as server:
        yield server


@pytest.fixture
def client(keyed: Any, store: KeyStore) -> Iterator[Callable[..., httpx.Client]]:
    """A function that returns a client with a new key that has the given limits."""
    clients: list[httpx.Client] = []

    def make(**limits: int) -> httpx.Client:
        _, text = store.create(allowance=Allowance(**limits))
        clients.append(keyed.http(text))
        wait_until(lambda: is_valid(keyed, text))
        return clients[-1]

    yield make
    for each in clients:
        each.close()


def is_valid(server: Any, key: str) -> bool:
    """Whether the server accepts the key. The check counts as one request against its limits."""
    with server.http(key) as http:
        return bool(http.get("/v1/models").status_code != 401)


def ask(http: httpx.Client, **body: Any) -> httpx.Response:
    return http.post("/v1/completions", json=ASK | body)


# ---- valid and invalid keys


def test_new_keys_open_a_running_server_and_revoked_ones_stop_at_once(keyed, store, client):
    http = client()
    assert complete(http, **ASK)
    store.revoke(http.headers["authorization"].split("_")[1])
    wait_until(lambda: http.get("/version").status_code == 401)
    with keyed.http(OPTION_KEY) as given:
        assert complete(given, **ASK), "other keys stay valid"


def test_every_key_that_does_not_open_is_answered_alike(keyed, store, client):
    _, expired = store.create(expires=1)
    revoked, revoked_text = store.create()
    store.revoke(revoked.id)
    client()  # after this call the server has read the changes
    unknown = "aw_00000000_" + "A" * 43
    answers = []
    for key in (expired, revoked_text, unknown, "x" * len(unknown)):
        with keyed.http(key) as http:
            response = http.get("/version")
        error = problem(response, 401)
        assert error["code"] == "invalid_api_key"
        assert key not in response.text
        masked = re.sub(r"(provided: ).{8}(\*+).{4}\.", r"\1\2", error["message"])
        dated = ("date", "x-request-id", "openai-processing-ms")
        answers.append((masked, sorted((name, value) for name, value in response.headers.items() if name not in dated)))
    assert len({str(answer) for answer in answers}) == 1


def test_without_limits_there_are_no_rate_limit_headers(client):
    response = ask(client())
    assert response.status_code == 200
    assert not [name for name in response.headers if name.startswith("x-ratelimit")]


# ---- requests per minute


def test_requests_beyond_the_rate_limit_are_refused(client):
    http = client(requests=3)  # the fixture has used one of them
    answers = [http.get("/version") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers[:2]] == ["1", "0"]
    assert answers[0].headers["x-ratelimit-limit-requests"] == "3"
    assert re.fullmatch(r"\d+m?s", answers[0].headers["x-ratelimit-reset-requests"])
    error = problem(answers[2], 429)
    assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
    assert 1 <= int(answers[2].headers["retry-after"]) <= 20
    assert "x-should-retry" not in answers[2].headers
    assert answers[2].headers["x-ratelimit-limit-requests"] == "3"
    assert answers[2].headers["x-ratelimit-remaining-requests"] == "0"
    assert re.fullmatch(r"(\d+m)?\d+s", answers[2].headers["x-ratelimit-reset-requests"])


def test_every_refusal_by_a_limit_has_the_headers_of_all_limits(client):
    for limits in ({"requests": 2, "tokens": 4}, {"requests": 1, "tokens": 1000}):
        http = client(**limits)
        refused = ask(http)
        assert refused.status_code == 429
        for name in ("requests", "tokens"):
            assert refused.headers[f"x-ratelimit-limit-{name}"] == str(limits[name])
            assert int(refused.headers[f"x-ratelimit-remaining-{name}"]) <= limits[name]
            assert f"x-ratelimit-reset-{name}" in refused.headers


def test_the_rate_limit_is_checked_before_the_body(client):
    http = client(requests=1)
    problem(http.post("/v1/completions", content=b"no JSON", headers={"Content-Type": "text/plain"}), 429)


# ---- tokens per minute


def test_unused_tokens_are_given_back(client):
    http = client(tokens=1000)
    first = ask(http, max_tokens=900, stop=" ")
    used = first.json()["usage"]["total_tokens"]
    most = used + 50  # and tokens generated before the engine received the stop
    assert first.headers["x-ratelimit-limit-tokens"] == "1000"
    assert int(first.headers["x-ratelimit-remaining-tokens"]) < 1000 - used
    assert int(http.get("/version").headers["x-ratelimit-remaining-tokens"]) >= 1000 - most


def test_every_sample_of_every_prompt_counts(client):
    http = client(tokens=100)
    assert ask(http, prompt=["a", "b"], n=2, max_tokens=20).status_code == 200
    error = problem(ask(http, prompt=["a", "b"], n=2, max_tokens=25), 429)
    assert (error["type"], error["code"]) == ("tokens", "rate_limit_exceeded")
    assert "Limit 100" in error["message"]


def test_a_request_larger_than_the_limit_says_not_to_retry(client):
    response = ask(client(tokens=100), max_tokens=100)
    problem(response, 429)
    assert response.headers["x-should-retry"] == "false"
    assert "retry-after" not in response.headers


def test_who_leaves_pays_for_what_was_computed(client, endless, store):
    http = client(quota=16 * 1900 + 100)
    name = http.headers["authorization"].split("_")[1]

    def spent() -> int:
        return next(key.spent for key in store.all() if key.id == name)

    with http.stream("POST", "/v1/completions", json=ASK | LONG | {"logit_bias": endless}) as answer:
        lines = answer.iter_lines()  # keeps the connection open
        next(lines)
        wait_until(lambda: spent() > 16 * 1900)
        assert problem(ask(http, max_tokens=100), 429)["code"] == "insufficient_quota"
    wait_until(lambda: 0 < spent() < 16 * 1900)
    sums = dict(store.usage("key"))[name]
    assert sums.requests == 1
    assert sums.prompt + sums.completion == spent()
    assert ask(http, max_tokens=100).status_code == 200


# ---- concurrent requests


def test_concurrent_requests_beyond_the_limit_are_refused(client, endless):
    http = client(concurrent=1)
    with http.stream("POST", "/v1/completions", json=ASK | LONG | {"logit_bias": endless}) as answer:
        lines = answer.iter_lines()  # keeps the connection open
        next(lines)
        response = ask(http)
        assert problem(response, 429)["code"] == "rate_limit_exceeded"
        assert response.headers["retry-after"] == "1"
    wait_until(lambda: ask(http).status_code == 200)
    assert [ask(http).status_code for _ in range(5)] == [200] * 5, (
        "each request stops counting when it ends, also after an error"
    )
    assert [http.post("/v1/completions", json={"n": -1}).status_code for _ in range(5)] == [400] * 5


# ---- quota


def test_an_exhausted_quota_is_not_retried_by_the_official_client(keyed, client):
    http = client(quota=30)
    assert ask(http).status_code == 200
    response = ask(http, max_tokens=30)
    error = problem(response, 429)
    assert (error["type"], error["code"]) == ("insufficient_quota", "insufficient_quota")
    assert response.headers["x-should-retry"] == "false"
    seen: list[httpx.Response] = []
    key = http.headers["authorization"].split()[1]
    with (
        openai.DefaultHttpxClient(trust_env=False, event_hooks={"response": [seen.append]}) as transport,
        openai.OpenAI(base_url=f"{keyed.url}/v1", api_key=key, http_client=transport) as sdk,
        pytest.raises(openai.RateLimitError),
    ):
        sdk.completions.create(model=keyed.model, **(ASK | {"max_tokens": 30}))
    assert len(seen) == 1


def test_quota_and_usage_survive_a_killed_server(serve, tmp_path):
    store = KeyStore(tmp_path / "keys.db", create=True)
    key, text = store.create(allowance=Allowance(quota=60))
    arguments = ("--keys-file", str(store.path), "--parallel", "1")
    with killed(serve, *arguments) as server, server.http(text) as http:
        used = complete(http, **ASK, user="alice")["usage"]
        wait_until(lambda: usage(store, "--by", "key") != [])  # written when the request has ended
        assert store.all()[0].spent == used["total_tokens"]
    assert usage(store, "--by", "key") == [
        {
            "key": key.id,
            "requests": 1,
            "prompt": used["prompt_tokens"],
            "completion": used["completion_tokens"],
            "cached": 0,
        }
    ]
    assert [row["requests"] for row in usage(store, "--by", "day", "--user", "alice")] == [1]
    assert usage(store, "--user", "bob") == []
    with serve(*arguments, key=None) as server, server.http(text) as http:
        assert problem(ask(http, max_tokens=55), 429)["code"] == "insufficient_quota"


def test_tokens_cut_off_by_a_stop_string_are_charged(keyed, store, client):
    http = client(quota=10_000)
    letter = http.post("/tokenize", json={"prompt": "a"}).json()["tokens"][-1]
    body = {"prompt": "b", "max_tokens": 40, "n": 2, "logit_bias": {str(letter): 100}, "stop": "a" * 30}
    used = complete(http, **body)["usage"]
    assert used["completion_tokens"] == 0
    name = http.headers["authorization"].split("_")[1]
    charged = used["prompt_tokens"] + 2 * 30

    def spent() -> int:
        return next(key.spent for key in store.all() if key.id == name)

    def recorded() -> list[int]:
        return [row["prompt"] + row["completion"] for row in usage(store, "--by", "key") if row["key"] == name]

    wait_until(lambda: recorded() == [spent()])  # before its end, a request is charged the most tokens that it can use
    assert charged <= spent() <= used["prompt_tokens"] + 2 * 40


@contextmanager
def killed(serve: Any, *arguments: str) -> Iterator[Any]:
    """A server that the test kills with SIGKILL."""
    try:
        with serve(*arguments, key=None) as server:
            yield server
            os.kill(server.pid, signal.SIGKILL)
    except AssertionError:  # `serve` reports the exit status of the killed server
        assert not psutil.pid_exists(server.pid)


def usage(store: KeyStore, *options: str) -> Any:
    return json.loads(afterword(store, "usage", "--json", *options))


def afterword(store: KeyStore, *words: str) -> str:
    result = CliRunner().invoke(main, words, env={"AFTERWORD_KEYS_FILE": str(store.path)})
    assert result.exit_code == 0, result.output
    return result.stdout


# ---- wrong keys


def test_wrong_keys_of_an_address_must_wait_and_right_ones_never(serve, tmp_path):
    store = KeyStore(tmp_path / "keys.db", create=True)
    _, text = store.create()
    with serve("--keys-file", str(store.path), "--wrong-keys", "3", "--parallel", "1", key=OPTION_KEY) as server:

        def status(key: str) -> int:
            with server.http(key) as http:
                return http.get("/version").status_code

        assert [status(f"wrong-{number}") for number in range(3)] == [401] * 3
        with server.http("wrong-again") as http:
            response = http.get("/version")
        assert problem(response, 429)["code"] == "rate_limit_exceeded"
        assert 1 <= int(response.headers["retry-after"]) <= 20
        assert (status(text), status(OPTION_KEY)) == (200, 200), (
            "valid keys are accepted from an address with too many wrong ones"
        )
        assert status("wrong-once-more") == 429


# ---- the prefix cache and keys


def test_what_was_computed_for_one_key_is_used_for_another_only_if_that_is_wanted(serve):
    keys = ("--api-key", "first-key", "--api-key", "second-key", "--parallel", "2")
    for more, found in ((), False), (("--shared-cache",), True):
        with serve(*keys, *more, key=None) as server:
            cached = []
            for key in ("first-key", "first-key", "second-key"):
                with server.http(key) as http:
                    answer = complete(http, prompt="Once upon a time there was a king. " * 20, max_tokens=1)
                    cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 0)
        assert cached == [False, True, found]


# ---- a full disk


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits of another process can be set on Linux only")
def test_a_full_disk_stops_no_request_and_what_was_used_is_written_when_there_is_room(serve, tmp_path):
    store, stderr, log = KeyStore(tmp_path / "keys.db", create=True), tmp_path / "stderr", tmp_path / "log"
    key, text = store.create(allowance=Allowance(quota=500))
    log.write_bytes(b" " * 8192 + b"\n")
    arguments = ("--keys-file", str(store.path), "--log", str(log), "--parallel", "1")
    with serve(*arguments, key=None, stderr=stderr) as server, server.http(text) as http:
        before = complete(http, **ASK)["usage"]["total_tokens"]
        wait_until(lambda: store.all()[0].spent == before and log.read_bytes().endswith(b"\n"))
        _, most = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (4096, most))  # room for a few log lines
        meanwhile = sum(complete(http, **ASK)["usage"]["total_tokens"] for _ in range(5))
        wait_until(lambda: "cannot be used" in stderr.read_text() and "are lost" in stderr.read_text())
        assert problem(ask(http, max_tokens=500 - before - meanwhile), 429)["code"] == "insufficient_quota"
        assert store.all()[0].spent == before
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (most, most))
        wait_until(lambda: store.all()[0].spent == before + meanwhile)
        assert http.get("/version").status_code == 200
        wait_until(lambda: b'"/version"' in log.read_bytes())
    assert stderr.read_text().count("cannot be used") == stderr.read_text().count("are lost") == 1
    assert [row["requests"] for row in usage(store)] == [6]
    assert json.loads(log.read_text().splitlines()[-1])["key"] == key.id
