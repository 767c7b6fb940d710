"""`logprob_token_ids` with a list for each position, for prompts and generated tokens; `logprobs_mode`."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from completion_requests import complete, joined, one, refused, stream, tokens_of

PROMPT = "Once upon a time there was a dog"
Json = dict[str, Any]


def body(**fields: Any) -> Json:
    return {"prompt": PROMPT, "temperature": 0, "return_tokens_as_token_ids": True} | fields


def test_each_position_has_the_numbers_of_its_own_list(http: httpx.Client) -> None:
    prompt = tokens_of(http, PROMPT)
    every = [5, 9, 300, 301, 302]
    alike = one(http, **body(echo=True, logprobs=0, max_tokens=3, logprob_token_ids=every))["logprobs"]
    lists = [every[index % 5 : index % 5 + index % 3] for index in range(len(prompt) + 2)]
    found = one(http, **body(echo=True, logprobs=0, max_tokens=3, logprob_token_ids=lists))["logprobs"]
    assert found["token_logprobs"] == alike["token_logprobs"]
    assert found["top_logprobs"][0] is None
    for index, (mine, whole, token) in enumerate(
        zip(found["top_logprobs"][1:], alike["top_logprobs"][1:], alike["tokens"][1:], strict=True), 1
    ):
        wanted = lists[index] if index < len(lists) else []
        names = {token, *(f"token_id:{each}" for each in wanted)}
        assert mine == {name: whole[name] for name in names}


def test_lists_of_generated_tokens_begin_with_the_first_one(http: httpx.Client) -> None:
    prompt = tokens_of(http, PROMPT)
    lists = [[5], [], [300, 301]]
    plain = one(http, **body(logprobs=0, max_tokens=4, logprob_token_ids=lists))["logprobs"]
    echoed = body(echo=True, logprobs=0, max_tokens=4, logprob_token_ids=[[]] * len(prompt) + lists)
    assert plain["top_logprobs"] == one(http, **echoed)["logprobs"]["top_logprobs"][len(prompt) :]
    assert [len(entry) for entry in plain["top_logprobs"]] == [2, 1, 3, 1]
    prediction = {"type": "content", "content": one(http, **body(max_tokens=4))["text"]}
    predicted = one(http, **body(logprobs=0, max_tokens=4, logprob_token_ids=lists, prediction=prediction))
    assert predicted["logprobs"] == plain


def test_prompt_logprobs_have_the_lists_without_ranks(http: httpx.Client) -> None:
    lists = [[each, 7] for each in range(300, 300 + len(tokens_of(http, PROMPT)))]
    found = one(http, **body(prompt_logprobs=0, max_tokens=1, logprob_token_ids=lists))["prompt_logprobs"]
    for entry, ids in zip(found[1:], lists[1:], strict=True):
        assert {str(each) for each in ids} <= entry.keys()
        assert [entry[str(each)]["rank"] for each in ids] == [None, None]


def test_a_second_scoring_takes_cached_scores_and_other_lists_are_computed(http: httpx.Client) -> None:
    long = "The dog ran over the hill and saw the sea. " * 8
    count = len(tokens_of(http, long))
    lists = [[each % 200 + 5] * (each % 2) for each in range(count)]
    fields = body(prompt=long, echo=True, logprobs=0, max_tokens=0, cache_salt="lists")
    first = complete(http, **fields, logprob_token_ids=lists)
    again = complete(http, **fields, logprob_token_ids=lists)
    assert again["choices"] == first["choices"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= count - 1
    other = complete(http, **fields, logprob_token_ids=[*lists[:-1], [6]])
    assert other["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    columns = [each["choices"][0]["logprobs"] for each in (first, other)]
    assert columns[0]["top_logprobs"][:-1] == columns[1]["top_logprobs"][:-1]
    alone = complete(http, **fields | {"cache_salt": "alone"}, logprob_token_ids=[*lists[:-1], [6]])
    assert alone["choices"] == other["choices"]


def test_a_stream_has_the_same_lists(http: httpx.Client) -> None:
    lists = [[300 + each] for each in range(len(tokens_of(http, PROMPT)) + 3)]
    fields = body(echo=True, logprobs=0, max_tokens=3, logprob_token_ids=lists)
    (choice,) = joined(stream(http, **fields))
    assert choice["logprobs"] == one(http, **fields)["logprobs"]


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        (
            {"echo": True, "logprobs": 0, "max_tokens": 1, "logprob_token_ids": [[5], [5]]},
            "has 2 lists, but",
        ),
        ({"prompt_logprobs": 0, "max_tokens": 1, "logprob_token_ids": [[5], [5]]}, "has 2 lists, but"),
        (
            {"prompt": [5], "prompt_logprobs": 0, "max_tokens": 1, "logprob_token_ids": [[5]] * 2},
            "without 'logprobs'",
        ),
        ({"logprobs": 0, "max_tokens": 2, "logprob_token_ids": [[5]] * 3}, "at most 2 positions"),
        ({"logprobs": 0, "logprob_token_ids": [[], []]}, "no ids"),
        ({"logprobs": 0, "logprob_token_ids": [[5], 5]}, "array"),
        ({"logprobs": 0, "logprob_token_ids": [[5], ["a"]]}, "array"),
        ({"logprobs": 0, "logprob_token_ids": [[5], [-1]]}, "Invalid token"),
        ({"logprobs": 0, "logprob_token_ids": [list(range(1025))]}, "1024"),
        ({"logprob_token_ids": [[5]]}, "requires"),
    ],
    ids=str,
)
def test_lists_of_the_wrong_length_or_form_are_refused(http: httpx.Client, fields: Json, part: str) -> None:
    assert part in refused(http, "logprob_token_ids", **body(**fields))["message"]


def test_processed_numbers_of_a_request(http: httpx.Client) -> None:
    forced = body(max_tokens=3, logprobs=2, logit_bias={"300": 100})
    raw, processed = (
        one(http, **forced, logprobs_mode=f"{mode}_logprobs")["logprobs"] for mode in ("raw", "processed")
    )
    assert raw == one(http, **forced)["logprobs"]
    assert processed["tokens"] == raw["tokens"] == ["token_id:300"] * 3
    assert min(processed["token_logprobs"]) > -1e-6
    assert max(raw["token_logprobs"]) < -1
    one_left = body(max_tokens=2, logprobs=2, temperature=1, top_k=1, echo=True, logprobs_mode="processed_logprobs")
    columns = one(http, **one_left)["logprobs"]
    assert columns["token_logprobs"][-2:] == [0, 0]
    assert [sorted(entry.values())[0] for entry in columns["top_logprobs"][-2:]] == [-9999, -9999]
    plain = one(http, **body(max_tokens=2, logprobs=2, echo=True))["logprobs"]
    assert columns["top_logprobs"][:-2] == plain["top_logprobs"][:-2], "the prompt's numbers are the model's"


def test_modes_that_cannot_be_served_are_refused(http: httpx.Client) -> None:
    for fields in ({"typical_p": 0.5}, {"allowed_token_ids": [5, 6]}, {"mirostat": 2}):
        error = refused(http, "logprobs_mode", **body(logprobs=1, logprobs_mode="processed_logprobs", **fields))
        assert next(iter(fields)) in error["message"]
    refused(http, "logprobs_mode", **body(logprobs=1, logprobs_mode="raw_logits"))
