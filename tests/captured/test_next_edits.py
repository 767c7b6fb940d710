"""Sends the requests of editors for next edits (Zeta 2 and 2.1, Sweep), and reads the responses as they do.

A line of next_edits.jsonl is a request that was written after the client's source with a text of ours. The models are
tiny: they have the vocabulary's special tokens and generate one known answer, with markers that are several tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from gguf import TokenType

from oracle import tiny
from oracle.chain import write_chain_model

Json = dict[str, Any]

REQUESTS = [json.loads(line) for line in (Path(__file__).parent / "next_edits.jsonl").read_text("utf-8").splitlines()]
STREAMED = [seen for seen in REQUESTS if seen["body"].get("stream")]
SEED_CODER = ("<[fim-suffix]>", "<[fim-prefix]>", "<[fim-middle]>", "<filename>", "<[end▁of▁sentence]>")
QWEN = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|file_sep|>", "<|cursor|>")
LINE = ("    return ", "sum(", "pri", "ces", ")\n")
# The special tokens of each model, its end token, and its answer: the token that it follows, then its tokens' texts.
MODELS = {
    "zeta2": (
        SEED_CODER,
        SEED_CODER[-1],
        (SEED_CODER[2], *LINE, ">>", ">>>>", "> UPD", "ATED", "\n"),
    ),
    "zeta2.1": (
        SEED_CODER,
        SEED_CODER[-1],
        (SEED_CODER[2], "<|mark", "er_1", "|>", *LINE, "<|", "marker", "_2|>"),
    ),
    "sweep-next-edit": (QWEN, "<|endoftext|>", ("\n", *LINE, "<|file_sep|>")),
}


def write_answering_model(path: Path, names: tuple[str, ...], end: str, answer: tuple[str, ...]) -> Path:
    """Write a model with these special tokens that generates `answer[1:]` after the token `answer[0]`, then `end`."""
    alphabet = tiny.byte_alphabet()
    words = tiny.with_tokens(
        tiny.byte_vocabulary(infill=False, add_bos=False), *((name, TokenType.CONTROL) for name in names)
    )
    words = replace(words, special=words.special | {"eos": end})
    spelled = ["".join(alphabet[byte] for byte in piece.encode()) for piece in answer]
    tokens = [piece if piece in names else text for piece, text in zip(answer, spelled, strict=True)]
    new = [token for token in tokens if token not in words.tokens]
    words = tiny.with_tokens(words, *((token, TokenType.NORMAL) for token in new))
    chain = [words.tokens.index(token) for token in (*tokens, end)]
    return write_chain_model(path, words, chain, context=2048)


@pytest.fixture(scope="module")
def http(serve: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a server with all three models, which answer with the most likely tokens by default."""
    folder = tmp_path_factory.mktemp("next-edits")
    defaults = folder / "defaults.toml"
    defaults.write_text("".join(f'["{name}"]\ntemperature = 0\n' for name in MODELS))
    paths = [str(write_answering_model(folder / f"{name}.gguf", *model)) for name, model in MODELS.items()]
    aliases = [word for name in MODELS for word in ("--alias", name)]
    words = (*paths, *aliases, "--defaults", str(defaults), "--parallel", "2")
    with serve(*words, key=None) as server, server.http() as client:
        yield client


def read_lines(lines: Iterable[str], stops: list[str]) -> list[str]:
    """The lines of a streamed answer as cursortab.nvim reads them: it looks for stop strings in each event too."""
    text = ""
    for line in lines:
        if line == "data: [DONE]":
            break
        assert not line or line.startswith("data: ")
        if line:
            chunk = json.loads(line.removeprefix("data: "))
            assert not any(stop in chunk["choices"][0]["text"] for stop in stops)
            text += chunk["choices"][0]["text"]
    return text.splitlines(keepends=True)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("seen", REQUESTS, ids=[seen["client"] for seen in REQUESTS])
def test_an_editor_gets_the_edit(http: httpx.Client, seen: Json, stream: bool) -> None:
    body = seen["body"] | {"stream": stream}
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    if stream:
        assert "".join(read_lines(answer.text.split("\n"), body["stop"])) == seen["expected"]
        return
    whole = answer.json()
    # the members that Zed's `RawCompletionResponse` requires
    assert all(isinstance(whole[name], str) for name in ("id", "object", "model"))
    assert isinstance(whole["created"], int)
    assert whole["usage"].keys() >= {"prompt_tokens", "completion_tokens", "total_tokens"}
    assert (whole["choices"][0]["text"], whole["choices"][0]["finish_reason"]) == (seen["expected"], "stop")


@pytest.mark.parametrize("seen", REQUESTS, ids=[seen["client"] for seen in REQUESTS])
def test_each_marker_is_read_as_its_token(http: httpx.Client, seen: Json) -> None:
    body = seen["body"] | {"stream": False, "return_token_ids": True}
    choice = http.post("/v1/completions", json=body).json()["choices"][0]
    names, end, _ = MODELS[body["model"]]
    for name in (*names, end):
        (token,) = http.post("/tokenize", json={"model": body["model"], "prompt": name}).json()["tokens"]
        assert choice["prompt_token_ids"].count(token) == body["prompt"].count(name)
    assert choice["text"] == seen["expected"]


@pytest.mark.parametrize("seen", STREAMED, ids=[seen["client"] for seen in STREAMED])
def test_requests_that_are_cancelled_at_each_keystroke_leave_nothing(http: httpx.Client, seen: Json) -> None:
    """The next request of the same file begins with tokens from the prefix cache."""
    body = seen["body"]
    for typed in range(1, 8):
        prompt = body["prompt"].replace("price)", f"{'prices'[:typed]})")
        with http.stream("POST", "/v1/completions", json=body | {"prompt": prompt}) as response:
            next(response.iter_lines())
    with http.stream("POST", "/v1/completions", json=body) as response:
        assert "".join(read_lines(response.iter_lines(), body["stop"])) == seen["expected"]
    usage = http.post("/v1/completions", json=body | {"stream": False}).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] > usage["prompt_tokens"] // 2
