"""A model that needs a BOS: each way to send a prompt has the numbers of an independent forward pass.

An evaluation sends texts or token ids, one prompt or several in a request, whole or streamed. The model's weights and
its keys and values are F32, so that a difference is a mistake and not rounding. Without its BOS the model gives other
numbers, so a BOS too few or too many fails the tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np
import pytest
from completion_requests import Json, complete, joined, stream

from oracle.oracle import Oracle
from oracle.tiny import write_tiny

TEXTS = ("Hello", "the cat was in a hat.", "ed and said", "a", "It was to the king, said the", "One. Two? Three!")
NATS = 1e-3
Form = Literal["text", "text with BOS", "ids", "ids with BOS"]


@dataclass(frozen=True, slots=True)
class Mode:
    """One way to send a prompt: its form, and the request's `add_special_tokens`, absent if None.

    `reads_bos`: whether the model then reads a BOS, by a server with and without `--bos-before-ids`.
    """

    form: Form
    add: bool | None
    reads_bos: tuple[bool, bool]


MODES = {
    "text": Mode("text", None, (True, True)),
    "text-and-true": Mode("text", True, (True, True)),
    "text-and-false": Mode("text", False, (False, False)),
    "text-with-bos": Mode("text with BOS", None, (True, True)),
    "text-with-bos-and-true": Mode("text with BOS", True, (True, True)),
    "text-with-bos-and-false": Mode("text with BOS", False, (True, True)),
    "ids": Mode("ids", None, (True, False)),
    "ids-and-true": Mode("ids", True, (True, True)),
    "ids-and-false": Mode("ids", False, (False, False)),
    "ids-with-bos": Mode("ids with BOS", None, (True, True)),
    "ids-with-bos-and-true": Mode("ids with BOS", True, (True, True)),
    "ids-with-bos-and-false": Mode("ids with BOS", False, (True, True)),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "bos.gguf", vocabulary="spm")


@pytest.fixture(scope="module")
def oracle(model: Path) -> Oracle:
    return Oracle(model)


@pytest.fixture(scope="module", params=[True, False], ids=["bos-before-ids", "by-default"])
def asked(request: pytest.FixtureRequest, model: Path, serve: Any) -> Iterator[tuple[httpx.Client, bool]]:
    """A client, and whether its server runs with `--bos-before-ids`."""
    option = ("--bos-before-ids",) if request.param else ()
    with serve(str(model), "--kv-type", "f32", "--parallel", "4", *option, key=None) as server, server.http() as client:
        yield client, request.param


def bare_ids(http: httpx.Client, text: str) -> list[int]:
    return http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"]  # type: ignore[no-any-return]


def written(form: Form, text: str, ids: list[int], bos: tuple[str, int]) -> str | list[int]:
    """The prompt as the client sends it."""
    name, token = bos
    match form:
        case "text":
            return text
        case "text with BOS":
            return name + text
        case "ids":
            return ids
        case "ids with BOS":
            return [token, *ids]


def check(choice: Json, oracle: Oracle, sent: list[int], bos: int | None) -> None:
    """Compare a choice's prompt and numbers. `sent`: the tokens that the client sent; `bos`: the one that was added."""
    read = [*([] if bos is None else [bos]), *sent]
    assert choice["prompt_token_ids"] == read
    rows = oracle.log_probs(read)
    columns = choice["logprobs"]
    known = columns["token_logprobs"]
    assert len(known) == len(sent) + 1  # lm-eval counts from both ends: what the client sent, and one generated token
    assert known[0] is None
    made = choice["token_ids"]
    after = [*read, *made]
    first = len(read) - len(sent) + 1
    expected = [rows[position - 1][after[position]] for position in range(first, len(after))]
    assert known[1:] == pytest.approx(expected, abs=NATS)
    for position, top in zip(range(first, len(after)), columns["top_logprobs"][1:], strict=True):
        assert max(top.values()) == pytest.approx(rows[position - 1].max(), abs=NATS)
    assert made == [int(rows[-1].argmax())]


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
def test_each_sample_has_the_numbers_of_the_forward_pass(
    asked: tuple[httpx.Client, bool], oracle: Oracle, mode: Mode, streamed: bool
) -> None:
    http, option = asked
    facts = http.get("/tokenizer_info").json()
    bos = (facts["bos_token"], facts["bos_token_id"])
    ids = [bare_ids(http, text) for text in TEXTS]
    body: dict[str, Any] = {
        "prompt": [written(mode.form, text, each, bos) for text, each in zip(TEXTS, ids, strict=True)],
        "echo": True,
        "logprobs": 1,
        "max_tokens": 1,
        "temperature": 0,
        "return_token_ids": True,
    }
    if mode.add is not None:
        body["add_special_tokens"] = mode.add
    own = mode.form in ("text with BOS", "ids with BOS")
    added = mode.reads_bos[0 if option else 1] and not own
    if streamed:
        chunks = stream(http, **body)
        choices = joined(chunks)
        for choice in choices:
            parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
            choice["prompt_token_ids"] = next(part["prompt_token_ids"] for part in parts if "prompt_token_ids" in part)
            choice["token_ids"] = [token for part in parts for token in part.get("token_ids", [])]
    else:
        answer = complete(http, **body)
        choices = answer["choices"]
        assert answer["usage"]["prompt_tokens"] == sum(map(len, ids)) + own * len(TEXTS)
    for choice, each in zip(choices, ids, strict=True):
        check(choice, oracle, [bos[1], *each] if own else each, bos[1] if added else None)


def test_without_its_bos_the_model_gives_other_numbers(oracle: Oracle) -> None:
    """Otherwise the tests above could not fail."""
    bos = oracle.fields["tokenizer.ggml.bos_token_id"]
    tokens = [oracle.fields["tokenizer.ggml.tokens"].index(each) for each in "Hat"]
    without, one, two = (oracle.log_probs([*more, *tokens])[-1] for more in ([], [bos], [bos, bos]))
    assert np.abs(without - one).max() > 100 * NATS
    assert np.abs(one - two).max() > 100 * NATS


def test_the_option_changes_nothing_for_a_model_without_a_bos(serve: Any, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "plain.gguf", vocabulary="bytes")
    with serve(str(path), "--parallel", "1", "--bos-before-ids", key=None) as server, server.http() as http:
        ids = bare_ids(http, "Hello")
        answer = complete(http, prompt=ids, max_tokens=1, return_token_ids=True, add_special_tokens=True)
        assert answer["choices"][0]["prompt_token_ids"] == ids


def test_a_prompt_that_fills_the_context_has_no_place_for_a_bos(asked: tuple[httpx.Client, bool]) -> None:
    http, option = asked
    context = http.get("/tokenizer_info").json()["model_max_length"]
    body = {"prompt": [bare_ids(http, "a")[0]] * (context - 1), "max_tokens": 1}
    response = http.post("/v1/completions", json=body)
    assert response.status_code == (400 if option else 200)
