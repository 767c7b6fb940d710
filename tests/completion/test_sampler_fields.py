"""The samplers of a request: which chain and order they result in, and the breakers of DRY."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from msgspec.structs import replace

from afterword.completion.dry_breakers import bit_set, find_breakers
from afterword.completion.plan import make_plan
from afterword.completion.request import CompletionRequest, parse
from afterword.completion.request_limits import RequestLimits
from afterword.completion.run import tokenize
from afterword.completion.sampler_fields import LLAMA_ORDER, OWN_ORDER, sampling_of
from afterword.engine.protocol import Dry, SamplerChain, Sampling
from afterword.errors import RequestError
from scripted_engine import EOS, MODEL_INFO, PIECES, ScriptedEngine, ids, text_script


def sampling(**fields: Any) -> Sampling:
    return sampling_of(CompletionRequest(**fields), 16)


def chain(**fields: Any) -> SamplerChain:
    found = sampling(**fields).chain
    assert found is not None
    return found


CLASSIC = {"presence_penalty": 0.5, "temperature": 0.7, "min_p": 0.1, "top_k": 5, "top_p": 0.9}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        CLASSIC,
        CLASSIC | {"samplers": OWN_ORDER},
        {"samplers": LLAMA_ORDER},
        {"samplers": ("top_k", "top_p", "dry"), "top_k": 5, "top_p": 0.9},
        {"samplers": ("top_p", "top_k"), "top_k": 5},
        {"dry_multiplier": 0.0, "mirostat": 0, "typical_p": 1.0, "top_n_sigma": 0.0, "xtc_probability": 0.0},
        {"dry_multiplier": 0.8, "dry_base": 0.5},
        {"dry_multiplier": 0.8, "dry_penalty_last_n": 0},
        {"xtc_probability": 0.5, "xtc_threshold": 0.6},
        {"dry_base": 2.0, "mirostat_tau": 3.0, "dynatemp_exponent": 2.0, "xtc_threshold": 0.3},
        {"dry_multiplier": 0.8, "dynatemp_range": 0.5, "samplers": ("top_k",)},
        {"adaptive_target": -1.0, "adaptive_decay": 0.5},
        {"adaptive_target": 0.3, "samplers": ("top_k",)},
        {"min_keep": 1, "top_p": 0.9},
        {"min_keep": 5, "top_k": 4},
        {"repeat_last_n": 64},
        {"repeat_last_n": 0, "presence_penalty": 1.0},
    ],
    ids=str,
)
def test_requests_without_further_samplers_stay_in_the_kernel(fields: dict[str, Any]) -> None:
    assert sampling(**fields).chain is None


def test_samplers_that_are_not_listed_have_no_effect() -> None:
    listed = sampling(**CLASSIC, repetition_penalty=1.2, samplers=("temperature", "top_k"))
    assert listed == Sampling(temperature=0.7, top_k=5)
    assert sampling(**CLASSIC, samplers=()) == Sampling()


def test_a_further_sampler_has_the_order_of_llama_server() -> None:
    assert chain(**CLASSIC, dry_multiplier=0.8).order == ("penalties", "dry", "top_k", "top_p", "min_p", "temperature")
    every = {"top_n_sigma": 1.0, "typical_p": 0.9, "xtc_probability": 0.5, "dry_multiplier": 0.8}
    assert chain(**CLASSIC, **every).order == LLAMA_ORDER
    assert chain(dynatemp_range=0.5).order == ("temperature",)


def test_another_order_is_kept() -> None:
    assert chain(**CLASSIC, samplers=("top_p", "temperature", "top_k")).order == ("top_p", "temperature", "top_k")


def test_allowed_tokens_do_not_change_the_order() -> None:
    allowed = chain(**CLASSIC, allowed_token_ids=(0, 9))
    assert (allowed.order, allowed.allowed) == (OWN_ORDER, bytes([1, 2]))


def test_mirostat_has_penalties_dry_and_temperature_before_it() -> None:
    found = chain(**CLASSIC, mirostat=2, dry_multiplier=0.8, typical_p=0.5)
    assert (found.order, found.mirostat) == (("penalties", "dry", "temperature"), 2)
    assert chain(mirostat=1, samplers=("top_k",), dry_multiplier=1.0).order == ("temperature",)


def test_adaptive_p_comes_last_and_not_with_mirostat() -> None:
    found = chain(**CLASSIC, adaptive_target=0.4, adaptive_decay=0.5)
    assert found.order == ("penalties", "top_k", "top_p", "min_p", "temperature")
    assert (found.adaptive_target, found.adaptive_decay) == (0.4, 0.5)
    first = chain(temperature=0.5, adaptive_target=0.4, samplers=("adaptive_p", "temperature"))
    assert (first.order, first.adaptive_target) == (("temperature",), 0.4)
    assert chain(mirostat=2, adaptive_target=0.4).adaptive_target < 0


def test_a_window_and_the_fewest_tokens_do_not_change_the_order() -> None:
    assert chain(**CLASSIC, repeat_last_n=20, min_keep=2) == SamplerChain(OWN_ORDER, last_n=20, min_keep=2)
    assert chain(presence_penalty=1.0, repeat_last_n=-1).last_n == -1
    assert sampling(**CLASSIC, repeat_last_n=0).presence_penalty == 0
    assert chain(top_p=0.5, min_keep=3).order == ("top_p",)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["temp", "typ", "nucleus"], ("temperature", "typ_p", "top_p")),
        (
            ["top-k", "minp", "typical", "top-n-sigma", "adaptive-p"],
            ("top_k", "min_p", "typ_p", "top_n_sigma", "adaptive_p"),
        ),
    ],
)
def test_other_names_of_samplers_are_those_of_llama_server(given: list[str], names: tuple[str, ...]) -> None:
    body = json.dumps({"prompt": "a", "samplers": given}).encode()
    assert parse(body, RequestLimits()).samplers == names


@pytest.mark.parametrize("given", [["temp", "temperature"], ["topp", "top-p"], ["infill"], ["tfs_z"]])
def test_a_sampler_under_two_names_and_unknown_ones_are_refused(given: list[str]) -> None:
    with pytest.raises(RequestError) as caught:
        parse(json.dumps({"prompt": "a", "samplers": given}).encode(), RequestLimits())
    assert caught.value.param == "samplers"


def test_every_number_reaches_the_chain() -> None:
    numbers = {"typical_p": 0.9, "top_n_sigma": 1.5, "xtc_probability": 0.5, "xtc_threshold": 0.2}
    numbers |= {
        "dynatemp_range": 0.3,
        "dynatemp_exponent": 1.5,
        "mirostat": 1,
        "mirostat_tau": 4.0,
        "mirostat_eta": 0.2,
    }
    found = chain(**numbers, dry_multiplier=0.8, dry_base=1.5, dry_allowed_length=3, dry_penalty_last_n=100)
    assert {name: getattr(found, name) for name in numbers} == numbers
    assert found.dry == Dry(0.8, 1.5, 3, 100)


# ---- breakers


def planned_dry(**fields: Any) -> Dry:
    request = CompletionRequest(prompt=("a",), dry_multiplier=0.8, **fields)
    tokens = asyncio.run(tokenize(request, ScriptedEngine(text_script(), MODEL_INFO)))
    found = make_plan(request, MODEL_INFO, tokens, 0).prompts[0].job.sampling.chain
    assert found is not None
    assert found.dry is not None
    return found.dry


def bits(data: bytes) -> list[int]:
    return [index for index in range(8 * len(data)) if data[index // 8] & 1 << index % 8]


def test_tokens_that_contain_a_breaker_are_marked() -> None:
    assert bits(planned_dry().breakers) == sorted(PIECES.index(each) for each in (b"\n", b":", b'"', b"*"))
    dry = planned_dry(dry_sequence_breakers=("at", ""))
    (cat, sat) = (*ids(" cat"), *ids(" sat"))
    assert bits(dry.breakers) == [cat, sat]
    assert planned_dry(dry_sequence_breakers=()) == Dry(0.8, 1.75, 2, 64, bytes((len(PIECES) + 7) // 8))


def test_a_breaker_can_begin_at_the_end_of_a_token() -> None:
    """`tHello` is ` cat` or ` sat` or `t`, and then `Hello`."""
    dry = planned_dry(dry_sequence_breakers=("tHello",))
    assert dry.sequences == (((*ids("t"), *ids(" cat"), *ids(" sat")), ids("Hello")),)


def test_breakers_within_and_across_the_pieces_of_a_vocabulary() -> None:
    pieces = (b"ab", b"xab", b"a", b"b", b"\xff", b"", b"abab")
    found = find_breakers(pieces, ("ab",))
    assert bits(found.inside) == [0, 1, 6]
    assert found.begun == (("b", (2,)),)
    assert found.sequences({"b": (3, 3, 3)}, most=2) == (((2,), (3, 3)),)
    assert find_breakers(pieces, ("b", "zz")).begun == ()


def test_breakers_that_begin_in_many_tokens_need_few_prompts() -> None:
    found = find_breakers((b"a",) * 3000, ("ab",))
    found.check(300)
    with pytest.raises(RequestError, match="dry_sequence_breakers"):
        found.check(400)


def test_bits_have_the_lowest_first() -> None:
    assert bit_set([0, 9, 9], 10) == bytes([1, 2])
    assert bits(bit_set([3, 70], 71)) == [3, 70]


def test_dry_is_tokenized_only_where_it_has_an_effect() -> None:
    engine = ScriptedEngine(text_script(), replace(MODEL_INFO, special=(EOS,)))
    plain = asyncio.run(tokenize(CompletionRequest(prompt=("a",), dry_sequence_breakers=("tHello",)), engine))
    assert (plain.inside, plain.sequences) == (b"", ())
