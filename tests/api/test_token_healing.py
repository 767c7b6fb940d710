"""`token_healing` over HTTP, on the built-in model: the last token of a prompt may be completed."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from completion_requests import complete, joined, one, refused, stream, tokens_of

Json = dict[str, Any]
PROMPTS = ["Once upon a ti", "The little gi", 'She said: "Hel', "They went to the par", "One day, the cat"]


def text_of(http: httpx.Client, ids: list[int]) -> str:
    text: str = http.post("/detokenize", json={"tokens": ids}).json()["prompt"]
    return text


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("temperature", [0, 1])
def test_the_first_token_completes_the_last_one_of_the_prompt(
    http: httpx.Client, prompt: str, temperature: float
) -> None:
    ids = tokens_of(http, prompt)
    body = {"token_healing": True, "max_tokens": 6, "temperature": temperature, "seed": 2, "return_token_ids": True}
    body |= {"logprobs": 2}
    found = one(http, prompt=prompt, **body)
    assert found["prompt_token_ids"] == ids[:-1]
    assert text_of(http, found["token_ids"][:1]).startswith(text_of(http, ids[-1:]))
    assert text_of(http, [*found["prompt_token_ids"], *found["token_ids"]]) == prompt + found["text"]
    assert one(http, prompt=ids, **body) == found

    echoed = one(http, prompt=prompt, **body, echo=True)
    assert echoed["text"] == prompt + found["text"]
    columns = echoed["logprobs"]
    assert "".join(columns["tokens"]) == echoed["text"]
    lengths = [sum(map(len, columns["tokens"][:index])) for index in range(len(columns["tokens"]))]
    assert columns["text_offset"] == lengths
    own = found["logprobs"]
    assert (columns["text_offset"][-6:], columns["token_logprobs"][-6:]) == (own["text_offset"], own["token_logprobs"])
    assert joined(stream(http, prompt=prompt, **body))[0]["text"] == found["text"]


def test_a_word_that_is_cut_off_is_continued_with_its_own_token(http: httpx.Client) -> None:
    whole = tokens_of(http, "Once upon a time")
    body = {"prompt": "Once upon a t", "temperature": 0, "max_tokens": 1, "return_token_ids": True}
    assert len(tokens_of(http, "Once upon a t")) == len(whole)
    healed = one(http, **body, token_healing=True)
    assert (healed["text"], healed["token_ids"]) == ("ime", whole[-1:])


def test_the_usage_counts_the_completed_token_as_generated(http: httpx.Client) -> None:
    usage = complete(http, prompt="Once upon a ti", max_tokens=3, token_healing=True, ignore_eos=True)["usage"]
    count = len(tokens_of(http, "Once upon a ti"))
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (count - 1, 3)


def test_samples_and_other_fields_hold(http: httpx.Client) -> None:
    body = {"prompt": "Once upon a ti", "max_tokens": 8, "seed": 4, "token_healing": True}
    for fields in ({"n": 3}, {"n": 2, "best_of": 3}, {"stop": ["me"]}, {"typical_p": 0.9, "n": 2}, {"min_tokens": 4}):
        choices = complete(http, **body, **fields, return_token_ids=True)["choices"]
        last = text_of(http, tokens_of(http, body["prompt"])[-1:])
        assert all(text_of(http, each["token_ids"][:1]).startswith(last) for each in choices)
        assert complete(http, **body, **fields, return_token_ids=True)["choices"] == choices
    body["prompt"] = "Once upon a t"
    (stopped,) = complete(http, **body, temperature=0, stop=["ime"])["choices"]
    assert (stopped["text"], stopped["finish_reason"]) == ("", "stop")
    free = one(http, **body | {"temperature": 0, "max_tokens": 1})["text"]
    assert not one(http, **body, temperature=0, banned_strings=[free])["text"].startswith(free)


def test_the_offset_is_right_where_the_prompt_ends_inside_a_character(http: httpx.Client) -> None:
    ids = [*tokens_of(http, "ab"), tokens_of(http, "\N{GRINNING FACE}")[0]]
    assert text_of(http, ids) == "ab\ufffd"
    for echo, first in ((True, len(tokens_of(http, "ab"))), (False, 0)):
        fields = {"prompt": ids, "echo": echo, "logprobs": 0, "max_tokens": 2, "token_healing": True, "temperature": 0}
        assert one(http, **fields)["logprobs"]["text_offset"][first] == 2


def test_a_prompt_without_a_token_to_complete_is_read_as_it_is(http: httpx.Client) -> None:
    (token,) = tokens_of(http, "Once")
    for prompt in ("", [token]):
        plain = one(http, prompt=prompt, max_tokens=4, seed=1, return_token_ids=True)
        assert one(http, prompt=prompt, max_tokens=4, seed=1, return_token_ids=True, token_healing=True) == plain
    body = {"prompt": "Once upon a time", "echo": True, "logprobs": 0, "max_tokens": 0}
    assert one(http, **body, token_healing=True) == one(http, **body)


def test_what_cannot_be_healed_is_refused_by_name(http: httpx.Client) -> None:
    body = {"prompt": "Once upon a ti", "max_tokens": 2, "token_healing": True}
    (other,) = tokens_of(http, " cat")
    assert refused(http, "allowed_token_ids", **body, allowed_token_ids=[other])["param"] == "allowed_token_ids"
    assert refused(http, "suffix", **body, suffix="the end")["param"] == "suffix"
    assert refused(http, "grammar", **body, grammar='root ::= "a"')["param"] == "grammar"
    assert (
        refused(http, "truncation_side", **body, truncate_prompt_tokens=2, truncation_side="right")["param"]
        == "truncation_side"
    )
    assert one(http, **body, truncate_prompt_tokens=2, return_token_ids=True)["prompt_token_ids"]
