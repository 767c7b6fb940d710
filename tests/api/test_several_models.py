"""Several models in one server with real worker processes, loaded at the start or on demand."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from completion_requests import Json, complete, problem, refused, wait_until
from one_text_model import TEXT, write_one_text_model

from oracle.tiny import write_tiny


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The paths of the model that generates one fixed text and of a model with random weights."""
    folder = tmp_path_factory.mktemp("several")
    return str(write_one_text_model(folder / "one-text.gguf")), str(write_tiny(folder / "noise.gguf", infill=False))


@pytest.fixture(scope="module")
def both(serve: Any, files: tuple[str, str]) -> Iterator[tuple[int, httpx.Client]]:
    """A server without API keys with both models, the second with an alias: its process id and a client."""
    words = (*files, "--alias", "one-text", "--alias", "second", "--parallel", "2")
    with serve(*words, key=None) as server, server.http() as http:
        yield server.pid, http


@pytest.fixture
def on_demand(serve: Any, files: tuple[str, str]) -> Iterator[httpx.Client]:
    """A client of a server that loads both models on demand and unloads them when they are unused."""
    with serve(*files, "--keep-alive", "0", "--parallel", "2", key=None) as server, server.http() as http:
        yield http


def states(http: httpx.Client) -> dict[str, str]:
    return {model["id"]: model["status"] for model in http.get("/v1/models").json()["data"]}


def complete_with(http: httpx.Client, model: str, **more: Any) -> Json:
    answer = complete(http, model=model, prompt=TEXT[0], temperature=0, max_tokens=9, **more)
    assert answer["model"] == model
    return answer


def workers(pid: int) -> list[psutil.Process]:
    """The worker processes of a server, in the order of their start."""
    children = [child for child in psutil.Process(pid).children() if child.status() != "zombie"]
    return sorted(children, key=lambda child: child.create_time())


def test_a_request_selects_a_model_by_name(both: tuple[int, httpx.Client]) -> None:
    _, http = both
    one_text, noise = complete_with(http, "one-text"), complete_with(http, "second")
    assert one_text["choices"][0]["text"] == TEXT[1:4]
    assert noise["choices"][0]["text"] != one_text["choices"][0]["text"]
    assert one_text["system_fingerprint"] != noise["system_fingerprint"]


def test_an_absent_model_name_gets_an_error_with_all_names(both: tuple[int, httpx.Client]) -> None:
    _, http = both
    for body in ({}, {"model": ""}, {"model": None}):
        error = refused(http, "model", prompt="a", **body)
        assert error["param"] == "model"
        assert "one-text, second" in error["message"]
    assert refused(http, status=404, prompt="a", model="noise")["code"] == "model_not_found"
    assert problem(http.post("/tokenize", json={"prompt": "a"}), 400)["param"] == "model"
    assert problem(http.get("/tokenizer_info"), 400)["param"] == "model"


def test_each_model_has_its_tokenizer(both: tuple[int, httpx.Client]) -> None:
    _, http = both
    for name in ("one-text", "second"):
        tokens = http.post("/tokenize", json={"model": name, "prompt": "abc"}).json()["tokens"]
        assert http.post("/detokenize", json={"model": name, "tokens": tokens}).json() == {"prompt": "abc"}
        assert http.get("/tokenizer_info", params={"model": name}).json()["vocab_size"] > 256


def test_all_models_are_listed_and_described(both: tuple[int, httpx.Client]) -> None:
    _, http = both
    listed = http.get("/v1/models").json()["data"]
    assert [model["id"] for model in listed] == ["one-text", "second"]
    for model in listed:
        assert http.get(f"/v1/models/{model['id']}").json() == model
        assert model["status"] == "ready"
    ready = http.get("/ready").json()
    assert [model["id"] for model in ready["models"]] == ["one-text", "second"]
    assert ready["sequences"] == 4
    assert http.get("/health").json() == {"status": "ok", "models": {"one-text": "ready", "second": "ready"}}


def test_killing_one_worker_does_not_affect_the_other(both: tuple[int, httpx.Client]) -> None:
    pid, http = both
    body = {"model": "second", "prompt": "a", "max_tokens": 60, "ignore_eos": True, "seed": 1, "stream": True}
    whole = http.post("/v1/completions", json=body | {"stream": False}).json()["choices"][0]["text"]
    before = {model["id"]: model["restarts"] for model in http.get("/ready").json()["models"]}
    text = ""
    with http.stream("POST", "/v1/completions", json=body) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                if not text:
                    os.kill(workers(pid)[0].pid, signal.SIGKILL)
                text += json.loads(line[6:])["choices"][0]["text"]
    assert text == whole
    assert complete_with(http, "one-text")["choices"][0]["text"]  # waits for the next worker
    wait_until(lambda: http.get("/ready").status_code == 200)
    after = {model["id"]: model["restarts"] for model in http.get("/ready").json()["models"]}
    assert after == before | {"one-text": before["one-text"] + 1}


def test_models_are_loaded_on_demand_and_unloaded(on_demand: httpx.Client) -> None:
    assert on_demand.get("/ready").status_code == 200
    assert states(on_demand) == {"one-text": "unloaded", "noise": "unloaded"}
    unknown = on_demand.get("/v1/models/one-text").json()
    assert (unknown["system_fingerprint"], unknown["infill"]) == (None, None)
    first = complete_with(on_demand, "one-text")
    wait_until(lambda: states(on_demand) == {"one-text": "unloaded", "noise": "unloaded"})
    known = on_demand.get("/v1/models/one-text").json()
    assert known["system_fingerprint"] == first["system_fingerprint"]
    assert known["max_model_len"] == unknown["max_model_len"]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda name: complete_with(on_demand, name), ["one-text", "noise"] * 4))
    assert [answer["choices"] for answer in answers[::2]] == [first["choices"]] * 4
    wait_until(lambda: states(on_demand) == {"one-text": "unloaded", "noise": "unloaded"})


def test_a_model_that_failed_to_load_is_loaded_by_the_next_request(
    serve: Any, files: tuple[str, str], tmp_path: Path
) -> None:
    path, good = tmp_path / "copy.gguf", Path(files[0]).read_bytes()
    path.write_bytes(good)
    with serve(str(path), "--keep-alive", "1h", "--parallel", "1", key=None) as server, server.http() as http:
        path.write_bytes(b"no model any more")
        response = http.post("/v1/completions", json={"prompt": "a"})
        assert problem(response, 500)["code"] == "load_failed"
        assert response.headers["x-should-retry"] == "false"
        assert str(tmp_path) not in response.text
        assert states(http) == {"copy": "unloaded"}
        path.write_bytes(good)
        assert complete_with(http, "copy")["choices"][0]["text"]
        assert states(http) == {"copy": "ready"}
