"""The rules of OpenAI's text Completions API as numbered cases. Each function is a case; its name is the rule.

MUST: the behaviour is documented, or was recorded from OpenAI's servers. SHOULD: a recommendation where it is neither.
"""

from __future__ import annotations

import re
import time
from itertools import pairwise
from statistics import fmean
from typing import Any

from probe import (
    COLUMNS,
    STORY,
    Json,
    Probe,
    assert_close,
    error_of,
    has_message,
    has_no_param_and_code,
    joined,
    token_bytes,
)
from verdict import CASES, MUST, SHOULD, NotApplicable, case

__all__ = ["CASES"]

EXAMPLE: Json = {
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
"""The example request of OpenAI's API reference, with every field except `model`."""

# ---- authentication and protocol


@case(1, MUST)
def a_missing_key_is_named(api: Probe) -> None:
    require_key(api)
    with api.client(None) as other_client:
        error = error_of(other_client.post("/completions", json={}), 401)
    assert (error["type"], error["code"]) == ("invalid_request_error", None)
    assert error["message"].startswith("You didn't provide an API key.")


@case(2, MUST)
def a_wrong_key_is_masked(api: Probe) -> None:
    require_key(api)
    with api.client("bad-key-for-error-test") as other_client:
        error = error_of(other_client.post("/completions", json={}), 401)
    assert error["code"] == "invalid_api_key"
    assert error["message"].startswith("Incorrect API key provided: bad-key-**********test.")


@case(3, MUST)
def the_key_is_checked_first(api: Probe) -> None:
    require_key(api)
    with api.client("wrong") as other_client:
        error_of(other_client.post("/completions", content=b'{"model":"nope",'), 401)


@case(4, MUST)
def broken_json_is_refused_as_such(api: Probe) -> None:
    error = error_of(api.send(b'{"model":'), 400)
    assert error["message"].startswith("We could not parse the JSON body of your request.")
    has_no_param_and_code(error)


@case(5, MUST)
def the_model_must_be_named(api: Probe) -> None:
    for body in (b"{}", b'{"prompt":"a"}'):
        error = error_of(api.send(body), 400)
        has_message(error, "you must provide a model parameter")
        has_no_param_and_code(error)


@case(6, MUST)
def an_unknown_model_is_not_found(api: Probe) -> None:
    error = error_of(api.ask(model="no-such", prompt="a"), 404)
    assert error["code"] == "model_not_found"
    assert "`no-such`" in error["message"]


@case(7, MUST)
def an_unknown_field_is_refused_by_name(api: Probe) -> None:
    for name, value in (("foo", 1), ("top_k", 5), ("messages", [])):
        assert name in api.refused(name, prompt="a", **{name: value})["message"]


@case(8, MUST)
def an_unknown_path_is_a_404_envelope(api: Probe) -> None:
    error_of(api.http.post("/nope"), 404)


@case(8, SHOULD)
def an_unknown_path_has_the_code_unknown_url(api: Probe) -> None:
    assert error_of(api.http.post("/nope"), 404)["code"] == "unknown_url"


@case(9, MUST)
def completions_are_posted(api: Probe) -> None:
    error_of(api.http.get("/completions"), 405)


@case(10, SHOULD)
def a_body_must_be_called_json(api: Probe) -> None:
    error_of(api.send(f'{{"model":"{api.model}","prompt":"a"}}'.encode(), kind="text/plain"), 400)


@case(11, MUST)
def every_answer_has_a_request_id_of_its_own(api: Probe) -> None:
    answers = [api.ask(prompt="a", max_tokens=1), api.ask(n=0), api.ask(model="no-such"), api.http.get("/nope")]
    if api.key:
        with api.client("wrong") as other_client:
            answers.append(other_client.post("/completions", json={}))
    assert len({answer.headers["x-request-id"] for answer in answers}) == len(answers)


@case(11, SHOULD)
def the_headers_are_openais(api: Probe) -> None:
    headers = api.ask(prompt="a", max_tokens=1).headers
    assert re.fullmatch("req_[0-9a-f]{32}", headers["x-request-id"])
    assert headers["openai-processing-ms"].isdigit()
    assert headers["openai-version"] == "2020-10-01"


@case(12, MUST)
def every_error_has_the_same_four_keys(api: Probe) -> None:
    for body in (b"", b"[]", b'"text"', b"null", b'{"prompt": ', b"\xff"):
        error_of(api.send(body), 400)
    for field in ({"n": 0}, {"temperature": "hot"}, {"prompt": {}}, {"stream": 1}, {"stop": 5}):
        error_of(api.ask(**field), 400)


@case(13, MUST)
def models_are_listed_and_found(api: Probe) -> None:
    listing = api.http.get("/models").json()
    assert listing["object"] == "list"
    for entry in listing["data"]:
        assert entry["object"] == "model"
        assert isinstance(entry["created"], int)
        assert isinstance(entry["owned_by"], str)
    (model,) = (entry for entry in listing["data"] if entry["id"] == api.model)
    assert api.http.get(f"/models/{api.model}").json() == model
    assert error_of(api.http.get("/models/nope"), 404)["code"] == "model_not_found"


# ---- basics and nulls


@case(14, MUST)
def the_example_request_is_answered(api: Probe) -> None:
    fills_gaps = api.ask(**EXAMPLE).status_code == 200
    answer = api.complete(**EXAMPLE | ({} if fills_gaps else {"suffix": None}))
    assert answer.keys() >= {"id", "object", "created", "model", "system_fingerprint", "choices", "usage"}
    assert answer["choices"][0].keys() >= {"text", "index", "logprobs", "finish_reason"}
    usage = answer["usage"]
    assert usage.keys() >= {"prompt_tokens", "completion_tokens", "total_tokens"}
    assert usage["completion_tokens_details"].keys() >= {
        "accepted_prediction_tokens",
        "audio_tokens",
        "reasoning_tokens",
        "rejected_prediction_tokens",
    }
    assert usage["prompt_tokens_details"].keys() >= {"audio_tokens", "cached_tokens"}


@case(15, MUST)
def a_prompt_is_enough(api: Probe) -> None:
    is_basic(api.complete(prompt=STORY))


@case(16, MUST)
def null_is_as_if_absent(api: Probe) -> None:
    is_basic(api.complete(prompt=STORY, **dict.fromkeys(EXAMPLE.keys() - {"prompt"})))


def is_basic(answer: Json) -> None:
    """Check the response to a request with only a model and one prompt."""
    (choice,) = answer["choices"]
    usage = answer["usage"]
    assert usage["completion_tokens"] <= 16
    assert choice["finish_reason"] in ("stop", "length")
    assert choice["finish_reason"] == "stop" or usage["completion_tokens"] == 16
    assert choice["logprobs"] is None
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert abs(answer["created"] - time.time()) < 60
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


@case(17, MUST)
def temperature_0_repeats_itself(api: Probe) -> None:
    body = {"prompt": STORY, "max_tokens": 7, "temperature": 0}
    assert api.one(**body)["text"] == api.one(**body)["text"]


@case(18, MUST)
def the_official_client_is_served(api: Probe) -> None:
    try:
        import openai
    except ImportError:
        raise NotApplicable("the package openai is not installed") from None
    with (
        openai.DefaultHttpxClient(trust_env=False) as transport,
        openai.OpenAI(base_url=api.url, api_key=api.key or "none", max_retries=0, http_client=transport) as client,
    ):
        body: Json = {"model": api.model, "prompt": STORY, "temperature": 0}
        whole = client.completions.create(**body)
        with client.completions.create(**body, stream=True) as stream:
            assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
        refusal = None
        try:
            client.completions.create(**body | {"temperature": 3})
        except openai.BadRequestError as error:
            refusal = error
        assert refusal is not None, "temperature=3 raised no BadRequestError"
        assert refusal.param in (None, "temperature")
        assert refusal.type == "invalid_request_error"


# ---- prompts


@case(19, MUST)
def choices_come_prompt_by_prompt_and_prompts_count_once(api: Probe) -> None:
    answer = api.complete(prompt=["a b c", "d e f"], echo=True, n=2)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["text"][:5] for choice in answer["choices"]] == ["a b c", "a b c", "d e f", "d e f"]
    assert answer["usage"]["prompt_tokens"] == length_of(api, "a b c") + length_of(api, "d e f")


@case(20, MUST)
def a_text_and_its_tokens_are_the_same_prompt(api: Probe) -> None:
    text = "The quick brown fox"
    ids = api.tokens(text)
    if api.tokens(text, add_special_tokens=True) != ids:
        raise NotApplicable("the model has a BOS before a text")
    answers = [api.complete(prompt=prompt, temperature=0) for prompt in (text, ids, [ids])]
    assert len({answer["choices"][0]["text"] for answer in answers}) == 1
    assert {answer["usage"]["prompt_tokens"] for answer in answers} == {len(ids)}


@case(21, MUST)
def a_null_prompt_starts_a_document(api: Probe) -> None:
    assert api.one(prompt=None)["index"] == 0


@case(22, SHOULD)
def an_empty_prompt_starts_a_document(api: Probe) -> None:
    assert api.complete(prompt="")["usage"]["prompt_tokens"] in (0, 1)


@case(23, MUST)
def a_prompt_has_one_of_four_forms(api: Probe) -> None:
    for prompt in ([[]], [1, "a"], [[1], "a"], {"a": 1}, 5, [1.5], [True]):
        api.refused("prompt", prompt=prompt)


@case(23, SHOULD)
def an_empty_list_is_no_prompt(api: Probe) -> None:
    api.refused("prompt", prompt=[])


@case(24, MUST)
def a_prompt_has_ids_of_the_vocabulary(api: Probe) -> None:
    beyond_the_vocabulary(api, (api.last_token or 2**30) + 1000)


@case(24, SHOULD)
def a_prompt_has_no_negative_ids(api: Probe) -> None:
    beyond_the_vocabulary(api, -1)


def beyond_the_vocabulary(api: Probe, token: int) -> None:
    error = api.refused(None, prompt=[token])
    last = r"\d+" if api.last_token is None else api.last_token
    wanted = rf"Invalid token in prompt: {token}\. Minimum value is 0, maximum value is {last} \(inclusive\)\."
    assert re.fullmatch(wanted, error["message"]), f"the message is {error['message']!r}"
    has_no_param_and_code(error)


# ---- max_tokens and context


@case(25, MUST)
def no_tokens_need_echo(api: Probe) -> None:
    has_message(
        api.refused("max_tokens", prompt="a", max_tokens=0),
        "You requested a length 0 completion, but you did not set the 'echo' parameter. That means that we will return "
        "no data to you. (HINT: set 'echo' to true in order for the API to echo back the prompt to you.)",
    )


@case(26, MUST)
def no_tokens_need_logprobs(api: Probe) -> None:
    has_message(
        api.refused("max_tokens", prompt="a", max_tokens=0, echo=True),
        "You requested a length 0 completion, but did not specify a 'logprobs' parameter to see the probability of "
        "each token. Either request a completion with length greater than 1, or set 'logprobs' to 0 (to see the "
        "probabilities of each token you submitted) or more (to also see the probabilities over alternative tokens).",
    )


@case(27, MUST)
def a_prompt_can_be_scored(api: Probe) -> None:
    answer = api.complete(prompt=STORY, max_tokens=0, echo=True, logprobs=0)
    (choice,), usage = answer["choices"], answer["usage"]
    assert (choice["text"], choice["finish_reason"]) == (STORY, "length")
    columns = choice["logprobs"]
    assert len(columns["tokens"]) == usage["prompt_tokens"]
    first, *rest = columns["token_logprobs"]
    assert first is None
    assert all(value <= 0 for value in rest)
    assert columns["top_logprobs"] is None
    assert columns["text_offset"][0] == 0
    assert usage["total_tokens"] == usage["prompt_tokens"]
    assert usage.get("completion_tokens", 0) == 0


@case(28, MUST)
def max_tokens_is_a_count(api: Probe) -> None:
    for value in (-1, "16", 1.5, True):
        api.refused("max_tokens", prompt="a", max_tokens=value)


@case(29, MUST)
def a_completion_must_fit_in_the_context(api: Probe) -> None:
    wanted = api.context or 10**6
    message = api.refused(None, prompt=STORY, max_tokens=wanted)["message"]
    found = re.fullmatch(
        r"This model's maximum context length is (\d+) tokens, however you requested (\d+) tokens \((\d+) in your "
        r"prompt; (\d+) for the completion\)\. Please reduce your prompt; or completion length\.",
        message,
    )
    assert found, f"the message is {message!r}"
    context, total, prompt, completion = map(int, found.groups())
    assert (context, completion) == (api.context or context, wanted)
    assert total == prompt + completion


@case(30, SHOULD)
def a_completion_may_fill_the_context(api: Probe) -> None:
    if api.context is None:
        raise NotApplicable("the server does not report its context length")
    free = api.context - length_of(api, STORY)
    body = {"model": api.model, "prompt": STORY, "max_tokens": free, "stream": True}
    with api.http.stream("POST", "/completions", json=body) as response:  # closed as soon as it is accepted
        assert response.status_code == 200


# ---- log probabilities


@case(31, MUST)
def no_alternatives_are_a_null_column(api: Probe) -> None:
    answer = api.complete(prompt=STORY, logprobs=0, max_tokens=5)
    columns = answer["choices"][0]["logprobs"]
    assert columns.pop("top_logprobs") is None
    assert {len(column) for column in columns.values()} == {answer["usage"]["completion_tokens"]}


@case(32, MUST)
def the_token_itself_is_always_among_the_alternatives(api: Probe) -> None:
    columns = api.one(prompt=STORY, logprobs=3, temperature=1, max_tokens=20)["logprobs"]
    for token, logprob, top in rows(columns):
        assert top[token] == logprob
        best = sorted(top, key=top.__getitem__, reverse=True)[:3]
        assert len(top) == 3 + (token not in best)


@case(33, MUST)
def temperature_0_takes_the_likeliest(api: Probe) -> None:
    for _, logprob, top in rows(api.one(prompt=STORY, logprobs=5, temperature=0)["logprobs"]):
        assert logprob == max(top.values())


@case(34, MUST)
def more_than_5_alternatives_mean_5(api: Probe) -> None:
    most = max(len(top) for _, _, top in rows(api.one(prompt=STORY, logprobs=15)["logprobs"]))
    assert most <= 6, f"a map has {most} entries"


@case(35, MUST)
def logprobs_is_a_count(api: Probe) -> None:
    for value in (-1, "3", True, 2.5):
        api.refused("logprobs", prompt="a", logprobs=value)


@case(36, MUST)
def offsets_count_code_points(api: Probe) -> None:
    columns = api.one(prompt="héllo 😀 wörld", logprobs=1, logit_bias=api.eos_ban)["logprobs"]
    assert columns["text_offset"][0] == 13


@case(37, MUST)
def offsets_lead_to_the_tokens(api: Probe) -> None:
    choice = api.one(prompt="Tom's dog\n\nran, and 漢字!", echo=True, logprobs=1, logit_bias=api.eos_ban)
    offsets = choice["logprobs"]["text_offset"]
    assert all(before <= after for before, after in pairwise(offsets))
    for token, offset in zip(choice["logprobs"]["tokens"], offsets, strict=True):
        assert token.startswith("bytes:") or choice["text"][offset : offset + len(token)] == token


@case(38, MUST)
def tokens_spell_the_bytes_of_the_prompt(api: Probe) -> None:
    prompt = "’😀漢字"
    assert b"".join(map(token_bytes, api.scored(prompt)["tokens"])) == prompt.encode()


@case(39, MUST)
def a_prompts_scores_do_not_depend_on_the_temperature(api: Probe) -> None:
    cold, hot = (api.scored(STORY, temperature=temperature)["token_logprobs"] for temperature in (0, 2))
    assert_close(cold, hot, within=1e-3)


@case(40, MUST)
def evaluators_find_an_entry_for_each_token_and_one_more(api: Probe) -> None:
    ids = [api.token] * 6
    choice = api.one(prompt=[ids], echo=True, max_tokens=1, logprobs=1, temperature=0, seed=1234)
    (length,) = {len(choice["logprobs"][name]) for name in COLUMNS}
    assert length == len(ids) + 1 or (length == len(ids) and choice["finish_reason"] == "stop")
    assert choice["logprobs"]["token_logprobs"][0] is None


@case(41, SHOULD)
def a_text_scores_as_it_was_written(api: Probe) -> None:
    ids = api.tokens(STORY)
    written = api.one(prompt=ids, temperature=0, max_tokens=8, logprobs=1, logit_bias=api.eos_ban)
    scored = api.scored([*ids, *api.tokens(written["text"])])
    if scored["tokens"][len(ids) :] != written["logprobs"]["tokens"]:
        raise NotApplicable("the tokenizer gives the text other tokens than the model generated")
    assert_close(scored["token_logprobs"][len(ids) :], written["logprobs"]["token_logprobs"], within=0.02)


@case(42, MUST)
def no_token_starts_beyond_the_end_of_the_text(api: Probe) -> None:
    body, stop, _ = stopped(api)
    choice = api.one(**body, stop=stop, logprobs=1)
    tokens = choice["logprobs"]["tokens"]
    if any(token.startswith("bytes:") for token in tokens):
        raise NotApplicable("the text has broken characters")
    assert "".join(tokens).startswith(choice["text"])
    assert len("".join(tokens[:-1])) < len(choice["text"])


@case(43, SHOULD)
def a_bias_does_not_change_log_probabilities(api: Probe) -> None:
    body = {"prompt": STORY, "echo": True, "logprobs": 5, "max_tokens": 1, "temperature": 0}
    unused = api.last_token or api.token
    biased, plain = (api.one(**body, logit_bias=bias)["logprobs"] for bias in ({str(unused): -100}, None))
    assert biased["tokens"] == plain["tokens"]
    assert_close(biased["token_logprobs"], plain["token_logprobs"], within=1e-3)
    assert biased["top_logprobs"][-1].keys() == plain["top_logprobs"][-1].keys()


# ---- n, best_of, echo


@case(44, MUST)
def n_is_at_most_best_of(api: Probe) -> None:
    has_message(
        api.refused("best_of", prompt="a", n=2, best_of=1),
        "You requested that the server return more choices than it will generate (HINT: you must set 'n' (currently "
        "2) to be at most 'best_of' (currently 1), or omit either parameter if you don't specifically want to use "
        "them.)",
    )


@case(45, MUST)
def n_choices_come_back(api: Probe) -> None:
    for best_of in ({}, {"best_of": 2}):
        assert len(api.complete(prompt="a", n=2, **best_of)["choices"]) == 2


@case(46, MUST)
def the_best_of_3_comes_back(api: Probe) -> None:
    answer = api.complete(prompt=STORY, best_of=3, n=1, temperature=1, max_tokens=8)
    assert [choice["index"] for choice in answer["choices"]] == [0]


@case(46, SHOULD)
def every_candidate_is_counted(api: Probe) -> None:
    if not api.eos_ban:
        raise NotApplicable("the server does not report its end token")
    body = {"prompt": STORY, "best_of": 3, "max_tokens": 8, "logit_bias": api.eos_ban}
    assert api.complete(**body)["usage"]["completion_tokens"] == 24


@case(47, SHOULD)
def the_best_come_first(api: Probe) -> None:
    body = {"prompt": STORY, "logprobs": 0, "max_tokens": 12, "logit_bias": api.eos_ban}
    best = [fmean(choice["logprobs"]["token_logprobs"]) for choice in api.complete(**body, n=4, best_of=8)["choices"]]
    assert best == sorted(best, reverse=True), f"the means are {best}"


@case(48, MUST)
def the_best_of_several_cannot_be_streamed(api: Probe) -> None:
    api.refused("best_of", prompt="a", best_of=3, stream=True)
    assert len(joined(api.stream(prompt="a", best_of=1))) == 1


@case(49, MUST)
def counts_have_limits(api: Probe) -> None:
    for name, value in (("n", 0), ("n", 129), ("best_of", 21), ("n", "2"), ("n", True)):
        api.refused(name, prompt="a", **{name: value})


@case(50, MUST)
def echo_puts_the_prompt_first(api: Probe) -> None:
    answer = api.complete(prompt=STORY, echo=True, max_tokens=5, logit_bias=api.eos_ban)
    text, written = answer["choices"][0]["text"], answer["usage"]["completion_tokens"]
    assert text.startswith(STORY)
    assert (len(text) > len(STORY)) == (written > 0)
    assert written <= 5


# ---- stop and sampling


@case(51, MUST)
def a_stop_string_ends_the_text_before_it(api: Probe) -> None:
    body, stop, before = stopped(api)
    choice = api.one(**body, stop=stop)
    assert choice["text"] == before, f"stop={stop!r}: found {choice['text']!r} instead of {before!r}"
    assert choice["finish_reason"] == "stop"


@case(52, MUST)
def up_to_4_stop_strings_are_applied(api: Probe) -> None:
    body, stop, before = stopped(api)
    assert api.one(**body, stop=["\x00no", "\x01no", "\x02no", stop])["text"] == before
    for other in (["a", "b", "c", "d", "e"], 5, [1], {}):
        api.refused("stop", prompt="a", stop=other)


@case(52, SHOULD)
def an_empty_list_is_no_stop(api: Probe) -> None:
    api.refused("stop", prompt="a", stop=[])


@case(53, MUST)
def a_stop_string_in_the_prompt_does_not_count(api: Probe) -> None:
    assert api.one(prompt="One, two, three,", echo=True, max_tokens=5, stop=["two"])["text"].startswith(
        "One, two, three,"
    )


@case(54, MUST)
def a_stream_shows_nothing_of_a_stop_string(api: Probe) -> None:
    body, stop, before = stopped(api, length=9)
    assert joined(api.stream(**body, stop=stop))[0]["text"] == api.one(**body, stop=stop)["text"] == before


@case(55, MUST)
def numbers_have_limits_which_are_allowed(api: Probe) -> None:
    refused: Json = {
        "temperature": (2.1, -0.1, "hot"),
        "top_p": (1.1, -0.1),
        "presence_penalty": (2.1, -2.1),
        "frequency_penalty": (2.1, -2.1),
    }
    for name, values in refused.items():
        for value in values:
            api.refused(name, prompt="a", **{name: value})
    allowed = {"temperature": (2, 0), "top_p": (0, 1), "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2)}
    for name, limits in allowed.items():
        for value in limits:
            api.complete(prompt="a", max_tokens=2, **{name: value})


@case(56, MUST)
def a_bias_is_for_a_token_id(api: Probe) -> None:
    error = api.refused("logit_bias", prompt="a", logit_bias={"abc": 1})
    has_message(error, "Invalid key in 'logit_bias': abc. You should only be submitting non-negative integers.")
    assert error["param"] == "logit_bias"


@case(57, MUST)
def a_bias_is_for_a_token_of_the_vocabulary(api: Probe) -> None:
    token = (api.last_token or 2**30) + 5
    error = api.refused("logit_bias", prompt="a", logit_bias={str(token): 1})
    last = r"\d+" if api.last_token is None else api.last_token
    wanted = rf"Invalid key in 'logit_bias': {token}\. Maximum value is {last}\."
    assert re.fullmatch(wanted, error["message"]), f"the message is {error['message']!r}"
    assert error["param"] == "logit_bias"


@case(57, MUST)
def a_bias_is_at_most_100_and_may_be_empty(api: Probe) -> None:
    api.refused("logit_bias", prompt="a", logit_bias={"5": 101})
    for bias in ({}, None):
        api.complete(prompt="a", max_tokens=1, logit_bias=bias)


@case(58, MUST)
def a_bias_of_100_forces(api: Probe) -> None:
    name = api.scored([api.token] * 2)["tokens"][-1]
    forced = api.one(prompt=STORY, temperature=0, max_tokens=4, logprobs=0, logit_bias={str(api.token): 100})
    assert forced["logprobs"]["tokens"] == [name] * 4


@case(58, MUST)
def a_bias_of_minus_100_bans(api: Probe) -> None:
    body = {"prompt": STORY, "temperature": 0, "max_tokens": 1, "logprobs": 0}
    (first,) = api.one(**body, logit_bias=api.eos_ban)["logprobs"]["tokens"]
    ids = api.tokens(first)
    if len(ids) != 1:
        raise NotApplicable("the id of the first token cannot be found")
    banned = api.one(**body, logit_bias=api.eos_ban | {str(ids[0]): -100})["logprobs"]["tokens"]
    assert banned != [first]


@case(59, MUST)
def a_text_whose_end_is_banned_has_full_length(api: Probe) -> None:
    if not api.eos_ban:
        raise NotApplicable("the server does not report its end token")
    answer = api.complete(prompt=STORY, logit_bias=api.eos_ban, max_tokens=40)
    assert (answer["choices"][0]["finish_reason"], answer["usage"]["completion_tokens"]) == ("length", 40)


@case(60, MUST)
def penalties_ignore_the_prompt(api: Probe) -> None:
    body = {"prompt": "dog dog dog dog dog dog", "temperature": 0, "max_tokens": 1}
    plain = api.one(**body)["text"]
    for penalty in ("frequency_penalty", "presence_penalty"):
        assert api.one(**body, **{penalty: 2})["text"] == plain


@case(61, SHOULD)
def penalties_follow_the_formula(api: Probe) -> None:
    """A token with a bias must be repeated exactly until the penalties have used up the lead of its logit."""
    body = {"prompt": STORY, "temperature": 0, "max_tokens": 8, "logprobs": 2}
    forced = rows(api.one(**body, logit_bias={str(api.token): 100})["logprobs"])
    name = forced[0][0]
    leads = [top[name] - max(value for other, value in top.items() if other != name) for _, _, top in forced]
    for penalty in ("frequency_penalty", "presence_penalty"):
        handicaps = [2.0 * (step if penalty == "frequency_penalty" else min(step, 1)) for step in range(len(leads))]
        for step in (1, 3, 5):
            for bias in (round(handicaps[step] - leads[step]) + more for more in (-1, 0, 1)):
                margins = [lead + bias - handicap for lead, handicap in zip(leads, handicaps, strict=True)]
                wanted = next((at for at, margin in enumerate(margins) if margin < 0), len(margins))
                if abs(bias) > 100 or min(map(abs, margins[: wanted + 1])) < 0.05:
                    continue  # too close to decide
                tokens = api.one(**body, **{penalty: 2}, logit_bias={str(api.token): bias})["logprobs"]["tokens"]
                found = next((at for at, token in enumerate(tokens) if token != name), len(tokens))
                assert found == wanted, f"{penalty}: repeated {found} times, not {wanted}"


@case(62, MUST)
def a_seed_repeats_itself(api: Probe) -> None:
    body = {"prompt": STORY, "seed": 42, "temperature": 1, "max_tokens": 20}
    assert api.one(**body)["text"] == api.one(**body)["text"]


@case(62, SHOULD)
def the_choices_of_a_seed_differ(api: Probe) -> None:
    choices = api.complete(prompt=STORY, seed=42, temperature=1, max_tokens=20, n=3)["choices"]
    assert len({choice["text"] for choice in choices}) > 1


@case(63, MUST)
def a_seed_is_a_64_bit_integer(api: Probe) -> None:
    for seed in (1.5, "a", 2**63):
        api.refused("seed", prompt="a", seed=seed)
    api.complete(prompt="a", max_tokens=1, seed=-(2**63))


@case(64, MUST)
def a_suffix_is_not_part_of_the_text(api: Probe) -> None:
    suffix = " and so they all went home."
    response = api.ask(prompt="The dog ran", suffix=suffix)
    if response.status_code == 200:
        assert suffix not in response.json()["choices"][0]["text"]
    else:
        api.refused("suffix", prompt="The dog ran", suffix=suffix)


@case(64, SHOULD)
def a_suffix_is_refused_in_openais_words(api: Probe) -> None:
    response = api.ask(prompt="a", suffix="x")
    if response.status_code == 200:
        raise NotApplicable("the model fills in the middle")
    assert error_of(response, 400)["message"].startswith("Unrecognized request argument supplied: suffix")


# ---- streams


@case(65, MUST)
def all_chunks_belong_to_one_response(api: Probe) -> None:
    chunks = api.stream(prompt=STORY)
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert {len(chunk["choices"]) for chunk in chunks} == {1}
    assert not any("usage" in chunk for chunk in chunks)


@case(66, MUST)
def a_stream_ends_once_and_is_the_whole_text(api: Probe) -> None:
    body = {"prompt": STORY, "temperature": 0}
    chunks = api.stream(**body)
    *before, last = (chunk["choices"][0]["finish_reason"] for chunk in chunks)
    assert set(before) <= {None}
    assert last is not None
    assert joined(chunks)[0]["text"] == api.one(**body)["text"]


@case(67, MUST)
def usage_comes_last_when_asked_for(api: Probe) -> None:
    body = {"prompt": STORY, "temperature": 0}
    *chunks, last = api.stream(**body, stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    whole = api.complete(**body)["usage"]
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [last["usage"][count] for count in counts] == [whole[count] for count in counts]


@case(68, MUST)
def stream_options_are_for_streams(api: Probe) -> None:
    error = api.refused("stream_options", prompt="a", stream_options={"include_usage": True})
    has_message(error, "The 'stream_options' parameter is only allowed when 'stream' is enabled.")
    assert (error["param"], error["code"]) == ("stream_options", None)
    api.complete(prompt="a", max_tokens=1, stream_options=None)
    api.stream(prompt="a", max_tokens=1, stream_options={"include_obfuscation": False})


@case(69, MUST)
def the_columns_of_chunks_add_up(api: Probe) -> None:
    body = {"prompt": STORY, "temperature": 0, "logprobs": 3, "logit_bias": api.eos_ban}
    chunks = api.stream(**body)
    streamed, whole = joined(chunks)[0]["logprobs"], api.one(**body)["logprobs"]
    assert streamed["text_offset"][0] == len(STORY)
    assert (streamed["tokens"], streamed["text_offset"]) == (whole["tokens"], whole["text_offset"])
    assert [top.keys() for top in streamed["top_logprobs"]] == [top.keys() for top in whole["top_logprobs"]]
    assert_close(streamed["token_logprobs"], whole["token_logprobs"], within=1e-3)


@case(69, MUST)
def a_stop_chunk_without_text_has_empty_columns(api: Probe) -> None:
    body, stop, _ = stopped(api)
    last = api.stream(**body, stop=stop, logprobs=1)[-1]["choices"][0]
    if last["text"]:
        raise NotApplicable("the last chunk has text")
    assert last["finish_reason"] == "stop"
    assert last["logprobs"] == {name: [] for name in COLUMNS}


@case(70, MUST)
def a_stream_begins_with_the_echoed_prompt(api: Probe) -> None:
    body = {"prompt": STORY, "temperature": 0, "echo": True}
    chunks = api.stream(**body)
    assert chunks[0]["choices"][0]["text"].startswith(STORY)
    assert joined(chunks)[0]["text"] == api.one(**body)["text"]


@case(71, MUST)
def every_choice_of_a_stream_ends_once(api: Probe) -> None:
    parts = [chunk["choices"][0] for chunk in api.stream(prompt=["a", "b"], n=2)]
    assert sorted(part["index"] for part in parts if part["finish_reason"]) == [0, 1, 2, 3]


@case(72, MUST)
def chunks_hold_whole_characters(api: Probe) -> None:
    body = {"prompt": "漢字 😀 é 漢字 😀 é 漢字", "echo": True, "temperature": 0, "max_tokens": 24}
    chunks = api.stream(**body)
    whole = api.one(**body)["text"]
    assert joined(chunks)[0]["text"] == whole
    broken = sum(chunk["choices"][0]["text"].count("\ufffd") for chunk in chunks)
    assert broken <= whole.removesuffix("\ufffd").count("\ufffd") + 1  # max_tokens may cut the last character


@case(73, MUST)
def a_bad_request_is_no_stream(api: Probe) -> None:
    api.refused("n", prompt="a", n=0, stream=True)


@case(74, SHOULD)
def a_rate_limit_error_has_the_time_to_wait(api: Probe) -> None:
    raise NotApplicable("a client cannot reach a rate limit reliably")


# ---- helpers


def require_key(api: Probe) -> None:
    if not api.key:
        raise NotApplicable("no key was given")


def length_of(api: Probe, prompt: str) -> int:
    """The number of tokens of a text, as the server reports it."""
    length: int = api.complete(prompt=prompt, max_tokens=1)["usage"]["prompt_tokens"]
    return length


def rows(columns: Json) -> list[tuple[str, float, dict[str, float]]]:
    """The token, log probability and alternatives of each entry."""
    return list(zip(columns["tokens"], columns["token_logprobs"], columns["top_logprobs"], strict=True))


def stopped(api: Probe, length: int = 4) -> tuple[dict[str, Any], str, str]:
    """A request without stop strings, a string of `length` characters of its text, and the text before that."""
    body = {"prompt": STORY, "temperature": 0, "max_tokens": 24, "logit_bias": api.eos_ban}
    text: str = api.one(**body)["text"]
    stop = text[len(text) // 2 :][:length]
    if len(stop) < length or "\ufffd" in stop:
        raise NotApplicable("the greedy text is too short or broken")
    return body, stop, text[: text.index(stop)]
