"""The API's rules over HTTP, as numbered cases. 74 is about rate limits, which this server does not set."""

from __future__ import annotations

import re
import time
from statistics import fmean
from typing import Any

import httpx
import pytest
from asking import COLUMNS, complete, is_idle, joined, one, problem, refused, stream, tokens_of
from parrot import TEXT

STORY = "Once upon a time"
SEED = {
    "prompt": "This is a test.",
    "best_of": 1,
    "echo": False,
    "frequency_penalty": 0,
    "logit_bias": None,
    "logprobs": None,
    "max_tokens": 16,
    "n": 1,
    "presence_penalty": 0,
    "seed": 123,
    "stop": "\n",
    "stream": False,
    "stream_options": None,
    "suffix": "test.",
    "temperature": 1,
    "top_p": 1,
    "user": "user-1234",
}
"""The request that the API's reference gives as its example: every field there is, but the model."""

# ---- authentication and protocol


def test_01_a_missing_key_is_named(server: Any) -> None:
    error = problem(httpx.post(f"{server.url}/v1/completions", json={}), 401)
    assert (error["type"], error["code"]) == ("invalid_request_error", None)
    assert error["message"].startswith("You didn't provide an API key.")


def test_02_a_wrong_key_is_masked(server: Any) -> None:
    with server.http("bad-key-for-error-test") as http:
        error = problem(http.post("/v1/completions", json={}), 401)
    assert error["code"] == "invalid_api_key"
    assert error["message"].startswith("Incorrect API key provided: bad-key-**********test.")


def test_03_the_key_is_checked_first(server: Any) -> None:
    with server.http("wrong") as http:
        problem(http.post("/v1/completions", content=b'{"model":"nope",'), 401)


def test_04_broken_json_is_called_that(http: httpx.Client) -> None:
    response = http.post("/v1/completions", content=b'{"model":', headers={"Content-Type": "application/json"})
    error = problem(response, 400)
    assert error["message"].startswith("We could not parse the JSON body of your request.")
    assert (error["param"], error["code"]) == (None, None)


@pytest.mark.parametrize("model", [{}, {"model": None}, {"model": ""}], ids=["absent", "null", "empty"])
def test_05_the_one_model_need_not_be_named(http: httpx.Client, server: Any, model: dict[str, Any]) -> None:
    assert complete(http, prompt="a", max_tokens=1, **model)["model"] == server.model


def test_06_an_unknown_model_is_not_found(http: httpx.Client) -> None:
    error = refused(http, status=404, model="no-such", prompt="a")
    assert error["code"] == "model_not_found"
    assert "`no-such`" in error["message"]


@pytest.mark.parametrize(("name", "value"), [("foo", 1), ("top_kk", 5), ("messages", []), ("max_token", 5)])
def test_07_an_unknown_field_is_refused_by_name(http: httpx.Client, name: str, value: object) -> None:
    assert name in refused(http, name, prompt="a", **{name: value})["message"]


def test_08_an_unknown_path_is_not_found(http: httpx.Client) -> None:
    assert problem(http.post("/v1/nope"), 404)["code"] == "unknown_url"


def test_09_completions_are_posted(http: httpx.Client) -> None:
    problem(http.get("/v1/completions"), 405)


def test_10_a_body_must_be_called_json(http: httpx.Client) -> None:
    problem(http.post("/v1/completions", content=b'{"prompt":"a"}', headers={"Content-Type": "text/plain"}), 400)


def test_11_every_answer_has_a_request_id(http: httpx.Client, server: Any) -> None:
    answers = [
        http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}),
        http.post("/v1/completions", json={"n": 0}),
        httpx.post(f"{server.url}/v1/completions", json={}),
        http.get("/nope"),
    ]
    assert [answer.status_code for answer in answers] == [200, 400, 401, 404]
    assert all(re.fullmatch("req_[0-9a-f]{32}", answer.headers["x-request-id"]) for answer in answers)
    assert len({answer.headers["x-request-id"] for answer in answers}) == 4
    assert all(answer.headers["openai-processing-ms"].isdigit() for answer in answers)
    assert {answer.headers["openai-version"] for answer in answers} == {"2020-10-01"}


@pytest.mark.parametrize(
    "body", [b"", b"[]", b'"text"', b"null", b'{"prompt": NaN}', b'{"prompt": "\\ud800"}', b"\xff"]
)
def test_12_every_error_has_the_same_four_keys(http: httpx.Client, body: bytes) -> None:
    problem(http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"}), 400)


def test_13_models_are_listed_and_found(http: httpx.Client, server: Any) -> None:
    listing = http.get("/v1/models").json()
    assert listing["object"] == "list"
    (model,) = listing["data"]
    assert (model["id"], model["object"]) == (server.model, "model")
    assert isinstance(model["created"], int)
    assert isinstance(model["owned_by"], str)
    assert http.get(f"/v1/models/{server.model}").json() == model
    assert problem(http.get("/v1/models/nope"), 404)["code"] == "model_not_found"


# ---- basics and nulls


def test_14_the_example_request_is_answered(http: httpx.Client, server: Any) -> None:
    answer = complete(http, model=server.model, **SEED)
    assert answer.keys() == {"id", "choices", "created", "model", "system_fingerprint", "object", "usage"}
    assert answer["choices"][0].keys() == {"finish_reason", "index", "logprobs", "text"}
    usage = answer["usage"]
    assert usage["completion_tokens_details"] == {
        "accepted_prediction_tokens": 0,
        "audio_tokens": 0,
        "reasoning_tokens": 0,
        "rejected_prediction_tokens": 0,
    }
    assert usage["prompt_tokens_details"].keys() == {"audio_tokens", "cached_tokens"}


def check_basic(answer: dict[str, Any]) -> None:
    (choice,) = answer["choices"]
    usage = answer["usage"]
    assert re.fullmatch("cmpl-[0-9A-Za-z]{29}", answer["id"])
    assert answer["object"] == "text_completion"
    assert abs(answer["created"] - time.time()) < 60
    assert choice["logprobs"] is None
    assert choice["finish_reason"] == ("length" if usage["completion_tokens"] == 16 else "stop")
    assert usage["completion_tokens"] <= 16
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_15_a_prompt_is_enough(http: httpx.Client, server: Any) -> None:
    check_basic(complete(http, model=server.model, prompt=STORY))


def test_16_null_is_as_if_absent(http: httpx.Client, server: Any) -> None:
    check_basic(complete(http, model=server.model, prompt=STORY, **dict.fromkeys(SEED.keys() - {"prompt"})))


def test_17_temperature_0_repeats_itself(http: httpx.Client) -> None:
    body = {"prompt": STORY, "max_tokens": 7, "temperature": 0}
    assert one(http, **body) == one(http, **body)


# 18, the official client, is in test_openai_client.py

# ---- prompts


def test_19_choices_come_prompt_by_prompt(http: httpx.Client) -> None:
    answer = complete(http, prompt=["a b c", "d e f"], echo=True, n=2)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["text"][:5] for choice in answer["choices"]] == ["a b c", "a b c", "d e f", "d e f"]
    assert answer["usage"]["prompt_tokens"] == len(tokens_of(http, "a b c")) + len(tokens_of(http, "d e f"))


def test_20_text_and_its_tokens_are_the_same_prompt(http: httpx.Client) -> None:
    text = "The quick brown fox"
    tokens = tokens_of(http, text)
    answers = [complete(http, prompt=prompt, temperature=0) for prompt in (text, tokens, [tokens])]
    assert all(answer["choices"] == answers[0]["choices"] for answer in answers)
    assert all(answer["usage"] == answers[0]["usage"] for answer in answers)
    assert answers[0]["usage"]["prompt_tokens"] == len(tokens)


@pytest.mark.parametrize("prompt", [{"prompt": None}, {}], ids=["null", "absent"])
def test_21_no_prompt_starts_a_document(http: httpx.Client, prompt: dict[str, Any]) -> None:
    assert one(http, **prompt)["index"] == 0


def test_22_an_empty_prompt_starts_a_document(http: httpx.Client) -> None:
    answer = complete(http, prompt="", temperature=0)
    assert answer["choices"] == complete(http, prompt=None, temperature=0)["choices"]
    assert answer["usage"]["prompt_tokens"] in (0, 1)


@pytest.mark.parametrize(
    "prompt", [[[]], [1, "a"], [[1], "a"], {"a": 1}, 5, [1.5], [True], [], [None], [[[1]]]], ids=str
)
def test_23_a_prompt_has_one_of_four_forms(http: httpx.Client, prompt: object) -> None:
    refused(http, "prompt", prompt=prompt)


@pytest.mark.parametrize("token", [1000, -1, 10**30], ids=["above", "negative", "huge"])
def test_24_a_prompt_has_ids_of_the_vocabulary(http: httpx.Client, facts: dict[str, Any], token: int) -> None:
    last = facts["vocab_size"] - 1
    token += last if token == 1000 else 0
    error = refused(http, prompt=[token])
    assert re.fullmatch(
        rf"Invalid token in prompt: {token}\d*\. Minimum value is 0, maximum value is {last} \(inclusive\)\.",
        error["message"],
    )
    assert error["code"] is None


# ---- max_tokens and context


def test_25_a_completion_of_no_tokens_needs_echo(http: httpx.Client) -> None:
    assert refused(http, prompt="a", max_tokens=0)["message"] == (
        "You requested a length 0 completion, but you did not set the 'echo' parameter. That means that we will return "
        "no data to you. (HINT: set 'echo' to true in order for the API to echo back the prompt to you.)"
    )


def test_26_a_completion_of_no_tokens_needs_logprobs(http: httpx.Client) -> None:
    assert refused(http, prompt="a", max_tokens=0, echo=True)["message"] == (
        "You requested a length 0 completion, but did not specify a 'logprobs' parameter to see the probability of "
        "each token. Either request a completion with length greater than 1, or set 'logprobs' to 0 (to see the "
        "probabilities of each token you submitted) or more (to also see the probabilities over alternative tokens)."
    )


def test_27_a_prompt_can_be_scored(http: httpx.Client) -> None:
    answer = complete(http, prompt=STORY, max_tokens=0, echo=True, logprobs=0)
    (choice,), usage = answer["choices"], answer["usage"]
    columns = choice["logprobs"]
    assert (choice["text"], choice["finish_reason"]) == (STORY, "length")
    assert len(columns["tokens"]) == usage["prompt_tokens"] == usage["total_tokens"]
    assert usage["completion_tokens"] == 0
    assert columns["token_logprobs"][0] is None
    assert all(value <= 0 for value in columns["token_logprobs"][1:])
    assert columns["top_logprobs"] is None
    assert columns["text_offset"][0] == 0


@pytest.mark.parametrize("value", [-1, "16", 1.5, True, 10**30], ids=str)
def test_28_max_tokens_is_a_count(http: httpx.Client, value: object) -> None:
    refused(http, "max_tokens", prompt="a", max_tokens=value)


def test_29_a_completion_must_fit_in_the_context(http: httpx.Client, facts: dict[str, Any]) -> None:
    context = facts["model_max_length"]
    error = refused(http, prompt=STORY, max_tokens=context)
    prompt = len(tokens_of(http, STORY))
    assert error["message"] == (
        f"This model's maximum context length is {context} tokens, however you requested {prompt + context} tokens "
        f"({prompt} in your prompt; {context} for the completion). Please reduce your prompt; or completion length."
    )
    assert (error["param"], error["code"]) == (None, None)


def test_30_a_completion_may_fill_the_context(http: httpx.Client, facts: dict[str, Any]) -> None:
    room = facts["model_max_length"] - len(tokens_of(http, STORY))
    refused(http, prompt=STORY, max_tokens=room + 1)
    at_once = {str(facts["eos_token_id"]): 100}
    assert one(http, prompt=STORY, max_tokens=room, temperature=0, logit_bias=at_once)["text"] == ""


# ---- log probabilities


def test_31_no_alternatives_is_a_null_column(http: httpx.Client) -> None:
    answer = complete(http, prompt=STORY, logprobs=0, max_tokens=5)
    columns = answer["choices"][0]["logprobs"]
    assert columns.pop("top_logprobs") is None
    assert {len(column) for column in columns.values()} == {answer["usage"]["completion_tokens"]}


def test_32_the_token_itself_is_always_among_the_alternatives(http: httpx.Client) -> None:
    columns = one(http, prompt=STORY, logprobs=3, temperature=1, max_tokens=20)["logprobs"]
    rows = zip(columns["tokens"], columns["token_logprobs"], columns["top_logprobs"], strict=True)
    for token, logprob, top in rows:
        assert top[token] == logprob
        best = sorted(top, key=top.__getitem__, reverse=True)[:3]
        assert len(top) == 3 + (token not in best)


def test_33_temperature_0_takes_the_likeliest(http: httpx.Client) -> None:
    columns = one(http, prompt=STORY, logprobs=5, temperature=0)["logprobs"]
    assert columns["token_logprobs"] == [max(top.values()) for top in columns["top_logprobs"]]


@pytest.mark.parametrize("count", [15, 20])
def test_34_more_alternatives_than_5_are_given(http: httpx.Client, endless: dict[str, int], count: int) -> None:
    columns = one(http, prompt=STORY, logprobs=count, logit_bias=endless)["logprobs"]
    assert {len(top) for top in columns["top_logprobs"]} <= {count, count + 1}


@pytest.mark.parametrize("value", [-1, "3", True, 2.5, 21], ids=str)
def test_35_logprobs_is_a_count_up_to_20(http: httpx.Client, value: object) -> None:
    refused(http, "logprobs", prompt="a", logprobs=value)


def test_36_offsets_count_code_points(http: httpx.Client, endless: dict[str, int]) -> None:
    columns = one(http, prompt="héllo 😀 wörld", logprobs=1, logit_bias=endless)["logprobs"]
    assert columns["text_offset"][0] == 13


def test_37_offsets_lead_to_the_tokens(http: httpx.Client, endless: dict[str, int]) -> None:
    choice = one(http, prompt="Tom's dog\n\nran, and 漢字!", echo=True, logprobs=0, seed=1, logit_bias=endless)
    offsets = choice["logprobs"]["text_offset"]
    assert offsets == sorted(offsets)
    for token, offset in zip(choice["logprobs"]["tokens"], offsets, strict=True):
        assert token.startswith("bytes:") or choice["text"][offset : offset + len(token)] == token


def test_38_tokens_spell_the_bytes_of_the_prompt(http: httpx.Client) -> None:
    prompt = "’😀漢字"
    choice = one(http, prompt=prompt, echo=True, logprobs=0, max_tokens=0)
    assert choice["text"] == prompt
    assert b"".join(map(bytes_of, choice["logprobs"]["tokens"])) == prompt.encode()


def bytes_of(token: str) -> bytes:
    if not token.startswith("bytes:"):
        return token.encode()
    assert re.fullmatch(r"bytes:( |[!-~]|\\x[0-9a-f]{2})+", token)
    return token.removeprefix("bytes:").encode().decode("unicode_escape").encode("latin-1")


def test_39_a_prompts_scores_do_not_depend_on_the_temperature(http: httpx.Client) -> None:
    length = len(tokens_of(http, STORY))
    body = {"prompt": STORY, "echo": True, "max_tokens": 1, "logprobs": 1}
    cold, hot = (one(http, **body, temperature=t)["logprobs"]["token_logprobs"][:length] for t in (0, 2))
    assert cold == hot


def test_40_scoring_clients_find_an_entry_for_each_token_and_one_more(http: httpx.Client) -> None:
    ids = tokens_of(http, "The dog ran to the park.")
    choice = one(http, prompt=[ids], echo=True, max_tokens=1, logprobs=1, temperature=0, seed=1234)
    assert {len(choice["logprobs"][name]) for name in COLUMNS} == {len(ids) + 1}
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert choice["logprobs"]["top_logprobs"][0] is None


def test_41_a_text_scores_as_it_was_written(http: httpx.Client, endless: dict[str, int]) -> None:
    ids = tokens_of(http, STORY)
    written = one(http, prompt=ids, temperature=0, max_tokens=8, logprobs=0, logit_bias=endless)
    whole = [*ids, *tokens_of(http, written["text"])]
    scored = one(http, prompt=whole, echo=True, max_tokens=0, logprobs=0)["logprobs"]
    if scored["tokens"][len(ids) :] != written["logprobs"]["tokens"]:
        pytest.skip("the text has other tokens than those that it was written with")
    assert scored["token_logprobs"][len(ids) :] == pytest.approx(written["logprobs"]["token_logprobs"], abs=0.02)


@pytest.mark.parametrize(("stop", "text"), [("34", "é😀漢) 12"), (None, TEXT[1:])], ids=["stop", "end"])
def test_42_no_token_lies_beyond_the_end(parrot: httpx.Client, stop: str | None, text: str) -> None:
    choice = one(parrot, prompt="(", max_tokens=100, logprobs=1, stop=stop)
    assert (choice["text"], choice["finish_reason"]) == (text, "stop")
    assert b"".join(map(bytes_of, choice["logprobs"]["tokens"])) == text.encode()


def test_43_a_bias_does_not_change_log_probabilities(http: httpx.Client, facts: dict[str, Any]) -> None:
    body = {"prompt": STORY, "echo": True, "logprobs": 5, "max_tokens": 1, "temperature": 0}
    banned = {str(facts["vocab_size"] - 1): -100}
    assert one(http, **body, logit_bias=banned)["logprobs"] == one(http, **body)["logprobs"]


# ---- n, best_of, echo


def test_44_n_is_at_most_best_of(http: httpx.Client) -> None:
    assert refused(http, prompt="a", n=2, best_of=1)["message"] == (
        "You requested that the server return more choices than it will generate (HINT: you must set 'n' (currently "
        "2) to be at most 'best_of' (currently 1), or omit either parameter if you don't specifically want to use "
        "them.)"
    )


@pytest.mark.parametrize("best_of", [None, 2, 3])
def test_45_n_choices_come_back(http: httpx.Client, best_of: int | None) -> None:
    assert len(complete(http, prompt="a", n=2, best_of=best_of)["choices"]) == 2


def test_46_every_candidate_is_counted(http: httpx.Client, endless: dict[str, int]) -> None:
    answer = complete(http, prompt=STORY, best_of=3, n=1, temperature=1, max_tokens=8, logit_bias=endless)
    assert [choice["index"] for choice in answer["choices"]] == [0]
    assert answer["usage"]["completion_tokens"] == 24


def test_47_the_best_come_first(http: httpx.Client, endless: dict[str, int]) -> None:
    body = {"prompt": STORY, "logprobs": 0, "seed": 7, "max_tokens": 12, "logit_bias": endless}
    candidates = [mean_of(choice) for choice in complete(http, **body, n=5)["choices"]]
    best = [mean_of(choice) for choice in complete(http, **body, n=3, best_of=5)["choices"]]
    assert best == pytest.approx(sorted(candidates, reverse=True)[:3])


def mean_of(choice: dict[str, Any]) -> float:
    return fmean(choice["logprobs"]["token_logprobs"])


def test_48_the_best_of_several_cannot_be_streamed(http: httpx.Client) -> None:
    refused(http, "best_of", prompt="a", best_of=3, stream=True)
    assert len(joined(stream(http, prompt="a", best_of=1))) == 1


@pytest.mark.parametrize(
    ("name", "value"), [("n", 0), ("n", 129), ("best_of", 21), ("n", "2"), ("n", True), ("best_of", 0)], ids=str
)
def test_49_counts_have_limits(http: httpx.Client, name: str, value: object) -> None:
    refused(http, name, prompt="a", **{name: value})


def test_50_echo_puts_the_prompt_first(http: httpx.Client, endless: dict[str, int]) -> None:
    answer = complete(http, prompt=STORY, echo=True, max_tokens=5, logit_bias=endless)
    assert answer["choices"][0]["text"].startswith(STORY)
    assert len(answer["choices"][0]["text"]) > len(STORY)
    assert answer["usage"]["completion_tokens"] == 5


# ---- stop and sampling


def test_51_a_stop_string_ends_the_text_before_it(parrot: httpx.Client) -> None:
    body = {"prompt": "(é😀漢) 1234", "temperature": 0}
    assert one(parrot, **body, stop=" 78")["text"] == "567890."
    choice = one(parrot, **body, stop="78")
    assert (choice["text"], choice["finish_reason"]) == ("56", "stop")


def test_52_up_to_16_stop_strings_are_heeded(parrot: httpx.Client) -> None:
    misses = [f"no{number}" for number in range(15)]
    assert one(parrot, prompt="(", max_tokens=30, stop=[*misses, "6"])["text"] == "é😀漢) 12345"


@pytest.mark.parametrize("stop", [["x"] * 17, 5, [1], {}, [], "", ["a", ""]], ids=str)
def test_52_other_stops_are_refused(http: httpx.Client, stop: object) -> None:
    refused(http, "stop", prompt="a", stop=stop)


def test_53_a_stop_string_in_the_prompt_does_not_count(parrot: httpx.Client) -> None:
    assert one(parrot, prompt="123", echo=True, max_tokens=5, stop=["23", "34"])["text"] == "12345678"


def test_54_a_stream_shows_nothing_of_a_stop_string(parrot: httpx.Client) -> None:
    body = {"prompt": "(", "max_tokens": 30, "temperature": 0, "stop": "12345"}
    chunks = stream(parrot, **body)
    assert joined(chunks)[0]["text"] == one(parrot, **body)["text"] == "é😀漢) "


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 2.1),
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 1.1),
        ("top_p", -0.1),
        ("presence_penalty", 2.1),
        ("presence_penalty", -2.1),
        ("frequency_penalty", 2.1),
        ("frequency_penalty", -2.1),
    ],
    ids=str,
)
def test_55_numbers_have_limits(http: httpx.Client, name: str, value: object) -> None:
    refused(http, name, prompt="a", **{name: value})


@pytest.mark.parametrize(
    "body",
    [{name: value} for name in ("temperature", "presence_penalty", "frequency_penalty") for value in (0, 2)]
    + [{"presence_penalty": -2}, {"frequency_penalty": -2}, {"top_p": 0}, {"top_p": 1}],
    ids=str,
)
def test_55_the_limits_themselves_are_allowed(http: httpx.Client, body: dict[str, float]) -> None:
    complete(http, prompt="a", max_tokens=2, **body)


@pytest.mark.parametrize("key", ["abc", "-1", "1.5", ""])
def test_56_a_bias_is_for_a_token_id(http: httpx.Client, key: str) -> None:
    error = refused(http, "logit_bias", prompt="a", logit_bias={key: 1})
    assert error["message"] == (
        f"Invalid key in 'logit_bias': {key}. You should only be submitting non-negative integers."
    )


def test_57_a_bias_is_for_a_token_of_the_vocabulary(http: httpx.Client, facts: dict[str, Any]) -> None:
    last = facts["vocab_size"] - 1
    error = refused(http, "logit_bias", prompt="a", logit_bias={str(last + 5): 1})
    assert error["message"] == f"Invalid key in 'logit_bias': {last + 5}. Maximum value is {last}."


@pytest.mark.parametrize("bias", [{"5": 101}, {"5": -101}, {"5": "1"}, {"5": True}, {"5": None}, [5], 5], ids=str)
def test_57_a_bias_is_from_minus_100_to_100(http: httpx.Client, bias: object) -> None:
    refused(http, "logit_bias", prompt="a", logit_bias=bias)


@pytest.mark.parametrize("bias", [{}, None, {"5": 0.5}], ids=str)
def test_57_no_bias_and_a_small_bias_are_allowed(http: httpx.Client, bias: object) -> None:
    complete(http, prompt="a", max_tokens=1, logit_bias=bias)


def test_58_a_bias_forces_and_bans(http: httpx.Client) -> None:
    token, *_ = tokens_of(http, "dog")
    body = {"prompt": STORY, "temperature": 0, "max_tokens": 4, "logprobs": 0}
    forced = one(http, **body, logit_bias={str(token): 100})["logprobs"]["tokens"]
    assert forced == one(http, prompt=[token], echo=True, max_tokens=0, logprobs=0)["logprobs"]["tokens"] * 4
    first = one(http, **body)["text"]
    banned = {str(token): -100 for token in tokens_of(http, first)[:1]}
    assert one(http, **body, logit_bias=banned)["text"] != first or not banned


def test_59_a_text_whose_end_is_banned_has_full_length(http: httpx.Client, endless: dict[str, int]) -> None:
    answer = complete(http, prompt=STORY, logit_bias=endless, max_tokens=40)
    assert (answer["choices"][0]["finish_reason"], answer["usage"]["completion_tokens"]) == ("length", 40)


@pytest.mark.parametrize("penalty", ["frequency_penalty", "presence_penalty"])
def test_60_penalties_ignore_the_prompt(http: httpx.Client, penalty: str) -> None:
    body = {"prompt": "dog dog dog dog dog dog", "temperature": 0, "max_tokens": 1}
    assert one(http, **body, **{penalty: 2})["text"] == one(http, **body)["text"]


@pytest.mark.parametrize(("penalty", "grows"), [("frequency_penalty", True), ("presence_penalty", False)])
def test_61_penalties_follow_the_formula(http: httpx.Client, penalty: str, grows: bool) -> None:
    token = tokens_of(http, STORY)[-1]
    body = {"prompt": STORY, "temperature": 0, "max_tokens": 8, "logprobs": 2}
    forced = one(http, **body, logit_bias={str(token): 100})["logprobs"]
    name = forced["tokens"][0]
    leads = [top[name] - max(value for key, value in top.items() if key != name) for top in forced["top_logprobs"]]
    for strength in (0.7, 2):
        handicaps = [strength * (step if grows else min(step, 1)) for step in range(8)]
        for bias in range(0, 60, 4):
            margins = [lead + bias - handicap for lead, handicap in zip(leads, handicaps, strict=True)]
            expected = next((step for step, margin in enumerate(margins) if margin < 0), 8)
            if min(map(abs, margins[: expected + 1])) < 0.05:
                continue  # too close to call
            found = one(http, **body, logit_bias={str(token): bias}, **{penalty: strength})["logprobs"]["tokens"]
            repeats = next((step for step, other in enumerate(found) if other != name), len(found))
            assert repeats == expected


def test_62_a_seed_repeats_itself_and_its_choices_differ(http: httpx.Client) -> None:
    body = {"prompt": STORY, "seed": 42, "temperature": 1, "max_tokens": 20, "n": 3, "logprobs": 2}
    first, second = complete(http, **body), complete(http, **body)
    assert first["choices"] == second["choices"]
    assert first["system_fingerprint"] == second["system_fingerprint"]
    assert len({choice["text"] for choice in complete(http, **body | {"temperature": 2})["choices"]}) > 1


@pytest.mark.parametrize("seed", [1.5, "a", True, 2**63, -(2**63) - 1], ids=str)
def test_63_a_seed_is_a_64_bit_integer(http: httpx.Client, seed: object) -> None:
    refused(http, "seed", prompt="a", seed=seed)


@pytest.mark.parametrize("seed", [-(2**63), 2**63 - 1, 0, 16.0], ids=str)
def test_63_every_64_bit_integer_is_a_seed(http: httpx.Client, seed: int) -> None:
    body = {"prompt": STORY, "seed": seed, "max_tokens": 8}
    assert one(http, **body) == one(http, **body)


def test_64_a_suffix_needs_a_model_that_fills_gaps(http: httpx.Client, plain: httpx.Client) -> None:
    error = refused(plain, "suffix", prompt="a", suffix="x")
    assert error["message"].startswith("Unrecognized request argument supplied: suffix")
    answer = complete(http, prompt="The dog ", suffix=" home.", temperature=0)
    assert answer["usage"]["prompt_tokens"] == len(tokens_of(http, "The dog ")) + len(tokens_of(http, " home."))


# ---- streams; test_streaming.py has the wire's own rules


def test_65_every_chunk_is_of_one_answer(http: httpx.Client) -> None:
    chunks = stream(http, prompt=STORY)
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    assert chunks[0]["object"] == "text_completion"
    assert all(len(chunk["choices"]) == 1 and "usage" not in chunk for chunk in chunks)


def test_66_a_stream_ends_once_and_is_the_whole_text(http: httpx.Client) -> None:
    body = {"prompt": STORY, "temperature": 0}
    chunks = stream(http, **body)
    *growing, last = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert set(growing) <= {None}
    assert last is not None
    assert joined(chunks) == [one(http, **body)]


def test_67_usage_comes_last_when_asked_for(http: httpx.Client) -> None:
    body = {"prompt": STORY, "temperature": 0}
    *chunks, last = stream(http, **body, stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"] == complete(http, **body)["usage"]
    assert last["id"] == chunks[0]["id"]


def test_68_stream_options_are_for_streams(http: httpx.Client) -> None:
    error = refused(http, "stream_options", prompt="a", stream_options={"include_usage": True})
    assert error["message"] == "The 'stream_options' parameter is only allowed when 'stream' is enabled."
    assert (error["param"], error["code"]) == ("stream_options", None)
    complete(http, prompt="a", max_tokens=1, stream_options=None)
    stream(http, prompt="a", max_tokens=1, stream_options={"include_obfuscation": False})


def test_69_the_columns_of_chunks_add_up(http: httpx.Client) -> None:
    body = {"prompt": STORY, "temperature": 0, "logprobs": 3}
    chunks = stream(http, **body)
    assert chunks[0]["choices"][0]["logprobs"]["text_offset"][:1] in ([len(STORY)], [])
    assert joined(chunks) == [one(http, **body)]


def test_69_a_stop_chunk_has_empty_columns(parrot: httpx.Client) -> None:
    *_, last = stream(parrot, prompt="(", max_tokens=30, logprobs=1)
    assert last["choices"][0] == {
        "text": "",
        "index": 0,
        "logprobs": {name: [] for name in COLUMNS},
        "finish_reason": "stop",
    }


def test_70_a_stream_begins_with_the_echoed_prompt(http: httpx.Client) -> None:
    body = {"prompt": STORY, "temperature": 0, "echo": True}
    chunks = stream(http, **body)
    assert chunks[0]["choices"][0]["text"].startswith(STORY)
    assert joined(chunks) == [one(http, **body)]


def test_71_every_choice_of_a_stream_ends_once(http: httpx.Client) -> None:
    chunks = stream(http, prompt=["a", "b"], n=2)
    ends = [chunk["choices"][0]["index"] for chunk in chunks if chunk["choices"][0]["finish_reason"]]
    assert sorted(ends) == [0, 1, 2, 3]


def test_72_chunks_hold_whole_characters(parrot: httpx.Client) -> None:
    body = {"prompt": "(", "max_tokens": 30}
    chunks = stream(parrot, **body)
    assert not any("\ufffd" in chunk["choices"][0]["text"] for chunk in chunks)
    assert joined(chunks)[0]["text"] == one(parrot, **body)["text"] == TEXT[1:]


def test_73_a_bad_request_is_no_stream(http: httpx.Client) -> None:
    refused(http, "n", prompt="a", n=0, stream=True)


def test_nothing_is_left_running(http: httpx.Client) -> None:
    assert is_idle(http)
