"""Extension fields as cases: each function checks one field that OpenAI's API does not have.

Names and meanings are those of vLLM, llama-server, KoboldCpp and TabbyAPI (docs/api.md says which). A case does not
apply to a server that refuses the field by its name: the `param` of the error.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Container
from dataclasses import dataclass
from functools import partial
from typing import Any

from probe import STORY, Json, Probe, joined
from verdict import EXT, Case, NotApplicable

__all__ = [
    "EXTENSIONS",
    "NOT_ON_THE_BUILT_IN_MODEL",
    "NOT_WITH_VLLM",
    "Extension",
    "check_extension",
    "extension_cases",
]


@dataclass(frozen=True, slots=True)
class Extension:
    """The case of one field. `check` raises an exception if the field does not have its meaning."""

    field: str
    check: Callable[[Probe], None]


EXTENSIONS: list[Extension] = []
"""All cases, in the order of their definition."""


def extension(field: str) -> Callable[[Callable[[Probe], None]], Callable[[Probe], None]]:
    """A decorator that makes a function the case of a field."""

    def add(check: Callable[[Probe], None]) -> Callable[[Probe], None]:
        EXTENSIONS.append(Extension(field, check))
        return check

    return add


NOT_ON_THE_BUILT_IN_MODEL = {"input_extra"}
"""Fields whose case needs another model. `tests/api/test_infill.py` tests them."""

NOT_WITH_VLLM = {
    *("allowed_token_ids", "bad_words", "banned_strings", "banned_tokens", "custom_token_bans"),
    *("grammar", "json_schema", "response_format", "structured_outputs"),
    *("logprob_token_ids", "logprobs_mode", "priority", "repetition_detection", "token_healing"),
    *("typical_p", "top_n_sigma", "min_keep", "xtc_probability", "xtc_threshold"),
    *("dynatemp_range", "dynatemp_exponent", "mirostat", "mirostat_eta", "mirostat_tau"),
    *("dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers"),
    *("adaptive_target", "adaptive_decay"),
    "input_extra",
}
"""Fields that are refused by name where vLLM computes (`LIMITS` in engine/vllm/requests.py), or do not apply there."""


class RefusedByName(NotApplicable):
    """The server has refused the field `name`."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} is refused by name")
        self.name = name


def check_extension(case: Extension, api: Probe, refused: Container[str] = ()) -> None:
    """Check that a field has its meaning if it is none of `refused`, and that it is refused by its name if it is.

    Another field that the case needs may be refused instead if it is one of `refused` too.
    """
    reason, named = "", True
    try:
        case.check(api)
    except RefusedByName as why:
        reason = str(why)
        named = why.name in (case.field, *ALIASES[case.field]) or why.name in refused
    except NotApplicable as why:
        reason = str(why)
    assert named, f"{reason}, not {case.field}"
    assert bool(reason) == (case.field in refused), reason or f"{case.field} is not refused"


def extension_cases() -> list[Case]:
    """The cases of extensions for a report, numbered by themselves."""
    return [Case(number, EXT, each.field, each.check) for number, each in enumerate(EXTENSIONS, 1)]


def asked(api: Probe, field: str, **body: Any) -> Json:
    """The response to a request with an extension.

    Raises `NotApplicable` if the server refuses the field by name, or another one that it has no effect without.
    """
    response = api.ask(**{"prompt": STORY, "temperature": 0, "max_tokens": 8} | body)
    if response.status_code == 400:
        param = response.json()["error"]["param"]
        if param in (field, *SAMPLERS.get(field, ({},))[0], *ALIASES[field]):
            raise RefusedByName(param)
    assert response.status_code == 200, f"{response.status_code} {response.text[:120]}"
    answer: Json = response.json()
    return answer


ALIASES: defaultdict[str, tuple[str, ...]] = defaultdict(tuple, custom_token_bans=("banned_tokens",))
"""Names under which a refusal may name a field."""


def choice(api: Probe, field: str, **body: Any) -> Json:
    """The only choice of that response."""
    (found,) = asked(api, field, **body)["choices"]
    return dict(found)


# ---- samplers


SAMPLERS: dict[str, tuple[Json, Any]] = {
    # the field: other fields, and a value with which the text is another one than without the field
    "min_p": ({"temperature": 2}, 1),
    "repetition_penalty": ({"prompt": STORY * 3}, 2),
    "samplers": ({"temperature": 2, "top_k": 1}, ["temperature"]),
    "top_k": ({"temperature": 2}, 1),
    "typical_p": ({"temperature": 2}, 0.1),
    "top_n_sigma": ({"temperature": 2}, 0.1),
    "xtc_probability": ({"xtc_threshold": 0.01}, 1),
    "xtc_threshold": ({"xtc_probability": 1}, 0.01),
    "dynatemp_range": ({"temperature": 1}, 2),
    "dynatemp_exponent": ({"temperature": 1, "dynatemp_range": 1}, 5),
    "dry_multiplier": ({"dry_allowed_length": 1}, 50),
    "dry_base": ({"dry_multiplier": 0.001, "dry_allowed_length": 1}, 100),
    "dry_allowed_length": ({"dry_multiplier": 50}, 50),
    "dry_penalty_last_n": ({"dry_multiplier": 50, "dry_allowed_length": 1}, 0),
    "dry_sequence_breakers": ({"dry_multiplier": 50, "dry_allowed_length": 1}, [" ", "d"]),
    "mirostat": ({"temperature": 1, "mirostat_tau": 0.5}, 2),
    "mirostat_eta": ({"temperature": 1, "mirostat": 2, "mirostat_tau": 1}, 1),
    "mirostat_tau": ({"temperature": 1, "mirostat": 2}, 0.1),
    "adaptive_target": ({"temperature": 2}, 0.9),
    "adaptive_decay": ({"temperature": 2, "adaptive_target": 0.3}, 0),
    "min_keep": ({"temperature": 2, "min_p": 1}, 50),
    "repeat_last_n": ({"prompt": STORY * 3, "repetition_penalty": 2}, 0),
}


def changes_the_text(api: Probe, field: str) -> None:
    others, value = SAMPLERS[field]
    repeated = {str(api.token): 20} if field.startswith("dry_") else {}
    body = {"seed": 5, "max_tokens": 24, "logit_bias": api.eos_ban | repeated} | others
    found = choice(api, field, **body, **{field: value})["text"]
    assert found == choice(api, field, **body, **{field: value})["text"], "a seed repeats the text"
    assert found != choice(api, field, **body)["text"], "the field changes nothing"


for each in SAMPLERS:
    extension(each)(partial(changes_the_text, field=each))


# ---- what the text may be


@extension("allowed_token_ids")
def only_allowed_tokens_are_generated(api: Probe) -> None:
    body = {"allowed_token_ids": [api.token], "logprobs": 0, "max_tokens": 3}
    names = choice(api, "allowed_token_ids", **body)["logprobs"]["tokens"]
    assert names == [api.scored([api.token] * 2)["tokens"][-1]] * 3


@extension("bad_words")
def a_bad_word_never_appears(api: Probe) -> None:
    is_banned(api, "bad_words")


@extension("banned_strings")
def a_banned_string_never_appears(api: Probe) -> None:
    is_banned(api, "banned_strings")


def is_banned(api: Probe, field: str) -> None:
    plain = choice(api, field, max_tokens=16)["text"]
    word = max(plain.split(), key=len)
    found = choice(api, field, max_tokens=16, **{field: [word]})["text"]
    assert word not in found
    assert found.startswith(plain[: plain.index(word)].rstrip())


@extension("banned_tokens")
def a_banned_token_is_never_generated(api: Probe) -> None:
    never_generated(api, "banned_tokens")


@extension("custom_token_bans")
def a_token_of_custom_bans_is_never_generated(api: Probe) -> None:
    never_generated(api, "custom_token_bans")


def never_generated(api: Probe, field: str) -> None:
    forced = {"logit_bias": {str(api.token): 100}, "logprobs": 0}
    name = api.one(prompt=STORY, temperature=0, max_tokens=1, **forced)["logprobs"]["tokens"][0]
    assert name not in choice(api, field, **forced, **{field: [api.token]})["logprobs"]["tokens"]


OBJECT = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}


@extension("json_schema")
def the_text_matches_a_schema(api: Probe) -> None:
    is_object(choice(api, "json_schema", json_schema=OBJECT, max_tokens=64)["text"])


@extension("response_format")
def the_text_has_the_format(api: Probe) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": OBJECT}}
    is_object(choice(api, "response_format", response_format=wanted, max_tokens=64)["text"])


@extension("structured_outputs")
def the_text_is_one_of_the_choices(api: Probe) -> None:
    wanted = {"choice": ["zebra", "quartz"]}
    assert choice(api, "structured_outputs", structured_outputs=wanted, max_tokens=32)["text"] in wanted["choice"]


@extension("grammar")
def the_text_matches_a_grammar(api: Probe) -> None:
    found = choice(api, "grammar", grammar='root ::= "zebra" | "quartz"', max_tokens=32)["text"]
    assert found in ("zebra", "quartz")


def is_object(text: str) -> None:
    assert json.loads(text) in ({"a": 1}, {"a": 2})


@extension("ignore_eos")
def the_end_token_does_not_end_the_text(api: Probe) -> None:
    body = {"logit_bias": {str(end_token(api)): 100}, "max_tokens": 5}
    assert asked(api, "ignore_eos", **body)["usage"]["completion_tokens"] <= 1
    assert asked(api, "ignore_eos", **body, ignore_eos=True)["usage"]["completion_tokens"] == 5


@extension("min_tokens")
def the_end_token_comes_after_the_fewest_tokens(api: Probe) -> None:
    body = {"logit_bias": {str(end_token(api)): 100}, "max_tokens": 8, "min_tokens": 3}
    assert asked(api, "min_tokens", **body)["usage"]["completion_tokens"] in (3, 4)


@extension("stop_token_ids")
def a_stop_token_ends_the_text(api: Probe) -> None:
    found = choice(api, "stop_token_ids", stop_token_ids=[api.token], logit_bias={str(api.token): 100})
    assert (found["text"], found["finish_reason"]) == ("", "stop")


@extension("include_stop_str_in_output")
def the_text_has_the_stop_string(api: Probe) -> None:
    text = choice(api, "include_stop_str_in_output", max_tokens=16)["text"]
    stop = text[len(text) // 2 :][:3]
    found = choice(api, "include_stop_str_in_output", max_tokens=16, stop=stop, include_stop_str_in_output=True)
    assert (found["text"], found["finish_reason"]) == (text[: text.index(stop) + len(stop)], "stop")


@extension("repetition_detection")
def a_loop_ends_the_text(api: Probe) -> None:
    wanted = {"max_pattern_size": 2, "min_pattern_size": 1, "min_count": 4}
    body = {"logit_bias": {str(api.token): 100}, "max_tokens": 20, "repetition_detection": wanted}
    answer = asked(api, "repetition_detection", **body)
    assert (answer["choices"][0]["finish_reason"], answer["usage"]["completion_tokens"]) == ("repetition", 4)


@extension("token_healing")
def the_last_token_of_the_prompt_is_completed(api: Probe) -> None:
    prompt = "Once upon a ti"
    found = choice(api, "token_healing", prompt=prompt, echo=True, token_healing=True)["text"]
    assert found.startswith(prompt)
    assert len(found) > len(prompt)


@extension("skip_special_tokens")
def a_special_token_has_a_text_if_wanted(api: Probe) -> None:
    body = {"logit_bias": {str(end_token(api)): 100}, "ignore_eos": True, "max_tokens": 2}
    shown = choice(api, "skip_special_tokens", **body, skip_special_tokens=False, include_stop_str_in_output=True)
    assert choice(api, "skip_special_tokens", **body, skip_special_tokens=True)["text"] == ""
    assert shown["text"] != ""


@extension("spaces_between_special_tokens")
def no_spaces_are_added(api: Probe) -> None:
    texts = [choice(api, "spaces_between_special_tokens", spaces_between_special_tokens=each) for each in (True, False)]
    assert texts[0] == texts[1]


# ---- what the model reads


@extension("add_special_tokens")
def a_bos_can_be_left_out(api: Probe) -> None:
    ids = [
        choice(api, "add_special_tokens", add_special_tokens=each, return_token_ids=True)["prompt_token_ids"]
        for each in (True, False)
    ]
    assert ids[1] == api.tokens(STORY)
    assert ids[0] == api.tokens(STORY, add_special_tokens=True)


@extension("truncate_prompt_tokens")
def only_the_last_tokens_are_read(api: Probe) -> None:
    body = {"prompt": [api.token, api.token + 1, api.token + 2], "return_token_ids": True, "truncate_prompt_tokens": 2}
    assert choice(api, "truncate_prompt_tokens", **body)["prompt_token_ids"][-2:] == body["prompt"][1:]


@extension("truncation_side")
def only_the_first_tokens_are_read(api: Probe) -> None:
    body = {"prompt": [api.token, api.token + 1, api.token + 2], "return_token_ids": True, "truncate_prompt_tokens": 2}
    found = choice(api, "truncation_side", **body, truncation_side="right")["prompt_token_ids"]
    assert found[-2:] == body["prompt"][:2]


@extension("input_extra")
def other_files_are_read(api: Probe) -> None:
    body = {"prompt": "def a():", "suffix": "\n", "input_extra": [{"filename": "b.py", "text": "def b(): pass\n"}]}
    response = api.ask(**body, max_tokens=1)
    if response.status_code == 400 and response.json()["error"]["param"] in ("input_extra", "suffix"):
        raise NotApplicable("the model reads no other files")
    with_file = response.json()["usage"]["prompt_tokens"]
    assert with_file > api.complete(prompt=body["prompt"], suffix="\n", max_tokens=1)["usage"]["prompt_tokens"]


@extension("cache_salt")
def salts_share_no_prefix(api: Probe) -> None:
    """Each of two replicas may answer. So a salt is sent three times: one of them then reads a prefix again."""
    body = {"prompt": f"{STORY}, {id(api)}, " + "the dog saw a cat and the cat saw a dog. " * 12, "max_tokens": 1}
    first, *again, other = (
        asked(api, "cache_salt", **body, cache_salt=salt)["usage"]["prompt_tokens_details"]["cached_tokens"]
        for salt in ("one", "one", "one", "other")
    )
    assert first == other == 0
    if not any(again):
        raise NotApplicable("the server does not report cached tokens")


@extension("prediction")
def a_prediction_changes_no_text(api: Probe) -> None:
    plain = choice(api, "prediction", max_tokens=16)["text"]
    for text in (plain, "something else"):
        assert (
            choice(api, "prediction", max_tokens=16, prediction={"type": "content", "content": text})["text"] == plain
        )


@extension("priority")
def a_priority_changes_no_text(api: Probe) -> None:
    assert choice(api, "priority", priority=-3)["text"] == choice(api, "priority")["text"]


# ---- what is reported


@extension("return_token_ids")
def ids_of_prompt_and_text_are_returned(api: Probe) -> None:
    found = choice(api, "return_token_ids", prompt=[api.token], return_token_ids=True, logit_bias=api.eos_ban)
    assert found["prompt_token_ids"][-1:] == [api.token]
    assert len(found["token_ids"]) == 8


@extension("return_tokens_as_token_ids")
def tokens_are_named_by_ids(api: Probe) -> None:
    body = {"return_tokens_as_token_ids": True, "logprobs": 1, "logit_bias": {str(api.token): 100}}
    columns = choice(api, "return_tokens_as_token_ids", **body)["logprobs"]
    assert columns["tokens"] == [f"token_id:{api.token}"] * 8
    assert all(name.startswith("token_id:") for entry in columns["top_logprobs"] for name in entry)


@extension("prompt_logprobs")
def every_token_of_the_prompt_has_a_rank(api: Probe) -> None:
    body = {"prompt_logprobs": 2, "echo": True, "logprobs": 2, "max_tokens": 1, "logit_bias": api.eos_ban}
    found = choice(api, "prompt_logprobs", **body)
    first, *rest = found["prompt_logprobs"]
    assert first is None
    for entry in rest:
        assert {1, 2} <= {each["rank"] for each in entry.values()}
    values = [next(iter(entry.values()))["logprob"] for entry in rest]
    *known, _ = found["logprobs"]["token_logprobs"]  # the last one is that of the generated token
    assert all(math.isclose(one, other, abs_tol=1e-4) for one, other in zip(values[-3:], known[-3:], strict=True))


@extension("logprob_token_ids")
def chosen_ids_are_reported(api: Probe) -> None:
    ids = [api.token, api.token + 1]
    body = {"logprobs": 0, "return_tokens_as_token_ids": True, "max_tokens": 2}
    for wanted in (ids, [ids, [ids[0]]]):
        entries = choice(api, "logprob_token_ids", **body, logprob_token_ids=wanted)["logprobs"]["top_logprobs"]
        for position, entry in enumerate(entries):
            listed = wanted[position] if isinstance(wanted[position], list) else ids
            assert {f"token_id:{each}" for each in listed} <= entry.keys()
            assert len(entry) <= len(listed) + 1


@extension("logprobs_mode")
def processed_numbers_have_the_bias(api: Probe) -> None:
    body = {"logprobs": 0, "logit_bias": {str(api.token): 100}, "max_tokens": 1}
    raw, processed = (
        choice(api, "logprobs_mode", **body, logprobs_mode=f"{mode}_logprobs")["logprobs"]["token_logprobs"][0]
        for mode in ("raw", "processed")
    )
    assert processed > -1e-3
    assert raw < processed


@extension("stream_options.continuous_usage_stats")
def usage_grows_in_a_stream(api: Probe) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = api.stream(prompt=STORY, temperature=0, max_tokens=5, stream_options=options, logit_bias=api.eos_ban)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] == 5
    assert joined(chunks)[0]["finish_reason"] == "length"


def end_token(api: Probe) -> int:
    if api.eos is None:
        raise NotApplicable("the server does not report its end token")
    return api.eos
