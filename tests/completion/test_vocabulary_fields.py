"""Fields about tokens: truncation, allowed and reported ids, and which tokens have a text in a choice."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace
from test_choice import build, build_whole, columns, plan, texts_and_finishes
from test_plan import WITH_BOS, plan_one_prompt, refused

from afterword.completion.logprobs import RankedToken
from afterword.engine.protocol import ModelInfo
from scripted_engine import BOS, EOS, MID, MODEL_INFO, PIECES, ids

WITH_SPECIAL = replace(MODEL_INFO, special=(BOS, EOS, MID))
CAT = "Hello cat sat"  # three tokens

# ---- truncate_prompt_tokens


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"truncate_prompt_tokens": 2}, " cat sat"),
        ({"truncate_prompt_tokens": 2, "truncation_side": "right"}, "Hello cat"),
        ({"truncate_prompt_tokens": 3}, CAT),
        ({"truncate_prompt_tokens": 40}, CAT),
        ({"truncate_prompt_tokens": -1}, CAT),
        ({"truncate_prompt_tokens": -1, "max_tokens": 62}, " cat sat"),
        ({"truncate_prompt_tokens": -1, "max_tokens": 63, "truncation_side": "right"}, "Hello"),
    ],
)
@pytest.mark.parametrize("given", [CAT, ids(CAT)])
def test_a_prompt_keeps_its_last_or_first_tokens(given: Any, fields: dict[str, Any], text: str) -> None:
    prompt = plan_one_prompt(prompt=(given,), **fields)
    assert (prompt.job.prompt, prompt.text, prompt.billed_tokens) == (ids(text), text, len(ids(text)))


def test_a_bos_that_the_server_adds_is_not_counted() -> None:
    assert plan_one_prompt(WITH_BOS, prompt=(CAT,), truncate_prompt_tokens=2).job.prompt == (BOS, *ids(" cat sat"))
    full = plan_one_prompt(WITH_BOS, prompt=(CAT,), truncate_prompt_tokens=-1, max_tokens=61)
    assert full.job.prompt == (BOS, *ids(" cat sat"))
    of_ids = plan_one_prompt(WITH_BOS, prompt=(ids(CAT),), truncate_prompt_tokens=-1, max_tokens=61)
    assert of_ids.job.prompt == ids(CAT)


def test_a_text_of_any_length_can_be_truncated() -> None:
    assert plan_one_prompt(prompt=("Hello" * 500,), truncate_prompt_tokens=5).job.prompt == ids("Hello" * 5)


def test_no_more_tokens_are_kept_than_fit_with_the_completion() -> None:
    message, param, _ = refused(prompt=("a",), truncate_prompt_tokens=49)
    assert (param, "(48)" in message) == ("truncate_prompt_tokens", True)


# ---- allowed_token_ids, logprob_token_ids


@pytest.mark.parametrize("name", ["allowed_token_ids", "logprob_token_ids"])
@pytest.mark.parametrize("token", [-1, len(PIECES)])
def test_ids_must_be_in_the_vocabulary(name: str, token: int) -> None:
    assert refused(prompt=("a",), logprobs=1, **{name: (1, token)})[1] == name


def test_tokens_before_the_end_must_be_allowed() -> None:
    fields = {"prompt": ("a",), "allowed_token_ids": (EOS, 7), "stop_token_ids": (7,)}
    assert refused(**fields, min_tokens=1)[1] == "allowed_token_ids"
    banned = {"allowed_token_ids": (EOS, 8), "banned_tokens": (8,)}
    assert refused(**fields | banned, min_tokens=1)[1] == "allowed_token_ids"
    assert plan_one_prompt(**fields | banned).job.banned == (8,)
    assert plan_one_prompt(**fields).job.end_tokens == (EOS, 7)
    assert plan_one_prompt(**fields | {"allowed_token_ids": (EOS, 8)}, min_tokens=1).job.min_tokens == 1


def test_chosen_ids_replace_the_most_likely_tokens() -> None:
    chosen = {"prompt": ("a",), "logprob_token_ids": (5, 9, 300 - 44)}
    job = plan_one_prompt(**chosen, logprobs=0).job
    assert (job.reported, job.alternatives, job.prompt_alternatives) == ((5, 9, 256), 3, None)
    job = plan_one_prompt(**chosen, logprobs=1, echo=True).job
    assert (job.alternatives, job.prompt_alternatives) == (3, 3)
    job = plan_one_prompt(**chosen, prompt_logprobs=5).job
    assert (job.alternatives, job.prompt_alternatives) == (None, 3)


def test_chosen_ids_of_a_prompt_have_no_rank() -> None:
    """The engine reports 256 and 257 here; only the token itself has a rank."""
    result = build_whole(plan(prompt=("Hello cat",), logprob_token_ids=(256, 257), prompt_logprobs=1), ids("Hello"))
    assert result.prompt is not None
    assert result.prompt.logprobs is not None
    (cat,) = ids(" cat")
    (_, entry) = result.prompt.logprobs
    assert entry is not None
    assert {name: each.rank for name, each in entry.items()} == {str(cat): 0, "256": None}
    assert entry["256"] == RankedToken(-0.25, None, " the")


# ---- return_tokens_as_token_ids


@pytest.mark.parametrize("given", ["Hello cat", ids("Hello cat"), b"a\xe2"])
def test_tokens_are_named_by_their_ids(given: Any) -> None:
    prompt = tuple(given) if isinstance(given, bytes) else given
    fields = {"prompt": (prompt,), "logprobs": 2, "echo": True}
    named = columns(build_whole(plan(**fields, return_tokens_as_token_ids=True), ids(" cat sat")))
    plain = columns(build_whole(plan(**fields), ids(" cat sat")))
    read = ids(prompt) if isinstance(prompt, str) else prompt
    assert named.tokens == tuple(f"token_id:{token}" for token in (*read, *ids(" cat sat")))
    assert (named.token_logprobs, named.text_offset) == (plain.token_logprobs, plain.text_offset)
    assert named.top_logprobs is not None
    assert [None if top is None else next(iter(top)) for top in named.top_logprobs] == [None, *named.tokens[1:]]


# ---- include_stop_str_in_output, skip_special_tokens


@pytest.mark.parametrize(
    ("stop", "text", "tokens"),
    [
        ("at", "Hello cat", 2),
        ("lo", "Hello", 1),
        ("o c", "Hello c", 2),
        ("zzz", "Hello cat sat", 3),
        (" sat", "Hello cat sat", 3),
    ],
)
def test_a_stop_string_can_be_part_of_the_text(stop: str, text: str, tokens: int) -> None:
    wanted = plan(prompt=("a",), stop=(stop,), include_stop_str_in_output=True, logprobs=0)
    choice, deltas = build(wanted, ids(CAT))
    assert "".join(delta.text for delta in deltas) == text
    assert choice.finish == ("length" if stop == "zzz" else "stop")
    assert choice.completion_tokens == tokens
    assert sum(len(delta.logprobs.tokens) for delta in deltas if delta.logprobs) == tokens


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "Hello"),
        ({"include_stop_str_in_output": True}, "Hello"),
        ({"include_stop_str_in_output": True, "skip_special_tokens": True}, "Hello"),
        ({"include_stop_str_in_output": True, "skip_special_tokens": False}, "Hello</s>"),
        ({"skip_special_tokens": False}, "Hello"),
    ],
)
def test_an_end_token_has_a_text_only_if_special_tokens_are_wanted(fields: dict[str, Any], text: str) -> None:
    wanted = plan(WITH_SPECIAL, prompt=("a",), **fields)
    assert build_whole(wanted, (*ids("Hello"), EOS), "stop").text == text


def test_a_token_of_stop_token_ids_can_be_part_of_the_text() -> None:
    (cat,) = ids(" cat")
    fields = {"prompt": ("a",), "stop_token_ids": (cat,), "echo": True, "logprobs": 0}
    found = build_whole(plan(**fields, include_stop_str_in_output=True), ids("Hello cat"), "stop")
    assert (found.text, found.finish, found.completion_tokens) == ("aHello cat", "stop", 2)
    assert columns(found).tokens == ("a", "Hello", " cat")
    assert build_whole(plan(**fields), ids("Hello cat"), "stop").text == "aHello"


@pytest.mark.parametrize(
    ("skipped", "text"), [(None, "Hello<mid> cat"), (False, "Hello<mid> cat"), (True, "Hello cat")]
)
def test_special_tokens_can_be_left_out_of_the_text(skipped: bool | None, text: str) -> None:
    wanted = plan(WITH_SPECIAL, prompt=("a",), skip_special_tokens=skipped, logprobs=0)
    found = build_whole(wanted, (*ids("Hello"), MID, *ids(" cat")))
    assert found.text == text
    assert columns(found).tokens == ("Hello", "<mid>", " cat")
    assert found.completion_tokens == 3


def test_a_special_token_is_left_out_within_a_stop_string() -> None:
    model_info: ModelInfo = WITH_SPECIAL
    wanted = plan(model_info, prompt=("a",), skip_special_tokens=True, stop=("lo cat",))
    _, deltas = build(wanted, (*ids("Hello"), MID, *ids(" cat sat")))
    assert texts_and_finishes(deltas)[-1] == ("", "stop")
    assert "".join(delta.text for delta in deltas) == "Hel"


def test_spaces_between_special_tokens_change_nothing() -> None:
    for spaces in (True, False):
        wanted = plan(WITH_SPECIAL, prompt=("a",), spaces_between_special_tokens=spaces)
        assert build_whole(wanted, (MID, MID)).text == "<mid><mid>"
