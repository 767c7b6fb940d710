"""Behaviour that OpenAI's API leaves open or that goes beyond its limits. tests/conformance tests the API's rules."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import httpx
import pytest
from completion_requests import COLUMNS, complete, is_idle, joined, one, refused, stream, tokens_of
from one_text_model import TEXT

STORY = "Once upon a time"

# ---- beyond OpenAI's limits


@pytest.mark.parametrize("model", [{}, {"model": None}, {"model": ""}], ids=["absent", "null", "empty"])
def test_the_only_model_need_not_be_named(http: httpx.Client, server: Any, model: dict[str, Any]) -> None:
    assert complete(http, prompt="a", max_tokens=1, **model)["model"] == server.model


@pytest.mark.parametrize("count", [15, 20])
def test_up_to_20_alternatives_are_returned(http: httpx.Client, endless: dict[str, int], count: int) -> None:
    columns = one(http, prompt=STORY, logprobs=count, logit_bias=endless)["logprobs"]
    assert {len(top) for top in columns["top_logprobs"]} <= {count, count + 1}
    refused(http, "logprobs", prompt="a", logprobs=21)


def test_up_to_16_stop_strings_are_accepted(one_text_client: httpx.Client) -> None:
    misses = [f"no{number}" for number in range(15)]
    assert one(one_text_client, prompt="(", max_tokens=30, stop=[*misses, "6"])["text"] == "é😀漢) 12345"
    refused(one_text_client, "stop", prompt="(", stop=[*misses, "5", "6"])


def test_absent_null_and_empty_prompts_are_equal(http: httpx.Client) -> None:
    bodies: list[dict[str, Any]] = [{}, {"prompt": None}, {"prompt": ""}]
    answers = [complete(http, temperature=0, **body)["choices"] for body in bodies]
    assert answers[0] == answers[1] == answers[2]


# ---- best_of


def test_best_of_returns_the_best_of_the_candidates_of_n(http: httpx.Client, endless: dict[str, int]) -> None:
    body = {"prompt": STORY, "logprobs": 0, "seed": 7, "max_tokens": 12, "logit_bias": endless}
    candidates = [mean_of(choice) for choice in complete(http, **body, n=5)["choices"]]
    best = [mean_of(choice) for choice in complete(http, **body, n=3, best_of=5)["choices"]]
    assert best == pytest.approx(sorted(candidates, reverse=True)[:3])


def mean_of(choice: dict[str, Any]) -> float:
    return fmean(choice["logprobs"]["token_logprobs"])


# ---- the end of a text, with the model that generates one fixed text


@pytest.mark.parametrize(("stop", "text"), [("34", "é😀漢) 12"), (None, TEXT[1:])], ids=["stop", "end"])
def test_there_are_no_tokens_after_the_end_of_the_text(
    one_text_client: httpx.Client, stop: str | None, text: str
) -> None:
    choice = one(one_text_client, prompt="(", max_tokens=100, logprobs=1, stop=stop)
    assert (choice["text"], choice["finish_reason"]) == (text, "stop")
    assert len(choice["logprobs"]["tokens"]) == len(text.encode())


def test_only_a_stop_string_that_is_complete_ends_the_text(one_text_client: httpx.Client) -> None:
    assert one(one_text_client, prompt="(é😀漢) 1234", temperature=0, stop=" 78")["text"] == "567890."
    choice = one(one_text_client, prompt="(é😀漢) 1234", temperature=0, stop="78")
    assert (choice["text"], choice["finish_reason"]) == ("56", "stop")


def test_a_stop_string_that_begins_in_the_prompt_does_not_count(one_text_client: httpx.Client) -> None:
    assert one(one_text_client, prompt="123", echo=True, max_tokens=5, stop=["23", "34"])["text"] == "12345678"


def test_an_end_is_a_chunk_with_empty_columns(one_text_client: httpx.Client) -> None:
    *_, last = stream(one_text_client, prompt="(", max_tokens=30, logprobs=1)
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    assert last["choices"][0] == {"text": "", "index": 0, "logprobs": columns, "finish_reason": "stop"}


def test_chunks_hold_whole_characters(one_text_client: httpx.Client) -> None:
    chunks = stream(one_text_client, prompt="(", max_tokens=30)
    assert not any("\ufffd" in chunk["choices"][0]["text"] for chunk in chunks)
    assert joined(chunks)[0]["text"] == TEXT[1:]


# ---- suffix


def test_a_suffix_needs_an_infill_model_and_counts_as_prompt(
    http: httpx.Client, no_infill_client: httpx.Client
) -> None:
    error = refused(no_infill_client, "suffix", prompt="a", suffix="x")
    assert error["message"].startswith("Unrecognized request argument supplied: suffix")
    answer = complete(http, prompt="The dog ", suffix=" home.", temperature=0)
    assert answer["usage"]["prompt_tokens"] == len(tokens_of(http, "The dog ")) + len(tokens_of(http, " home."))


def test_a_model_names_its_layout_of_infill(http: httpx.Client, no_infill_client: httpx.Client) -> None:
    members = ("infill", "infill_family", "infill_files")
    (model,) = http.get("/v1/models").json()["data"]
    assert [model[name] for name in members] == [True, "qwen", False]
    (model,) = no_infill_client.get("/v1/models").json()["data"]
    assert [model[name] for name in members] == [False, None, False]


def test_a_model_says_whether_predictions_have_an_effect(http: httpx.Client) -> None:
    (model,) = http.get("/v1/models").json()["data"]
    assert (model["reproducible"], model["prediction"]) == ("exact", True)


def test_no_sequence_is_left_running(http: httpx.Client) -> None:
    assert is_idle(http)
