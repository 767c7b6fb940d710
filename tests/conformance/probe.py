"""A client for the server under test: sends requests, checks responses, and reads tokenizer and context facts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import httpx
from verdict import NotApplicable

Json = dict[str, Any]

ENVELOPE = {"message", "type", "param", "code"}
COLUMNS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
STORY = "Once upon a time"


class Probe:
    """Sends requests to one server.

    `url`: the base URL, which ends in /v1. `key`: the API key. `model`: the model to request; by default the first that
    the server lists.
    """

    def __init__(self, url: str, key: str | None = None, model: str | None = None) -> None:
        self.url = url.rstrip("/")
        self.key = key
        self.http = self.client(key)
        self.model = model or self.http.get("/models").json()["data"][0]["id"]

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def client(self, key: str | None) -> httpx.Client:
        """An HTTP client that sends this API key, or none."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=100, trust_env=False)

    # ---- requests

    def ask(self, **body: Any) -> httpx.Response:
        """The response to a request with this body, which gets the model if it has none."""
        return self.http.post("/completions", json={"model": self.model} | body)

    def send(self, content: bytes, kind: str = "application/json") -> httpx.Response:
        """The response to a body of these bytes."""
        return self.http.post("/completions", content=content, headers={"Content-Type": kind})

    def complete(self, **body: Any) -> Json:
        """The whole response to a request that must be accepted."""
        response = self.ask(**body)
        has_status(response, 200)
        answer: Json = response.json()
        return answer

    def one(self, **body: Any) -> Json:
        """The only choice of the whole response."""
        (choice,) = self.complete(**body)["choices"]
        return choice

    def stream(self, **body: Any) -> list[Json]:
        """The chunks of a streamed response. Raises `AssertionError` for wrong server-sent events."""
        response = self.ask(**body, stream=True)
        has_status(response, 200)
        kind = response.headers["content-type"]
        assert kind.startswith("text/event-stream"), f"the stream's content type is {kind}"
        lines = [line for line in re.split(r"\r\n|\n|\r", response.content.decode()) if line]
        data = [line.removeprefix("data: ") for line in lines if not line.startswith(":")]
        others = [line for line in lines if not line.startswith(("data: ", ":"))]
        assert not others, f"the stream has the line {others[0]!r}"
        assert data, "the stream is empty"
        assert data.pop() == "[DONE]", "the stream does not end with [DONE]"
        return [json.loads(chunk) for chunk in data]

    def refused(self, param: str | None, **body: Any) -> Json:
        """The error of a request that must be refused. Its `param` must be null or this one."""
        sent = ", ".join(f"{name}={value!r}"[:60] for name, value in body.items())
        try:
            error = error_of(self.ask(**body), 400)
        except AssertionError as wrong:
            raise AssertionError(f"{sent}: {wrong}") from None
        assert error["type"] == "invalid_request_error", f"{sent}: the type is {error['type']!r}"
        assert error["param"] in (None, param), f"{sent}: the param is {error['param']!r}"
        return error

    def scored(self, prompt: str | list[int], **body: Any) -> Json:
        """The logprobs columns of the prompt, without the generated token."""
        answer = self.complete(prompt=prompt, echo=True, max_tokens=1, **({"logprobs": 1, "temperature": 0} | body))
        columns = answer["choices"][0]["logprobs"]
        return {name: columns[name][: answer["usage"]["prompt_tokens"]] for name in COLUMNS}

    # ---- facts about the server, from routes outside the API

    def tokens(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """The token ids of a text, from `/tokenize`. Raises `NotApplicable` if the server does not have it."""
        body = {"model": self.model, "prompt": text, "add_special_tokens": add_special_tokens}
        response = self._outside_api("POST", "/tokenize", json=body)
        if response.status_code != 200 or "tokens" not in response.json():
            raise NotApplicable("the server has no /tokenize")
        ids: list[int] = response.json()["tokens"]
        return ids

    @cached_property
    def token(self) -> int:
        """The id of an ordinary token."""
        try:
            return self.tokens(" dog")[0]
        except NotApplicable:
            return 1000

    @cached_property
    def context(self) -> int | None:
        """The most tokens that a prompt and its completion can have together; None if the server does not report it."""
        found = self.http.get("/models").json()["data"]
        length: int | None = next((model.get("max_model_len") for model in found if model["id"] == self.model), None)
        return length

    @cached_property
    def last_token(self) -> int | None:
        """The highest token id of the vocabulary; None if the server does not report it."""
        size = self._tokenizer_info.get("vocab_size")
        return None if size is None else size - 1

    @cached_property
    def eos(self) -> int | None:
        """The id of the end token; None if the server does not report it."""
        info = self._tokenizer_info
        found: int | None = info.get("eos_token_id")
        if found is None and info.get("eos_token"):
            found = (self.tokens(info["eos_token"]) or [None])[0]
        return found

    @property
    def eos_ban(self) -> dict[str, int]:
        """A `logit_bias` that bans the end token; empty if it is not known."""
        return {} if self.eos is None else {str(self.eos): -100}

    @cached_property
    def _tokenizer_info(self) -> Json:
        response = self._outside_api("GET", "/tokenizer_info")
        return response.json() if response.status_code == 200 else {}

    def _outside_api(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self.http.request(method, self.url.removesuffix("/v1") + path, **options)


# ---- checks of responses


def has_status(response: httpx.Response, status: int) -> None:
    found = response.status_code
    assert found == status, f"expected {status}, got {found}" + (found != 200) * f" {response.text[:120]}"


def error_of(response: httpx.Response, status: int) -> Json:
    """The error object of a response that must have this status and be an error."""
    has_status(response, status)
    assert response.headers["content-type"].startswith("application/json"), "the error is not JSON"
    answer = response.json()
    assert list(answer) == ["error"], f"the error is {response.text[:120]}"
    error: Json = answer["error"]
    assert error.keys() == ENVELOPE, f"the error's keys are {sorted(error)}"
    return error


def has_message(error: Json, message: str) -> None:
    assert error["message"] == message, f"the message is {error['message']!r}"


def has_no_param_and_code(error: Json) -> None:
    assert (error["param"], error["code"]) == (None, None), f"param {error['param']!r}, code {error['code']!r}"


def joined(chunks: Iterable[Json]) -> list[Json]:
    """The choices that the chunks of a stream add up to, by index."""
    choices: dict[int, Json] = {}
    for part in (part for chunk in chunks for part in chunk["choices"]):
        whole = choices.setdefault(part["index"], part | {"text": "", "logprobs": None})
        whole["text"] += part["text"]
        whole["finish_reason"] = part["finish_reason"]
        if part["logprobs"] is not None:
            before = whole["logprobs"] or {name: [] for name in COLUMNS}
            whole["logprobs"] = {name: before[name] + (part["logprobs"][name] or []) for name in COLUMNS}
    return [choices[index] for index in sorted(choices)]


def token_bytes(token: str) -> bytes:
    """The bytes of a token in the logprobs columns."""
    if not token.startswith("bytes:"):
        return token.encode()
    assert re.fullmatch(r"bytes:( |[!-~]|\\x[0-9a-f]{2})+", token), f"a token is {token!r}"
    return token.removeprefix("bytes:").encode().decode("unicode_escape").encode("latin-1")


def assert_close(found: Iterable[float | None], wanted: Iterable[float | None], within: float) -> None:
    """Check that two columns of log probabilities differ by at most `within`."""
    pairs = list(zip(found, wanted, strict=True))
    apart = max((abs(one - other) for one, other in pairs if one is not None and other is not None), default=0)
    assert apart <= within, f"log probabilities differ by {apart:.4f}"
    assert all((one is None) == (other is None) for one, other in pairs), "a log probability is null on one side only"
