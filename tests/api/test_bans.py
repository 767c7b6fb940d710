"""Banned texts and tokens over HTTP, on the built-in model."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from completion_requests import complete, one, refused, stream, tokens_of

PROMPT = "Once upon a time"
Json = dict[str, Any]


def choice(http: httpx.Client, **body: Any) -> Json:
    return one(http, **{"prompt": PROMPT, "max_tokens": 40, "seed": 3} | body)


def phrase_of(text: str) -> str:
    """Some characters from the middle of a text, which begin and end inside words."""
    return text[len(text) // 2 :][:7]


def test_a_banned_text_never_appears(http: httpx.Client) -> None:
    """Each round bans what the round before wrote."""
    banned: list[str] = []
    for _ in range(5):
        text = choice(http, banned_strings=banned)["text"]
        assert not any(each.casefold() in text.casefold() for each in banned)
        assert len(text) > 20
        banned.append(phrase_of(text))
    assert choice(http, banned_strings=banned[0])["text"] == choice(http, banned_strings=banned[:1])["text"]


def test_the_text_before_a_banned_text_stays(http: httpx.Client) -> None:
    text = choice(http)["text"]
    phrase = phrase_of(text)
    place = text.index(phrase)
    changed = choice(http, banned_strings=[phrase])["text"]
    assert changed.startswith(text[: place - 20])
    assert changed != text


def test_case_counts_in_bad_words_and_not_in_banned_strings(http: httpx.Client) -> None:
    text = choice(http)["text"]
    phrase = phrase_of(text).strip()
    assert phrase.swapcase() != phrase
    assert choice(http, bad_words=[phrase.swapcase()])["text"] == text
    assert phrase not in choice(http, bad_words=[f"  {phrase}"])["text"]
    assert choice(http, banned_strings=[phrase.swapcase()])["text"] == choice(http, banned_strings=[phrase])["text"]
    assert choice(http, banned_strings=[phrase])["text"] != text


def test_a_stream_shows_nothing_that_is_taken_back(http: httpx.Client) -> None:
    body = {"prompt": PROMPT, "max_tokens": 40, "seed": 3, "banned_strings": ["the", "and", " a", "was", "she"]}
    whole = complete(http, **body, logprobs=2)
    chunks = stream(http, **body, logprobs=2)
    parts = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    assert "".join(part["text"] for part in parts) == whole["choices"][0]["text"]
    columns = whole["choices"][0]["logprobs"]
    for name in ("tokens", "token_logprobs", "text_offset"):
        assert [each for part in parts for each in part["logprobs"][name]] == columns[name]
    assert "".join(columns["tokens"]) == whole["choices"][0]["text"]
    assert whole["usage"]["completion_tokens"] == len(columns["tokens"])


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 3},
        {"n": 2, "best_of": 4},
        {"stop": [" to", "."]},
        {"presence_penalty": 1.5, "repetition_penalty": 1.3, "top_k": 20, "top_p": 0.9},
        {"mirostat": 2, "mirostat_tau": 3},
        {"dry_multiplier": 2, "dry_penalty_last_n": -1},
        {"xtc_probability": 0.5, "typical_p": 0.9},
        {"echo": True, "logprobs": 0},
        {"prediction": {"type": "content", "content": " there was a little girl named Lily. She loved to play"}},
        {"allowed_token_ids": list(range(300, 700))},
        {"temperature": 0, "min_tokens": 20, "ignore_eos": True},
        {"suffix": " The end."},
        {"structured_outputs": {"regex": "[a-z ]{20,60}"}},
        {"grammar": 'root ::= ([a-z]+ " "){4} [a-z]+ "."'},
    ],
    ids=str,
)
def test_bans_hold_with_other_fields_alone_and_in_a_crowd(http: httpx.Client, fields: Json) -> None:
    banned = ["the", "was", " a", "and", "little"]
    body = {"prompt": PROMPT, "max_tokens": 30, "seed": 5, "banned_strings": banned} | fields
    alone = complete(http, **body)["choices"]
    with ThreadPoolExecutor(6) as crowd:
        others = [crowd.submit(complete, http, **body | {"seed": seed}) for seed in (5, 6, 5, 7, 5, 8)]
        found = [each.result()["choices"] for each in others]
    assert [choices == alone for choices in found[::2]] == [True] * 3
    for choices in found:
        for each in choices:
            text = each["text"].removeprefix(PROMPT if fields.get("echo") else "").casefold()
            assert not any(phrase in text for phrase in banned)


def test_a_text_of_which_no_token_is_left_ends(http: httpx.Client) -> None:
    (token,) = tokens_of(http, " cat")
    body = {"prompt": PROMPT, "max_tokens": 5, "allowed_token_ids": [token], "banned_strings": ["cat cat"]}
    found = one(http, **body)
    assert (found["text"], found["finish_reason"]) == ("", "length")


def test_banned_tokens_are_never_generated(http: httpx.Client) -> None:
    found = choice(http, return_token_ids=True)
    first = found["token_ids"][0]
    for name in ("banned_tokens", "custom_token_bans"):
        for value in ([first], str(first), f"{first}, 1"):
            assert first not in choice(http, **{name: value}, return_token_ids=True)["token_ids"]
            typical = choice(http, **{name: value}, typical_p=0.9, return_token_ids=True)["token_ids"]
            assert first not in typical
    assert choice(http, banned_tokens="", custom_token_bans=[])["text"] == found["text"]


def test_banned_tokens_hold_with_a_grammar(http: httpx.Client) -> None:
    yes, no = (tokens_of(http, word)[0] for word in ("yes", "no"))
    body = {"structured_outputs": {"choice": ["yes", "no"]}, "temperature": 0}
    assert choice(http, **body, banned_tokens=[yes])["text"] == "no"
    assert choice(http, **body, banned_tokens=[no])["text"] == "yes"


@pytest.mark.parametrize("name", ["banned_strings", "bad_words"])
def test_a_banned_text_never_appears_where_the_text_must_match_a_grammar(http: httpx.Client, name: str) -> None:
    words = ["red", "green", "blue", "greenish blue"]
    choices = {"structured_outputs": {"choice": words}}
    for banned, allowed in ((["red"], {*words[1:]}), (["green"], {"red", "blue"}), (["red", "GREEN"], {"blue"})):
        given = banned if name == "banned_strings" else [each.casefold() for each in banned]
        found = {choice(http, **choices, seed=seed, **{name: given})["text"] for seed in range(12)}
        assert found <= allowed, banned
    assert len(found) == 1


def test_json_with_banned_texts_still_matches_its_schema(http: httpx.Client) -> None:
    schema = {"type": "array", "items": {"type": "string", "minLength": 8}, "minItems": 2, "maxItems": 2}
    body = {"json_schema": schema, "max_tokens": 200, "temperature": 0.8}
    plain, banned = {}, ["a", "the", "is"]
    for seed in range(6):
        plain[seed] = choice(http, **body, seed=seed)
        found = choice(http, **body, seed=seed, banned_strings=banned)
        assert not any(each in found["text"].casefold() for each in banned)
        if found["finish_reason"] == "stop":
            assert [len(each) >= 8 for each in json.loads(found["text"])] == [True, True]
    assert any(each in plain[0]["text"] for each in banned)


def test_a_grammar_that_demands_a_banned_text_ends_the_choice(http: httpx.Client) -> None:
    found = choice(http, structured_outputs={"choice": ["red"]}, banned_strings=["ed"])
    assert (found["finish_reason"], "red" in found["text"]) == ("length", False)


def test_what_cannot_be_banned_is_refused_by_name(http: httpx.Client) -> None:
    for name in ("banned_strings", "bad_words"):
        assert "U+FFFD" in refused(http, name, prompt=PROMPT, **{name: ["\ufffd"]})["message"]
    assert refused(http, "banned_tokens", prompt=PROMPT, banned_tokens=[10**6])["param"] == "banned_tokens"
    both = {"allowed_token_ids": [5, 6], "custom_token_bans": "6,5"}
    assert refused(http, "custom_token_bans", prompt=PROMPT, **both)["param"] == "custom_token_bans"
    hint = refused(http, "banned_tokens", prompt=PROMPT, banned_tokens=["a phrase"])
    assert (hint["param"], "banned_strings" in hint["message"]) == ("banned_tokens", True)


def test_the_ban_fields_of_sillytavern_are_accepted_as_they_are(http: httpx.Client) -> None:
    """What it sends to KoboldCpp, TabbyAPI and vLLM without and with bans."""
    empty = {"banned_strings": [], "banned_tokens": "", "custom_token_bans": "", "bad_words": None}
    assert choice(http, **empty)["text"] == choice(http)["text"]
    full = {"banned_strings": ["little girl"], "banned_tokens": "300,301", "custom_token_bans": "300,301"}
    assert "little girl" not in choice(http, **full)["text"].casefold()
