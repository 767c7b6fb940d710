"""Defaults of fields by the name of the model: `--defaults`. Several names share one engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from completion_requests import complete, problem

DEFAULTS = """
[tiny]
max_tokens = 3
[greedy]
model = "tiny"
temperature = 0
max_tokens = 7
return_token_ids = true
"""
PROMPT = {"prompt": "Once upon a time there was a", "ignore_eos": True}


@pytest.fixture(scope="module", params=[(), ("--strict",)], ids=["default", "strict"])
def named(serve: Any, tmp_path_factory: pytest.TempPathFactory, request: Any) -> Iterator[tuple[int, httpx.Client]]:
    """A server with a model that has two names: its process id and a client."""
    path: Path = tmp_path_factory.mktemp("defaults") / "defaults.toml"
    path.write_text(DEFAULTS)
    words = ("--alias", "tiny", "--defaults", str(path), "--parallel", "2", *request.param)
    with serve(*words, key=None) as server, server.http() as http:
        yield server.pid, http


def test_a_name_of_a_model_has_its_defaults(named: tuple[int, httpx.Client]) -> None:
    _, http = named
    first, second = (complete(http, model="greedy", prompt="Once upon a time") for _ in range(2))
    (choice,) = first["choices"]
    assert (first["model"], first["choices"]) == ("greedy", second["choices"])
    assert len(choice["token_ids"]) == 7
    assert len(complete(http, model="greedy", prompt="Once", max_tokens=2, logprobs=0)["choices"][0]["token_ids"]) == 2
    assert complete(http, model="greedy", prompt="Once", max_tokens=None)["choices"][0]["finish_reason"]
    tiny = complete(http, model="tiny", prompt="Once upon a time", seed=1)
    assert "token_ids" not in tiny["choices"][0]
    assert tiny["usage"]["completion_tokens"] <= 3


def test_infill_has_the_same_defaults(named: tuple[int, httpx.Client]) -> None:
    _, http = named
    body = {"model": "greedy", "input_prefix": "The dog went ", "input_suffix": " home.", "ignore_eos": True}
    settings = http.post("/infill", json=body).json()["generation_settings"]
    assert (settings["temperature"], settings["n_predict"]) == (0, 7)
    settings = http.post("/infill", json=body | {"n_predict": 2, "model": "tiny"}).json()["generation_settings"]
    assert (settings["temperature"], settings["n_predict"]) == (0.8, 2)


def test_names_share_the_engine_and_its_prefix_cache(named: tuple[int, httpx.Client]) -> None:
    pid, http = named
    text = "A long text about the sea and the wind and the ships that sail on it. " * 3
    answers = [complete(http, model=name, prompt=text) for name in ("tiny", "greedy")]
    assert answers[1]["usage"]["prompt_tokens_details"]["cached_tokens"] > 20
    assert answers[0]["system_fingerprint"] == answers[1]["system_fingerprint"]
    assert len([child for child in psutil.Process(pid).children() if child.status() != "zombie"]) == 1


def test_all_names_are_listed_with_their_model_and_defaults(named: tuple[int, httpx.Client]) -> None:
    _, http = named
    listed = http.get("/v1/models").json()["data"]
    expected = {"temperature": 0, "max_tokens": 7, "return_token_ids": True}
    assert [(each["id"], each["root"], each["defaults"]) for each in listed] == [
        ("tiny", "tiny", {"max_tokens": 3}),
        ("greedy", "tiny", expected),
    ]
    assert http.get("/v1/models/greedy").json() == listed[1]
    assert http.post("/tokenize", json={"model": "greedy", "prompt": "a"}).status_code == 200
    assert problem(http.get("/v1/models/other"), 404)["code"] == "model_not_found"


def test_requests_are_counted_by_the_name_that_they_use(named: tuple[int, httpx.Client]) -> None:
    _, http = named
    complete(http, model="greedy", prompt="Once")
    assert 'afterword:prompt_tokens_total{model_name="tiny"}' in http.get("/metrics").text
    assert 'afterword:request_success_total{finished_reason="length",model_name="greedy"}' in http.get("/metrics").text
