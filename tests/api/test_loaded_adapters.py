"""`/v1/load_lora_adapter` and `/v1/unload_lora_adapter`: adapters that are served and removed while the server runs."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from completion_requests import Json, complete, joined, problem, refused

from oracle.adapters import random_pairs, write_adapter
from oracle.architectures import write_random

ADMIN, USER = "admin-key-0123456789", "user-key-0123456789"
PROMPT = [5 + i * i % 190 for i in range(200)]


@dataclass(frozen=True, slots=True)
class Running:
    """A server with two keys, of which the first may load the adapters in `folder`."""

    admin: httpx.Client
    user: httpx.Client
    folder: Path

    def load(self, name: Any, path: Any, **more: Any) -> httpx.Response:
        return self.admin.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, **more})

    def unload(self, name: Any, **more: Any) -> httpx.Response:
        return self.admin.post("/v1/unload_lora_adapter", json={"lora_name": name, **more})

    @property
    def models(self) -> dict[str, Json]:
        return {each["id"]: each for each in self.user.get("/v1/models").json()["data"]}

    def answer(self, model: str | None, **more: Any) -> Json:
        body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 8, "logprobs": 0, "prompt_logprobs": 0}
        return complete(self.user, model=model, **body | more)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in a folder `adapters` beside it, which has files of several kinds."""
    folder = tmp_path_factory.mktemp("loaded")
    path = write_random(folder / "base.gguf", "llama", "Q8_0")
    adapters = folder / "adapters"
    (adapters / "deep").mkdir(parents=True)
    for name, seed in (("one.gguf", 1), ("deep/two.gguf", 2)):
        write_adapter(adapters / name, random_pairs(path, 8, seed=seed))
    write_adapter(adapters / "other.gguf", random_pairs(path, 8), architecture="qwen2")
    write_adapter(adapters / "activated.gguf", random_pairs(path, 8), invocation=(3, 4))
    narrow = {name: (a[:, : len(a[0]) // 2].copy(), b) for name, (a, b) in random_pairs(path, 8).items()}
    write_adapter(adapters / "shapes.gguf", narrow)
    whole = (adapters / "one.gguf").read_bytes()
    (adapters / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    (adapters / "text.gguf").write_text("no adapter")
    (adapters / "base.gguf").symlink_to(path)  # a link out of the folder
    (folder / "outside.gguf").write_bytes(whole)
    (adapters / "model.gguf").write_bytes(path.read_bytes())
    return path


@pytest.fixture
def running(serve: Any, base: Path) -> Iterator[Running]:
    folder = base.parent / "adapters"
    words = ("--lora-dir", str(folder), "--lora-key", "given-1", "--api-key", USER, "--parallel", "2")
    with serve(str(base), *words, "--limit", "adapters=3", key=ADMIN) as server:
        yield from clients(server, folder)


def clients(server: Any, folder: Path) -> Iterator[Running]:
    with server.http(ADMIN) as admin, server.http(USER) as user:
        yield Running(admin, user, folder)


def test_an_adapter_is_served_after_it_is_loaded_and_not_after_it_is_unloaded(running: Running) -> None:
    alone = running.answer("base")
    loaded = running.load("one", "one.gguf")
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'one' added successfully.")
    assert running.load("two", str(running.folder / "deep" / "two.gguf")).status_code == 200
    assert {name: each["parent"] for name, each in running.models.items()} == {
        "base": None,
        "one": "base",
        "two": "base",
    }
    assert {each["status"] for each in running.models.values()} == {"ready"}
    answers = {name: running.answer(name) for name in ("base", "one", "two")}
    assert answers["base"]["choices"] == running.answer(None)["choices"] == alone["choices"]
    assert len({str(each["choices"]) for each in answers.values()}) == 3
    assert 'model_name="one"' in running.user.get("/metrics").text

    unloaded = running.unload("one")
    assert (unloaded.status_code, unloaded.text) == (200, "Success: LoRA adapter 'one' removed successfully.")
    assert [*running.models] == ["base", "two"]
    assert refused(running.user, status=404, model="one", prompt="a")["code"] == "model_not_found"
    assert 'model_name="one"' not in running.user.get("/metrics").text
    assert running.answer("two")["choices"] == answers["two"]["choices"]
    assert running.load("one", "one.gguf").status_code == 200
    assert running.answer("one") | {"id": "", "created": 0} == answers["one"] | {"id": "", "created": 0}


def test_a_prompt_of_adapters_that_come_and_go_shares_nothing(running: Running) -> None:
    """The same name stands for one adapter after the other: nothing computed with one is used with the next."""
    running.answer("base")
    seen = []
    for path in ("one.gguf", "deep/two.gguf", "one.gguf"):
        assert running.load("same", path).status_code == 200
        answer = running.answer("same")
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert running.answer("same")["usage"]["prompt_tokens_details"]["cached_tokens"] > 190
        seen.append((answer["system_fingerprint"], str(answer["choices"])))
        assert running.unload("same").status_code == 200
    assert seen[0] == seen[2] != seen[1]


def test_three_adapters_side_by_side_have_the_numbers_that_each_has_alone(running: Running) -> None:
    assert running.load("one", "one.gguf").status_code == running.load("two", "deep/two.gguf").status_code == 200
    bodies = [
        {"model": name, "prompt": PROMPT[:length], "seed": seed, "temperature": 0.9, "max_tokens": 12, "logprobs": 2}
        for name in ("base", "one", "two")
        for seed, length in enumerate((200, 200, 90, 3))
    ]
    salted = [body | {"cache_salt": "alone"} for body in bodies]
    alone = [complete(running.user, **body)["choices"] for body in salted]
    with ThreadPoolExecutor(len(bodies)) as pool:
        crowd = [*pool.map(lambda body: complete(running.user, **body)["choices"], 3 * bodies)]
    assert crowd == 3 * alone
    assert len({str(each) for each in alone[:12:4]}) == 3


def test_running_requests_of_an_unloaded_adapter_end_as_they_would_have(running: Running) -> None:
    assert running.load("one", "one.gguf").status_code == 200
    body = {"model": "one", "prompt": PROMPT, "seed": 1, "max_tokens": 250, "ignore_eos": True, "logprobs": 0}
    whole = complete(running.user, **body, cache_salt="alone")
    begun = threading.Event()

    def streamed() -> list[Json]:
        chunks = []
        with running.user.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    chunks.append(json.loads(line.removeprefix("data: ")))
                    begun.set()
        return chunks

    with ThreadPoolExecutor(1) as pool:
        ending = pool.submit(streamed)
        assert begun.wait(60)
        assert running.unload("one").status_code == 200
        assert "one" not in running.models
        assert running.load("one", "deep/two.gguf").status_code == 200  # beside the one that still ends
        other = complete(running.user, **body)
        (choice,) = joined(ending.result(60))
    assert choice["text"] == whole["choices"][0]["text"] != other["choices"][0]["text"]
    assert choice["logprobs"] == whole["choices"][0]["logprobs"]
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("none.gguf", 404, "There is no adapter none.gguf"),
        ("deep", 400, "deep is no file"),
        ("text.gguf", 400, "text.gguf is not a GGUF file"),
        ("cut.gguf", 400, "cut.gguf"),
        ("model.gguf", 400, "model.gguf is no adapter but of the type 'model'"),
        ("other.gguf", 400, "other.gguf is an adapter of qwen2 models"),
        ("activated.gguf", 400, "is an activated LoRA"),
        ("shapes.gguf", 400, "cannot load the adapter shapes.gguf"),
        ("base.gguf", 400, "must name a file in the server's folder"),
        ("../outside.gguf", 400, "must name a file in the server's folder"),
        ("/etc/passwd", 400, "must name a file in the server's folder"),
        ("/etc/no-such-file", 400, "must name a file in the server's folder"),
        ("x" * 4000, 400, "must name a file in the server's folder"),
        ("a\0b", 400, "must be a string"),
        ("", 400, "must be a string"),
        (7, 400, "must be a string"),
        (None, 400, "must be a string"),
    ],
)
def test_a_file_that_is_no_adapter_of_this_model_is_refused(
    refusing: Running, path: Any, status: int, message: str
) -> None:
    error = problem(refusing.load("new", path), status)
    assert error["param"] == "lora_path"
    assert message in error["message"]
    assert str(refusing.folder.parent) not in error["message"]
    assert [*refusing.models] == ["base"]


@pytest.fixture(scope="module")
def refusing(serve: Any, base: Path) -> Iterator[Running]:
    """A server to which the requests of a test change nothing."""
    folder = base.parent / "adapters"
    words = ("--lora-dir", str(folder), "--lora-key", "given-1", "--api-key", USER, "--parallel", "2")
    with serve(str(base), *words, key=ADMIN) as server:
        yield from clients(server, folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("base", "There is already a model with the name base"),
        ("", "must be a string"),
        (None, "must be a string"),
        (["one"], "must be a string"),
        ("x" * 257, "must be a string"),
        ("a\nb", "printable"),
    ],
)
def test_a_name_that_cannot_be_used_is_refused(refusing: Running, name: Any, message: str) -> None:
    error = problem(refusing.load(name, "one.gguf"), 400)
    assert error["param"] == "lora_name"
    assert message in error["message"]
    assert [*refusing.models] == ["base"]


def test_an_adapter_is_not_loaded_twice_nor_more_than_the_limit_allows(running: Running) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = [*pool.map(lambda _: running.load("one", "one.gguf"), range(4))]
    assert sorted(each.status_code for each in answers) == [200, 400, 400, 400]
    assert "already a model" in problem(max(answers, key=lambda each: each.status_code), 400)["message"]
    for name in ("two", "three"):
        assert running.load(name, "one.gguf").status_code == 200
    assert problem(running.load("four", "one.gguf"), 503)["code"] == "too_many_adapters"
    assert running.unload("three").status_code == 200


def test_what_cannot_be_unloaded_is_refused_by_name(refusing: Running) -> None:
    for name, status in (("none", 404), ("base", 400), (7, 400), (None, 400)):
        error = problem(refusing.unload(name), status)
        assert error["param"] == "lora_name"
    assert problem(refusing.unload("none", lora_int_id=1), 400)["param"] == "lora_int_id"
    assert problem(refusing.load("new", "one.gguf", load_inplace=True), 400)["param"] == "load_inplace"
    assert problem(refusing.load("new", "one.gguf", scale=2), 400)["param"] == "scale"
    assert refusing.load("new", "none.gguf", load_inplace=False).status_code == 404


def test_only_a_key_that_may_loads_and_unloads(refusing: Running, http: httpx.Client) -> None:
    for route in ("load", "unload"):
        path, body = f"/v1/{route}_lora_adapter", {"lora_name": "one", "lora_path": "one.gguf"}
        assert problem(refusing.user.post(path, json=body), 403)["code"] == "permission_denied"
        anonymous = httpx.post(refusing.user.base_url.join(path), json=body, trust_env=False)
        problem(anonymous, 401)
        assert problem(http.post(path, json=body), 403)["code"] == "adapters_disabled"  # without --lora-dir
    assert [*refusing.models] == ["base"]


def test_with_keep_alive_an_adapter_is_unloaded_and_loaded_on_demand(serve: Any, base: Path) -> None:
    folder = base.parent / "adapters"
    words = ("--lora-dir", str(folder), "--lora-key", "given-1", "--parallel", "2", "--keep-alive", "0")
    with serve(str(base), *words, key=ADMIN) as server, server.http(ADMIN) as admin:
        running = Running(admin, admin, folder)
        assert running.load("one", "one.gguf").status_code == 200
        first = running.answer("one")
        assert running.answer("base")["choices"] != first["choices"]
        again = running.answer("one")
        assert again["choices"] == first["choices"]
        assert running.unload("one").status_code == 200
        problem(admin.post("/v1/completions", json={"model": "one", "prompt": "a"}), 404)
