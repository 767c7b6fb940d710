"""`infill_request.parse_infill`: llama-server's fields, their defaults, and the errors for other values."""

from __future__ import annotations

import json
from typing import Any

import jsonschema_rs
import pytest

from afterword.completion.infill_request import INFILL_FIELDS, UNLIMITED, InfillRequest, infill_schema, parse_infill
from afterword.completion.length_names import LENGTH_NAMES
from afterword.completion.object_fields import ContextFile
from afterword.completion.request_descriptions import INFILL_DESCRIPTIONS
from afterword.completion.request_limits import STRICT, RequestLimits
from afterword.completion.sampler_fields import SAMPLER_NAMES, sampling_of
from afterword.errors import RequestError

REQUIRED = {"input_prefix": "a\n", "input_suffix": "\nb"}


LIMITS = RequestLimits()


def parsed(limits: RequestLimits = LIMITS, **fields: Any) -> InfillRequest:
    return parse_infill(json.dumps(REQUIRED | fields).encode(), limits)


def refused(**fields: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse_infill(json.dumps(fields).encode(), RequestLimits())
    return caught.value


def test_absent_fields_have_llama_servers_defaults() -> None:
    infill = parsed()
    request = infill.completion
    assert (request.prompt, request.suffix, request.max_tokens, request.n) == (("a\n",), "\nb", UNLIMITED, 1)
    assert (request.temperature, request.top_k, request.top_p, request.min_p) == (0.8, 40, 0.95, 0.05)
    assert (infill.indent, infill.predict_ms, infill.response_fields, infill.shares_cache) == (0, 0, None, True)


def test_the_line_of_the_cursor_follows_the_prefix() -> None:
    request = parsed(prompt="  x = ", input_extra=[{"text": "t", "filename": "f", "time": 1}]).completion
    assert request.prompt == ("a\n  x = ",)
    assert request.input_extra == (ContextFile("t", "f"),)


def test_only_the_samplers_of_the_list_apply() -> None:
    given = {"temperature": 0.3, "top_k": 5, "top_p": 0.5, "min_p": 0.3, "repeat_penalty": 1.5}
    every = parsed(**given).completion
    assert (every.temperature, every.top_k, every.top_p, every.min_p, every.repetition_penalty) == (
        0.3,
        5,
        0.5,
        0.3,
        1.5,
    )
    some = parsed(**given, samplers=["top_k", "dry"]).completion
    assert (some.temperature, some.top_k, some.top_p, some.min_p, some.repetition_penalty) == (1.0, 5, 1.0, 0.0, 1.0)
    none = parsed(**given, samplers=[]).completion
    assert (none.temperature, none.top_k, none.top_p, none.min_p) == (1.0, 0, 1.0, 0.0)


def test_the_sampler_infill_excludes_unlikely_tokens() -> None:
    request = parsed(samplers=["top_k", "top_p", "infill"], top_k=40, top_p=0.9).completion
    assert (request.temperature, request.top_k, request.top_p, request.min_p) == (1.0, 40, 0.9, 0.2)
    assert parsed(samplers=["min_p", "infill"], min_p=0.5).completion.min_p == 0.5


def test_further_samplers_are_applied_in_the_order_of_llama_server() -> None:
    request = parsed(dry_multiplier=0.8, top_k=5).completion
    assert (request.dry_multiplier, request.top_k, request.samplers) == (0.8, 5, SAMPLER_NAMES)
    request = parsed(samplers=["xtc", "infill", "top_k"], xtc_probability=0.5, dry_multiplier=0.8).completion
    chain = sampling_of(request, 10).chain
    assert chain is not None
    assert (chain.order, chain.dry) == (("xtc", "infill", "top_k"), None)


def test_further_samplers_without_effect_change_nothing() -> None:
    assert (
        parsed(samplers=["top_k"], dry_multiplier=0.8, xtc_threshold=0.3).completion
        == parsed(samplers=["top_k"]).completion
    )
    assert parsed(mirostat=0, typical_p=1.0, xtc_probability=0, dynatemp_range=0).completion == parsed().completion
    assert sampling_of(parsed().completion, 10).chain is None


def test_minus_one_stands_for_no_limit_and_for_a_random_seed() -> None:
    infill = parsed(n_predict=-1, seed=-1, t_max_predict_ms=-1)
    assert (infill.completion.max_tokens, infill.completion.seed, infill.predict_ms) == (UNLIMITED, None, 0)
    infill = parsed(n_predict=0, seed=7, t_max_predict_ms=9)
    assert (infill.completion.max_tokens, infill.completion.seed, infill.predict_ms) == (0, 7, 9)


def test_null_is_as_if_absent() -> None:
    names = set(INFILL_FIELDS) - set(REQUIRED)
    assert parsed(**dict.fromkeys(names)) == parsed()


def test_openais_limits_do_not_apply() -> None:
    """Editors send an empty list of stop strings, which `--strict` refuses for completions."""
    assert parsed(STRICT, stop=[]) == parsed()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input_prefix": "a"}, "input_suffix"),
        ({"input_suffix": "a"}, "input_prefix"),
        ({"input_prefix": None, "input_suffix": ""}, "input_prefix"),
        (REQUIRED | {"samplers": ["mirostat"]}, "samplers"),
        (REQUIRED | {"samplers": "kp"}, "samplers"),
        (REQUIRED | {"lora": [{"id": 0, "scale": 0.5}]}, "lora"),
        (REQUIRED | {"grammar": "root ::= x"}, "grammar"),
        (REQUIRED | {"dry_multiplier": -0.5}, "dry_multiplier"),
        (REQUIRED | {"n_predict": -2}, "n_predict"),
        (REQUIRED | {"input_extra": [{}]}, "input_extra[0].text"),
        (REQUIRED | {"response_fields": "content"}, "response_fields"),
        (REQUIRED | {"response_fields": ["content"] * 65}, "response_fields"),
        (REQUIRED | {"response_fields": ["/" * 257]}, "response_fields"),
        (REQUIRED | {"input_extra": [{"text": ""}] * 1025}, "input_extra"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    error = refused(**body)
    assert error.param == param
    assert param in error.message


def test_unknown_fields_can_be_ignored() -> None:
    assert parsed(RequestLimits(ignore_unknown=True), lora=[]).completion.ignored == ("lora",)


@pytest.mark.parametrize("name", [name for name in LENGTH_NAMES if name != "n_predict"])
@pytest.mark.parametrize("own", [{}, {"n_predict": 9}, {"n_predict": -1}])
def test_a_length_by_another_name_is_refused_and_never_ignored(name: str, own: dict[str, int]) -> None:
    first, dot, last = name.partition(".")
    body = own | {first: {last: 8} if dot else 8}
    for ignore in (False, True):
        with pytest.raises(RequestError) as caught:
            parsed(RequestLimits(ignore_unknown=ignore), **body)
        assert (caught.value.param, caught.value.code) == (name if ignore else first, "unknown_parameter")
        assert ("'n_predict'" in caught.value.message) == (ignore or not dot)


def test_a_length_equal_to_n_predict_can_be_ignored() -> None:
    for more in ({"max_tokens": 8}, {"options": {"num_predict": 8}}, {"max_tokens": None}):
        infill = parsed(RequestLimits(ignore_unknown=True), n_predict=8, **more)
        assert (infill.completion.max_tokens, infill.completion.ignored) == (8, (*more,))


def test_the_schema_describes_every_field() -> None:
    described = infill_schema(RequestLimits())
    assert described["properties"].keys() == INFILL_FIELDS.keys()
    assert {name for name in INFILL_DESCRIPTIONS if "." not in name} == INFILL_FIELDS.keys()
    assert jsonschema_rs.is_valid(described, REQUIRED | {"seed": None, "samplers": ["infill"]})
    assert not jsonschema_rs.is_valid(described, {"input_prefix": ""})
    assert not jsonschema_rs.is_valid(described, REQUIRED | {"lora": []})
