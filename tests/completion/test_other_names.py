"""Fields under other servers' names: each is the field that it stands for, refused by name, or without effect."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from afterword.completion.other_names import (
    FLAGS,
    KOBOLD_ORDER,
    LENGTHS,
    OFF,
    OTHER_NAMES,
    RANGES,
    SAME,
    WITHOUT_EFFECT,
)
from afterword.completion.request import EXTENSIONS, FIELDS, CompletionRequest, parse
from afterword.completion.request_limits import RequestLimits
from afterword.completion.sampler_fields import SAMPLER_NAMES, sampling_of
from afterword.errors import RequestError

LIMITS = RequestLimits()
CAPTURED = Path(__file__).parents[1] / "captured" / "requests.jsonl"
BODIES = {
    request["clients"][0]: request["body"]
    for request in map(json.loads, CAPTURED.read_text("utf-8").splitlines())
    if request["clients"][0].startswith("SillyTavern") and request["status"]["default"] == "200"
}
VALUES: dict[str, Any] = {
    "add_special_tokens": False, "grammar": 'root ::= "a"', "json_schema": {"type": "string"}, "mirostat": 2,
    "logprobs": 3,
    "top_n_sigma": 1.5, "repetition_penalty": 1.2, "seed": 9, "stop": ["a", "b"], "typical_p": 0.5,
}  # fmt: skip
OTHERS: dict[str, Any] = {
    "add_special_tokens": True, "grammar": 'root ::= "b"', "json_schema": {"type": "null"}, "mirostat": 1,
    "logprobs": 4,
    "top_n_sigma": 1, "repetition_penalty": 1, "seed": 8, "stop": ["a"], "typical_p": 1,
}  # fmt: skip


def parsed(**body: Any) -> CompletionRequest:
    return parse(json.dumps({"prompt": "a", "max_tokens": 8, **body}).encode(), LIMITS)


def refused(**body: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parsed(**body)
    return caught.value


@pytest.mark.parametrize(("name", "field"), SAME.items())
def test_another_name_is_the_same_field(name: str, field: str) -> None:
    value = VALUES[field]
    assert parsed(**{name: value}) == parsed(**{field: value}) == parsed(**{name: value, field: value}) != parsed()
    assert parsed(**{name: value, field: None}) == parsed(**{field: value})
    assert parsed(**{name: None, field: value}) == parsed(**{field: value})


@pytest.mark.parametrize(("name", "field"), SAME.items())
def test_different_values_under_two_names_are_refused(name: str, field: str) -> None:
    error = refused(**{name: VALUES[field], field: OTHERS[field]})
    assert (error.param, name in error.message, field in error.message) == (name, True, True)
    assert refused(**{name: [{}]}).param.partition(".")[0] == name  # type: ignore[union-attr]


@pytest.mark.parametrize("name", LENGTHS)
def test_a_length_is_accepted_if_it_is_that_of_max_tokens(name: str) -> None:
    assert parsed(**{name: 8}) == parsed()
    assert refused(**{name: 9}).param == name
    assert refused(max_tokens=None, **{name: 9}).param == name


OFF_VALUES = {name: json.loads(allowed.partition(" ")[0]) for name, (allowed, _) in OFF.items()}


@pytest.mark.parametrize("name", OFF)
def test_what_is_not_supported_is_accepted_if_it_is_off(name: str) -> None:
    assert parsed(**{name: OFF_VALUES[name]}) == parsed()
    for value in (0.3, "x", [], not OFF_VALUES[name]):
        error = refused(**{name: value})
        assert (error.param, name in error.message) == (name, True)


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_what_changes_no_text_is_accepted_with_any_value(name: str) -> None:
    assert parsed(**{name: 5}) == parsed(**{name: "text"}) == parsed()


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize(
    "penalty", ["rep_pen", "repeat_penalty", "repetition_penalty", "presence_penalty", "frequency_penalty"]
)
def test_a_range_is_the_window_of_the_penalties(name: str, penalty: str) -> None:
    """Whatever the order of the members, and also where the operator's defaults have the penalty."""
    expected = parsed(repeat_last_n=512, **{penalty: 1.1})
    assert parsed(**{name: 512, penalty: 1.1}) == parsed(**{penalty: 1.1, name: 512}) == expected
    assert sampling_of(expected, 9).chain.last_n == 512  # type: ignore[union-attr]
    body = json.dumps({"prompt": "a", "max_tokens": 8, name: 512}).encode()
    assert parse(body, LIMITS, lambda _: {SAME.get(penalty, penalty): 1.1}) == expected
    assert parsed(**{name: 0, penalty: 1.1}) == parsed(**{name: -1, penalty: 1.1}) == parsed(**{penalty: 1.1})


@pytest.mark.parametrize("name", RANGES)
def test_a_range_is_refused_by_its_name(name: str) -> None:
    for value in ("all", True, -2, 8193, 0.5):
        assert refused(**{name: value}).param == name
    assert refused(**{name: 512}, repeat_last_n=64).param == name
    assert refused(rep_pen_range=512, repetition_penalty_range=64).param == "repetition_penalty_range"


def test_end_tokens_can_be_banned() -> None:
    assert parsed(ban_eos_token=True) == parsed(ignore_eos=True) == parsed(ban_eos_token=True, ignore_eos=False)
    assert parsed(ban_eos_token=False, ignore_eos=True) == parsed(ignore_eos=True)


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_is_true_or_false(name: str) -> None:
    assert parsed(**{name: False}) == parsed()
    assert refused(**{name: 1}).param == name


def test_the_order_of_samplers_by_other_names() -> None:
    ordered = parsed(samplers=[*SAMPLER_NAMES])
    assert parsed(temperature_last=True) == parsed(sampler_order=[*KOBOLD_ORDER]) == ordered
    assert parsed(temperature_last=True, samplers=["top_k"]) == parsed(samplers=["top_k"])
    assert refused(sampler_order=[0, 6]).param == "sampler_order"


@pytest.mark.parametrize("order", [{"temperature_last": True}, {"sampler_order": [*KOBOLD_ORDER]}])
def test_an_order_by_another_name_leaves_every_sampler_on(order: Any) -> None:
    chain = sampling_of(parsed(adaptive_target=0.5, xtc_probability=0.5, **order), 9).chain
    assert chain is not None
    assert (chain.adaptive_target, "xtc" in chain.order) == (0.5, True)


@pytest.mark.parametrize("pair", [("dynatemp_low", "dynatemp_high"), ("dynatemp_min", "dynatemp_max")])
def test_a_dynamic_temperature_has_a_lowest_and_highest_value(pair: tuple[str, str]) -> None:
    bounds = dict(zip(pair, (0.5, 1.3), strict=True))
    expected = parsed(temperature=0.9, dynatemp_range=0.4)
    assert (
        parsed(**bounds) == parsed(**bounds, temperature=0.9, dynatemp_range=0.4, dynamic_temperature=True) == expected
    )
    assert parsed(**bounds, dynamic_temperature=False) == parsed()
    assert refused(**bounds, temperature=1).param == pair[0]
    assert refused(**{pair[0]: 1}).param == refused(**{pair[0]: 2, pair[1]: 1}).param == pair[0]


def test_breakers_can_be_json_in_a_text() -> None:
    assert parsed(dry_sequence_breakers='["a", "\\n"]') == parsed(dry_sequence_breakers=["a", "\n"])
    assert refused(dry_sequence_breakers='["a"').param == "dry_sequence_breakers"
    assert refused(dry_sequence_breakers="[1]").param == "dry_sequence_breakers"


def test_biases_can_be_pairs_in_which_false_bans_a_token() -> None:
    assert parsed(logit_bias=[]) == parsed()
    assert parsed(logit_bias=[[5, 2], [6.0, -1.5]]) == parsed(logit_bias={"5": 2, "6": -1.5})
    assert parsed(logit_bias=[[5, 2], [7, False]]) == parsed(logit_bias={"5": 2}, banned_tokens=[7])
    both = parsed(logit_bias=[[7, False], [9, False]], banned_tokens="8,7", custom_token_bans=[3])
    assert both.banned_ids == (3, 7, 8, 9)


@pytest.mark.parametrize(
    "pairs",
    [
        *([5], [[5]], [[5, 1, 2]], [["Hello", 1]], [[5, True]], [[5, None]], [[5, 101]], [[-1, 1]], [[5, 1], [5, 2]]),
        *([[True, 1]], [[5, "1"]], [[each, 1] for each in range(1025)], [[each, False] for each in range(1025)]),
    ],
    ids=lambda pairs: str(pairs[:2]),
)
def test_pairs_that_are_no_biases_are_refused(pairs: Any) -> None:
    assert refused(logit_bias=pairs).param == "logit_bias"


def test_with_strict_limits_biases_are_an_object() -> None:
    with pytest.raises(RequestError, match="expected an object, but got an array"):
        parse(json.dumps({"model": "m", "logit_bias": []}).encode(), replace(LIMITS, strict=True))


@pytest.mark.parametrize("name", sorted(OTHER_NAMES))
def test_with_strict_limits_other_names_are_unknown(name: str) -> None:
    with pytest.raises(RequestError, match=f"Unrecognized request argument supplied: {name}"):
        parse(json.dumps({"model": "m", name: None}).encode(), replace(LIMITS, strict=True))


def test_what_is_not_supported_can_be_ignored_and_is_listed() -> None:
    body = b'{"prompt": "a", "tfs": 0.9, "top_a": 0, "typical": 0.5}'
    request = parse(body, replace(LIMITS, ignore_unknown=True))
    assert (request.ignored, request.typical_p) == (("tfs",), 0.5)


def test_no_name_stands_for_itself() -> None:
    assert OTHER_NAMES.isdisjoint(FIELDS | EXTENSIONS)
    assert set(SAME.values()) <= set(FIELDS | EXTENSIONS)
    assert set(SAME.values()) == set(VALUES) == set(OTHERS)


@pytest.mark.parametrize("client", BODIES)
def test_every_field_of_sillytavern_has_a_meaning(client: str) -> None:
    """Each is a field of the API, or one of the names above, which other tests try one by one."""
    assert set(BODIES[client]) <= set(FIELDS) | set(EXTENSIONS) | OTHER_NAMES
    assert len(BODIES) >= 5
