"""Fields for samplers and for tokens over HTTP: each has a required effect on the built-in model."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from completion_requests import complete, one, problem, stream, tokens_of

PROMPT = "Once upon a time"
Json = dict[str, Any]


def choice(http: httpx.Client, **body: Any) -> Json:
    return one(http, **{"prompt": PROMPT, "max_tokens": 24, "seed": 3} | body)


EFFECTS = [
    {"typical_p": 0.2},
    {"top_n_sigma": 0.1},
    {"xtc_probability": 1, "xtc_threshold": 0.05},
    {"dynatemp_range": 2, "dynatemp_exponent": 0.5},
    {"dry_multiplier": 10, "dry_allowed_length": 0},
    {"mirostat": 1, "mirostat_tau": 0.5},
    {"mirostat": 2, "mirostat_tau": 0.5, "mirostat_eta": 1},
    {"samplers": ["top_k"], "top_k": 1},
    {"adaptive_target": 0.02},
    {"adaptive_target": 0.02, "adaptive_decay": 0, "samplers": ["adaptive_p", "temp"]},
    {"repeat_last_n": 3, "repetition_penalty": 2},
    {"repeat_last_n": -1, "presence_penalty": 2},
    {"allowed_token_ids": [300, 301, 302]},
]
OFF = [
    {"typical_p": 1},
    {"top_n_sigma": 0},
    {"top_n_sigma": -1},
    {"xtc_probability": 0, "xtc_threshold": 0.3},
    {"xtc_probability": 1, "xtc_threshold": 0.51},
    {"dynatemp_range": 0, "dynatemp_exponent": 2},
    {"dry_multiplier": 0, "dry_base": 3, "dry_sequence_breakers": ["x"]},
    {"mirostat": 0, "mirostat_tau": 1, "mirostat_eta": 1},
    {"samplers": None},
    {"adaptive_target": -1, "adaptive_decay": 0.2},
    {"min_keep": 5},
    {"repeat_last_n": 5},
    {"repeat_last_n": 0, "presence_penalty": 2},
    {"spaces_between_special_tokens": False},
    {"truncation_side": "right"},
]


@pytest.mark.parametrize("fields", EFFECTS, ids=str)
def test_a_sampler_changes_the_text_and_a_seed_repeats_it(http: httpx.Client, fields: Json) -> None:
    plain = choice(http)["text"]
    changed = choice(http, **fields)["text"]
    assert changed != plain
    prediction = {"type": "content", "content": changed}
    assert choice(http, **fields)["text"] == choice(http, **fields, prediction=prediction)["text"] == changed


@pytest.mark.parametrize("fields", OFF, ids=str)
def test_a_sampler_that_is_off_changes_nothing(http: httpx.Client, fields: Json) -> None:
    assert choice(http, **fields)["text"] == choice(http)["text"]


def test_min_keep_leaves_further_tokens(http: httpx.Client) -> None:
    greedy = choice(http, min_p=1)["text"]
    assert choice(http, min_p=1, min_keep=1)["text"] == greedy
    assert choice(http, min_p=1, min_keep=9)["text"] != greedy


def test_samples_have_their_own_state(http: httpx.Client) -> None:
    """The first of several choices is that of a request for one choice, also where a sampler remembers."""
    for fields in ({"mirostat": 2, "mirostat_tau": 2}, {"dry_multiplier": 2, "dry_penalty_last_n": -1}):
        several = complete(http, prompt=PROMPT, max_tokens=24, seed=3, n=3, **fields)["choices"]
        assert several[0]["text"] == choice(http, **fields)["text"]
        assert len({each["text"] for each in several}) > 1


def test_dry_breaks_a_loop_and_breakers_permit_it(http: httpx.Client) -> None:
    red, blue = (tokens_of(http, f" {word}")[-1] for word in ("cat", "dog"))
    loop = {"prompt": [red, blue] * 6 + [red], "temperature": 0, "max_tokens": 1, "return_token_ids": True}
    loop |= {"allowed_token_ids": [red, blue], "logit_bias": {str(blue): 20}}
    dry = {"dry_multiplier": 50, "dry_allowed_length": 1}
    assert choice(http, **loop)["token_ids"] == [blue]
    assert choice(http, **loop, **dry)["token_ids"] == [red]
    assert choice(http, **loop, **dry, dry_sequence_breakers=["zebra"])["token_ids"] == [red]
    assert choice(http, **loop, **dry, dry_sequence_breakers=["cat"])["token_ids"] == [blue]


def test_the_order_of_samplers_counts(http: httpx.Client) -> None:
    hot = {"temperature": 2, "top_p": 0.3, "max_tokens": 40}
    first, last = (
        choice(http, **hot, samplers=[*order]) for order in (("temperature", "top_p"), ("top_p", "temperature"))
    )
    assert first["text"] == choice(http, **hot)["text"]
    assert last["text"] != first["text"]
    assert choice(http, **hot, samplers=[])["text"] == choice(http, max_tokens=40)["text"]


def test_only_allowed_tokens_are_generated(http: httpx.Client) -> None:
    allowed = tokens_of(http, " yes no maybe")
    found = choice(http, allowed_token_ids=allowed, return_token_ids=True, logprobs=3)
    assert set(found["token_ids"]) <= set(allowed)
    assert len(found["token_ids"]) == 24
    assert all(entry.keys() - {found["logprobs"]["tokens"][0]} for entry in found["logprobs"]["top_logprobs"])


# ---- truncate_prompt_tokens


def test_a_prompt_is_truncated_on_either_side(http: httpx.Client) -> None:
    ids = tokens_of(http, "The dog and the cat went home.")
    for side, kept in (("left", ids[-3:]), ("right", ids[:3])):
        wanted = choice(http, prompt=kept, echo=True, logprobs=0, return_token_ids=True)
        for given in ("The dog and the cat went home.", ids):
            body = {"prompt": given, "truncate_prompt_tokens": 3, "truncation_side": side, "echo": True, "logprobs": 0}
            assert choice(http, **body, return_token_ids=True) == wanted
    usage = complete(http, prompt="The dog and the cat went home.", truncate_prompt_tokens=3, max_tokens=1)["usage"]
    assert usage["prompt_tokens"] == 3


def test_a_prompt_that_is_too_long_is_truncated_to_the_context(http: httpx.Client) -> None:
    context = http.get("/v1/models").json()["data"][0]["max_model_len"]
    long = "The dog went home. " * context
    problem(http.post("/v1/completions", json={"prompt": long, "max_tokens": 2}), 400)
    answer = complete(http, prompt=long, max_tokens=2, truncate_prompt_tokens=-1)
    assert answer["usage"]["prompt_tokens"] == context - 2


# ---- log probabilities


def test_the_same_ids_are_reported_at_each_position(http: httpx.Client) -> None:
    ids = tokens_of(http, " yes no maybe")
    body = {"echo": True, "logprobs": 0, "logprob_token_ids": ids, "return_tokens_as_token_ids": True}
    found = choice(http, **body, max_tokens=5, ignore_eos=True)["logprobs"]
    names = [f"token_id:{each}" for each in ids]
    assert found["top_logprobs"][0] is None
    for own, logprob, entry in zip(
        found["tokens"][1:], found["token_logprobs"][1:], found["top_logprobs"][1:], strict=True
    ):
        assert [*entry] == [own, *(each for each in names if each != own)]
        assert entry[own] == logprob
    streamed = stream(http, prompt=PROMPT, seed=3, max_tokens=5, ignore_eos=True, **body)
    entries = [entry for chunk in streamed for entry in chunk["choices"][0]["logprobs"]["top_logprobs"]]
    assert entries == found["top_logprobs"]


def test_chosen_ids_have_the_log_probabilities_that_scoring_gives_them(http: httpx.Client) -> None:
    ids = tokens_of(http, " yes no maybe")
    named = {"return_tokens_as_token_ids": True, "logprobs": 0}
    entry = choice(http, **named, logprob_token_ids=ids, max_tokens=1)["logprobs"]["top_logprobs"][0]
    for each in ids:
        scored = choice(http, **named, prompt=[*tokens_of(http, PROMPT), each], echo=True, max_tokens=0)["logprobs"]
        assert scored["tokens"][-1] == f"token_id:{each}"
        assert scored["token_logprobs"][-1] == entry[f"token_id:{each}"]


def test_chosen_ids_of_the_prompt_come_from_the_cache(http: httpx.Client) -> None:
    ids = tokens_of(http, " yes no maybe")
    story = "A miller and a tailor shared one lamp, and so each of them worked only while the other one was asleep."
    body = {"prompt": story, "max_tokens": 0, "echo": True, "logprobs": 0, "logprob_token_ids": ids}
    first, second = complete(http, **body), complete(http, **body)
    assert second["choices"] == first["choices"]
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 10
    prompt_logprobs = choice(http, prompt=story, prompt_logprobs=0, logprob_token_ids=ids)["prompt_logprobs"]
    for entry, wanted in zip(prompt_logprobs[1:], first["choices"][0]["logprobs"]["top_logprobs"][1:], strict=True):
        assert {str(each) for each in ids} <= entry.keys()
        assert sorted(each["logprob"] for each in entry.values()) == sorted(wanted.values())


# ---- text


def test_a_stop_string_can_be_part_of_the_text(http: httpx.Client) -> None:
    whole = choice(http)["text"]
    stop = whole[20:23]
    wanted = whole[: whole.index(stop) + len(stop)]
    body = {"stop": stop, "include_stop_str_in_output": True}
    found = choice(http, **body)
    assert (found["text"], found["finish_reason"]) == (wanted, "stop")
    chunks = stream(http, prompt=PROMPT, max_tokens=24, seed=3, **body)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == wanted


def test_special_tokens_have_a_text_on_request(http: httpx.Client, facts: Json) -> None:
    end, name = facts["eos_token_id"], facts["eos_token"]
    forced = {"logit_bias": {str(end): 100}, "max_tokens": 2}
    assert choice(http, **forced, ignore_eos=True)["text"] == 2 * name
    assert choice(http, **forced, ignore_eos=True, skip_special_tokens=True)["text"] == ""
    shown = {"include_stop_str_in_output": True, "skip_special_tokens": False}
    assert choice(http, **forced, **shown)["text"] == name
    assert choice(http, **forced, include_stop_str_in_output=True)["text"] == ""


# ---- /infill


def test_infill_has_the_samplers_too(http: httpx.Client) -> None:
    gap = {"input_prefix": "The dog\n", "prompt": "went ", "input_suffix": " home.", "n_predict": 20, "seed": 4}

    def middle(**body: Any) -> str:
        return str(http.post("/infill", json=gap | body).json()["content"])

    plain = {"samplers": ["dry", "top_k", "temperature"], "temperature": 1.0}
    assert middle(**plain, dry_multiplier=0) == middle(**plain)
    changed = middle(**plain, dry_multiplier=20, dry_allowed_length=0, dry_penalty_last_n=-1)
    assert changed != middle(**plain)
    same = {"max_tokens": 20, "seed": 4, "dry_multiplier": 20, "dry_allowed_length": 0, "dry_penalty_last_n": -1}
    whole = one(http, prompt="The dog\nwent ", suffix=" home.", top_k=40, samplers=plain["samplers"], **same)
    assert changed == whole["text"]
    assert middle(mirostat=2, mirostat_tau=0.1) != middle()
