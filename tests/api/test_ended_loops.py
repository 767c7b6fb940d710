"""`repetition_detection` over HTTP: a choice that loops is ended."""

from __future__ import annotations

from typing import Any

import httpx
from completion_requests import complete, joined, one, refused, stream, tokens_of

DETECTION = {"max_pattern_size": 4, "min_pattern_size": 1, "min_count": 5}


def looping(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    """A body whose text is a loop of one word."""
    (cat,) = tokens_of(http, " cat")
    return {"prompt": "The", "max_tokens": 40, "allowed_token_ids": [cat], "temperature": 0} | fields


def test_a_choice_that_loops_is_ended(http: httpx.Client) -> None:
    found = one(http, **looping(http, repetition_detection=DETECTION, logprobs=0))
    assert (found["text"], found["finish_reason"]) == (5 * " cat", "repetition")
    assert len(found["logprobs"]["tokens"]) == 5
    assert one(http, **looping(http, repetition_detection={"max_pattern_size": 0}))["finish_reason"] == "length"
    assert one(http, **looping(http, repetition_detection=DETECTION, min_tokens=8))["text"] == 8 * " cat"


def test_a_stream_and_several_choices_end_so_too(http: httpx.Client) -> None:
    body = looping(http, repetition_detection=DETECTION, n=2)
    whole = complete(http, **body)
    assert [each["finish_reason"] for each in whole["choices"]] == ["repetition"] * 2
    assert whole["usage"]["completion_tokens"] == 10
    ended = joined(stream(http, **body))
    assert [(each["text"], each["finish_reason"]) for each in ended] == [(5 * " cat", "repetition")] * 2
    assert one(http, **looping(http, repetition_detection=DETECTION, stop=["cat cat"]))["finish_reason"] == "stop"


def test_a_text_without_a_loop_is_as_without_detection(http: httpx.Client) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 40, "seed": 1}
    assert one(http, **body, repetition_detection=DETECTION) == one(http, **body)


def test_malformed_detections_are_refused_by_name(http: httpx.Client) -> None:
    for wrong in ({"max_pattern_size": 3}, {"max_pattern_size": 3, "min_pattern_size": 4, "min_count": 2}):
        assert refused(http, "repetition_detection", prompt="a", repetition_detection=wrong)["param"]
    name = "repetition_detection.min_counts"
    assert refused(http, name, prompt="a", repetition_detection={"min_counts": 3})["param"] == name
