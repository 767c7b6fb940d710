"""`afterword serve --engine http` in front of a scripted upstream: fields, streams, failures, restarts."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from scripted_upstream import (
    KEY,
    ThreadUpstream,
    dies,
    greedy,
    sends,
    silent,
    status,
    together,
    upstream_in_thread,
    write_folder,
)

PROMPT = "The cat sat"
FORCED = {"logit_bias": {str(ord("x")): 100}}
"""The text consists of the letter x: each token is a character, so the server sends it at once."""

SILENCE = 5  # seconds; more than a busy machine needs to compute an event of the toy model
pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def upstream() -> Iterator[ThreadUpstream]:
    with upstream_in_thread() as upstream:
        yield upstream


@pytest.fixture(scope="module")
def server(serve: Any, upstream: ThreadUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    path = tmp_path_factory.mktemp("models")
    (path / "key").write_text(KEY + "\n")
    arguments = (str(write_folder(path / "toy")), "--engine", "http", "--upstream", f"{upstream.script.url}/v1")
    limits = ("--parallel", "4", "--limit", f"upstream_seconds={SILENCE}")
    with serve(*arguments, "--upstream-key-file", str(path / "key"), *limits) as server:
        yield server


@pytest.fixture
def http(server: Any, upstream: ThreadUpstream) -> Iterator[httpx.Client]:
    """A client of the server. What other tests have sent to the upstream is forgotten."""
    upstream.script.requests.clear()
    upstream.script.plan.clear()
    upstream.script.left = 0
    with server.http() as client:
        yield client


def post(http: httpx.Client, **body: Any) -> httpx.Response:
    return http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 6, "temperature": 0, **body})


def ask(http: httpx.Client, **body: Any) -> dict[str, Any]:
    response = post(http, **body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def events(http: httpx.Client, **body: Any) -> list[str]:
    """The data of a stream's events."""
    body = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0, "stream": True, **body}
    with http.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        return [line.removeprefix("data: ") for line in response.iter_lines() if line]


def expected(count: int = 6, prompt: str = PROMPT) -> list[int]:
    return greedy(list(prompt.encode()), count)


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---- what is handed down, and what comes back


def test_a_text_is_that_of_the_upstream(http, upstream):
    answer = ask(http, return_token_ids=True)
    assert answer["choices"][0]["token_ids"] == expected()
    assert answer["usage"]["completion_tokens"] == 6
    (sent,) = upstream.script.requests
    assert sent["token_ids"] == list(PROMPT.encode())
    assert upstream.script.headers[-1]["authorization"] == f"Bearer {KEY}"


def test_fields_are_handed_down(http, upstream):
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.1,
        "min_tokens": 2,
    }
    ask(http, **fields, logit_bias={"65": 3}, stop_token_ids=[66], logprobs=2)
    sent = upstream.script.requests[0]["sampling_params"]
    assert {name: sent[name] for name in fields} == fields
    assert (sent["logit_bias"], sorted(sent["stop_token_ids"]), sent["logprobs"]) == ({"65": 3.0}, [66, 256], 3)


def test_a_stream_is_the_whole_text(http):
    whole = ask(http, max_tokens=20, logprobs=1, seed=1, temperature=1)
    *chunks, done = events(http, max_tokens=20, logprobs=1, seed=1, temperature=1)
    assert done == "[DONE]"
    choices = [json.loads(chunk)["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
    assert len(chunks) > 3


def test_choices_have_their_own_seeds_and_the_first_goes_first(http, upstream):
    answer = ask(http, n=3, temperature=1, seed=4, return_token_ids=True)
    assert len({tuple(choice["token_ids"]) for choice in answer["choices"]}) == 3
    assert len({each["sampling_params"]["seed"] for each in upstream.script.requests}) == 3
    assert ask(http, n=3, temperature=1, seed=4)["choices"][0]["text"] == answer["choices"][0]["text"]


def test_at_most_parallel_samples_are_handed_over(http, upstream):
    upstream.script.most = 0
    upstream.script.plan.extend([upstream.script.answer, *[together(upstream.script, 4)] * 4])
    assert len(ask(http, n=9, max_tokens=3)["choices"]) == 9
    assert upstream.script.most == 4
    assert len(upstream.script.requests) == 9


def test_a_prompt_is_scored(http, upstream):
    (choice,) = ask(http, max_tokens=0, echo=True, logprobs=2)["choices"]
    assert choice["text"] == PROMPT
    assert len(choice["logprobs"]["token_logprobs"]) == len(PROMPT)
    assert choice["logprobs"]["token_logprobs"][0] is None
    (sent,) = upstream.script.requests
    assert sent["stream"] is False


def test_a_stop_string_ends_the_request_to_the_upstream(http, upstream):
    upstream.script.plan.append(silent(6))
    answer = ask(http, max_tokens=400, stop="xxx", **FORCED)
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("", "stop")
    wait_until(lambda: upstream.script.left == 1)
    assert len(upstream.script.requests) == 1


def test_an_end_token_ends_a_text(http):
    answer = ask(http, logit_bias={"256": 100})
    assert answer["choices"][0]["finish_reason"] == "stop"
    answer = ask(http, logit_bias={"256": 100}, ignore_eos=True, return_token_ids=True)
    assert answer["choices"][0]["token_ids"] == [256] * 6


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"typical_p": 0.5}, "typical_p"),
        ({"allowed_token_ids": [65]}, "allowed_token_ids"),
        ({"json_schema": {}}, "json_schema"),
        ({"temperature": 0.001}, "temperature"),
        ({"min_tokens": 2, "ignore_eos": True}, "min_tokens"),
    ],
)
def test_what_the_upstream_does_not_compute_is_refused_by_name(http, upstream, fields, param):
    response = post(http, **fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert not upstream.script.requests


def test_the_model_states_no_promise(http):
    (model,) = http.get("/v1/models").json()["data"]
    assert (model["id"], model["reproducible"], model["max_model_len"]) == ("toy", "none", 511)


# ---- failures


def error_of(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


@pytest.mark.parametrize("failure", [status(500), status(503), dies(-1), dies(0)], ids=["500", "503", "death", "begun"])
def test_a_request_without_a_token_is_sent_again(http, upstream, failure):
    upstream.script.plan.append(failure)
    assert ask(http, return_token_ids=True)["choices"][0]["token_ids"] == expected()


def test_a_request_that_the_upstream_refuses_is_an_error(http, upstream):
    upstream.script.plan.append(status(400))
    assert error_of(post(http)) == (500, "job_refused")


@pytest.mark.parametrize("failure", [dies(2), silent(2)], ids=["death", "silence"])
def test_a_stream_that_the_upstream_breaks_off_ends_with_an_error_event(http, upstream, failure):
    upstream.script.plan.append(failure)
    found = events(http, return_token_ids=True, **FORCED)
    assert json.loads(found[-1])["error"]["code"] == "upstream_lost"
    assert "[DONE]" not in found
    tokens = [token for event in found[:-1] for token in json.loads(event)["choices"][0].get("token_ids") or []]
    assert tokens == [ord("x")] * 2


def test_a_whole_response_that_the_upstream_breaks_off_is_an_error(http, upstream):
    upstream.script.plan.append(dies(2))
    assert error_of(post(http)) == (500, "upstream_lost")


def test_garbage_is_an_error_and_harms_no_other_request(http, upstream):
    upstream.script.plan.append(sends(b"data: {]\n\n"))
    assert error_of(post(http)) == (500, "job_refused")
    assert ask(http)["choices"]


def test_a_client_that_leaves_ends_the_request_to_the_upstream(http, upstream):
    upstream.script.plan.append(silent(1))
    body = {"prompt": PROMPT, "max_tokens": 6, "stream": True, **FORCED}
    with http.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())
    wait_until(lambda: upstream.script.left == 1)
    assert len(upstream.script.requests) == 1


def test_requests_wait_while_the_upstream_restarts(http, upstream):
    upstream.stop()
    responses: list[httpx.Response] = []
    waiting = [threading.Thread(target=lambda: responses.append(post(http))) for _ in range(3)]
    for each in waiting:
        each.start()
    wait_until(lambda: json.loads(http.get("/ready").text)["running"] >= 1)
    upstream.start()
    for each in waiting:
        each.join(60)
    assert [response.status_code for response in responses] == [200] * 3


def test_another_model_of_the_upstream_fails_requests_and_is_refused_or_served(http, upstream):
    """The worker ends and another one looks at the upstream anew: the fingerprint changes, and requests go on."""
    before = ask(http)["system_fingerprint"]
    upstream.stop()
    upstream.script.version = "0.33.0"
    responses: list[httpx.Response] = []
    waiting = threading.Thread(target=lambda: responses.append(post(http)))
    waiting.start()
    wait_until(lambda: json.loads(http.get("/ready").text)["running"] >= 1)
    upstream.start()
    waiting.join(60)
    assert error_of(responses[0]) == (500, "model_replaced")
    assert ask(http)["system_fingerprint"] != before


def test_an_upstream_that_restarts_under_another_name_while_no_request_runs_is_noticed(http, upstream):
    """It answers at once, but with 404: the next request says why, and those after it are answered."""
    before = ask(http)["system_fingerprint"]
    upstream.stop()
    upstream.script.models = ["renamed"]
    upstream.start()
    assert error_of(post(http)) == (500, "model_replaced")
    assert ask(http)["system_fingerprint"] != before
    assert upstream.script.requests[-1]["model"] == "renamed"
