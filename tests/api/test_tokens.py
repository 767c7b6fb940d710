"""The routes `/tokenize`, `/detokenize` and `/tokenizer_info`: round trips, the BOS, and invalid bodies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from completion_requests import complete, problem, tokens_of

from oracle.tiny import write_tiny


@pytest.fixture(scope="module")
def with_bos(serve: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a server with a model that needs a BOS before a text."""
    path = write_tiny(tmp_path_factory.mktemp("models") / "bos.gguf", vocabulary="spm")
    with serve(str(path), "--parallel", "1", key=None) as server, server.http() as client:
        yield client


@pytest.mark.parametrize(
    "text", ["", " ", "Once upon a time", "  two\n\n\tlines ", "héllo 😀 漢字", "a\x00b", "’" * 50]
)
def test_tokenizing_and_detokenizing_returns_the_text(http: httpx.Client, text: str) -> None:
    answer = http.post("/detokenize", json={"tokens": tokens_of(http, text)})
    assert answer.json() == {"prompt": text}


def test_tokenize_counts_tokens_as_completions_do(http: httpx.Client, facts: dict[str, Any], server: Any) -> None:
    text = "The dog ran to the park."
    answer = http.post("/tokenize", json={"model": server.model, "prompt": text}).json()
    assert answer.keys() == {"tokens", "count", "max_model_len"}
    assert answer["count"] == len(answer["tokens"])
    assert answer["count"] == complete(http, prompt=text, max_tokens=1)["usage"]["prompt_tokens"]
    assert answer["max_model_len"] == facts["model_max_length"]


def test_special_tokens_have_names_and_ids(http: httpx.Client, facts: dict[str, Any]) -> None:
    for kind in ("bos", "eos"):
        name, token = facts[f"{kind}_token"], facts[f"{kind}_token_id"]
        assert tokens_of(http, name) == [token]
        assert http.post("/detokenize", json={"tokens": [token]}).json() == {"prompt": name}
        assert 0 <= token < facts["vocab_size"]


def test_every_id_has_a_text(http: httpx.Client, facts: dict[str, Any]) -> None:
    answer = http.post("/detokenize", json={"tokens": list(range(facts["vocab_size"]))})
    assert answer.status_code == 200
    assert facts["eos_token"] in answer.json()["prompt"]


def test_a_bos_is_added_where_the_model_wants_one(with_bos: httpx.Client) -> None:
    facts = with_bos.get("/tokenizer_info").json()
    bare = with_bos.post("/tokenize", json={"prompt": "Hello", "add_special_tokens": False}).json()["tokens"]
    assert facts["add_bos_token"] is True
    assert tokens_of(with_bos, "Hello") == [facts["bos_token_id"], *bare]
    assert tokens_of(with_bos, "") == [facts["bos_token_id"]]


@pytest.mark.parametrize("more", ["Hello", "", "<s>Hello", " the"])
def test_a_text_that_begins_with_the_bos_gets_no_second_one(with_bos: httpx.Client, more: str) -> None:
    bos = with_bos.get("/tokenizer_info").json()["bos_token"]
    bare = with_bos.post("/tokenize", json={"prompt": bos + more, "add_special_tokens": False}).json()["tokens"]
    assert tokens_of(with_bos, bos + more) == bare
    body = {"prompt": bos + more, "max_tokens": 1, "echo": True, "logprobs": 0, "return_token_ids": True}
    answer = complete(with_bos, **body)
    (choice,) = answer["choices"]
    assert choice["prompt_token_ids"] == bare
    assert answer["usage"]["prompt_tokens"] == len(bare)
    assert choice["text"].startswith(bos + more)
    columns = choice["logprobs"]
    assert len(columns["tokens"]) == len(bare) + 1
    assert (columns["tokens"][0], columns["text_offset"][:2]) == (bos, [0, len(bos)])
    for token, offset in zip(columns["tokens"][:-1], columns["text_offset"], strict=False):
        assert choice["text"][offset:].startswith(token)


def test_tokenize_includes_the_bos_and_usage_does_not_count_it(with_bos: httpx.Client) -> None:
    """`/tokenize` returns the tokens that the model reads; `usage` counts those that the client is charged for."""
    facts = with_bos.get("/tokenizer_info").json()
    for text, own in (("Hello", 0), ("the cat", 0), (facts["bos_token"] + "Hello", 1)):
        tokens = tokens_of(with_bos, text)
        answer = complete(with_bos, prompt=text, max_tokens=1, return_token_ids=True)
        assert answer["choices"][0]["prompt_token_ids"] == tokens
        assert tokens.count(facts["bos_token_id"]) == 1
        assert answer["usage"]["prompt_tokens"] == len(tokens) - 1 + own


def test_no_bos_is_added_where_the_model_wants_none(http: httpx.Client, facts: dict[str, Any]) -> None:
    bare = http.post("/tokenize", json={"prompt": "Hello", "add_special_tokens": False}).json()["tokens"]
    assert facts["add_bos_token"] is False
    assert tokens_of(http, "Hello") == bare


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": None}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": 1}, "add_special_tokens"),
        ("/tokenize", {"prompt": "a", "foo": 1}, "foo"),
        ("/tokenize", {"prompt": "a", "model": 5}, "model"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": None}, "tokens"),
        ("/detokenize", {"tokens": "1"}, "tokens"),
        ("/detokenize", {"tokens": ["1"]}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens"),
        ("/detokenize", {"tokens": [1.5]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [10**30]}, "tokens"),
        ("/detokenize", {"tokens": [1], "prompt": "a"}, "prompt"),
    ],
    ids=str,
)
def test_invalid_fields_are_refused_by_name(http: httpx.Client, path: str, body: Any, param: str) -> None:
    error = problem(http.post(path, json=body), 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert param in error["message"]


def test_an_id_beyond_the_vocabulary_is_refused(http: httpx.Client, facts: dict[str, Any]) -> None:
    assert http.post("/detokenize", json={"tokens": [facts["vocab_size"] - 1]}).status_code == 200
    assert problem(http.post("/detokenize", json={"tokens": [facts["vocab_size"]]}), 400)["param"] == "tokens"


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_another_model_is_not_found(http: httpx.Client, path: str) -> None:
    body = {"model": "no-such", "prompt": "a"} if path == "/tokenize" else {"model": "no-such", "tokens": [1]}
    assert problem(http.post(path, json=body), 404)["code"] == "model_not_found"


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
@pytest.mark.parametrize("body", [b"", b"[]", b'{"prompt":', b'{"prompt": "\\ud800"}', b"\xff"])
def test_a_body_must_be_a_json_object(http: httpx.Client, path: str, body: bytes) -> None:
    problem(http.post(path, content=body, headers={"Content-Type": "application/json"}), 400)


def test_special_tokens_in_texts_can_be_switched_off(serve: Any) -> None:
    with serve("--plain-text", "--parallel", "1", key=None) as server, server.http() as client:
        facts = client.get("/tokenizer_info").json()
        tokens = client.post("/tokenize", json={"prompt": facts["eos_token"]}).json()["tokens"]
        assert facts["eos_token_id"] not in tokens
        body = {"prompt": facts["eos_token"], "max_tokens": 1, "return_token_ids": True}
        assert client.post("/v1/completions", json=body).json()["choices"][0]["prompt_token_ids"] == tokens


@pytest.mark.parametrize("text", ["the cat", " the", "a", ""])
def test_the_space_that_sentencepiece_adds_is_removed(bos_client: httpx.Client, text: str) -> None:
    tokens = bos_client.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"]
    assert bos_client.post("/detokenize", json={"tokens": tokens}).json()["prompt"] == text
