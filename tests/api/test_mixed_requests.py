"""Requests that mix every field for sampling and control have the same response alone and in a crowd."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from completion_requests import Json, joined, stream

from afterword.completion.request import EXTENSIONS, FIELDS
from afterword.completion.sampler_fields import SAMPLER_NAMES

TEXTS = ("Once upon a time", "The dog and the cat went home. The dog", 'Tom said: "I', "One day, a little girl named L")
SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}, "required": ["age"]}
GRAMMARS = ("response_format", "structured_outputs", "json_schema", "grammar")
ELSEWHERE = {"model", "input_extra", "stream_options"}
"""Fields that select the model, need file separators, or change the events alone."""

NOT_PROCESSED = (
    *(
        "samplers",
        "allowed_token_ids",
        "dry_",
        "xtc_",
        "typical_p",
        "top_n_sigma",
        "dynatemp_",
        "mirostat",
        "adaptive_",
    ),
    *("min_keep", "repeat_last_n"),
)
"""Beginnings of fields that `processed_logprobs` is not allowed with."""

Choose = Callable[[random.Random], Any]
IDS = list(range(300, 420))
VALUES: dict[str, Choose] = {
    "add_special_tokens": lambda rng: rng.random() < 0.5,
    "allowed_token_ids": lambda rng: list(range(rng.randrange(3), 4000, 3)),
    "bad_words": lambda rng: rng.sample(["dog", "cat", "was", "the"], 2),
    "banned_strings": lambda rng: rng.sample(["a ", "little", "he", "day,"], 2),
    "banned_tokens": lambda rng: rng.sample(IDS, 9),
    "best_of": lambda rng: 3,
    "cache_salt": lambda rng: rng.choice(["one", "two"]),
    "custom_token_bans": lambda rng: ",".join(map(str, rng.sample(IDS, 3))),
    "echo": lambda rng: True,
    "frequency_penalty": lambda rng: rng.choice([-0.5, 0.7]),
    "grammar": lambda rng: rng.choice(['root ::= "yes" | "no" | [a-z]+ "!"', "start: /[a-z ]{3,20}/"]),
    "ignore_eos": lambda rng: True,
    "include_stop_str_in_output": lambda rng: True,
    "json_schema": lambda rng: SCHEMA,
    "logit_bias": lambda rng: {str(token): rng.uniform(-5, 5) for token in rng.sample(IDS, 4)},
    "logprob_token_ids": lambda rng: rng.sample(IDS, 3),
    "logprobs": lambda rng: rng.choice([0, 1, 5]),
    "logprobs_mode": lambda rng: rng.choice(["raw_logprobs", "processed_logprobs"]),
    "min_p": lambda rng: rng.choice([0.02, 0.2]),
    "min_tokens": lambda rng: 5,
    "n": lambda rng: 2,
    "prediction": lambda rng: {"type": "content", "content": " there was a little girl named Lily. She loved to play."},
    "presence_penalty": lambda rng: rng.choice([-0.5, 0.7]),
    "priority": lambda rng: rng.randrange(-3, 3),
    "prompt_logprobs": lambda rng: rng.choice([0, 2]),
    "repetition_detection": lambda rng: {"max_pattern_size": 4, "min_pattern_size": 1, "min_count": 3},
    "repetition_penalty": lambda rng: rng.choice([0.9, 1.2]),
    "response_format": lambda rng: {"type": "json_object"},
    "return_token_ids": lambda rng: True,
    "return_tokens_as_token_ids": lambda rng: True,
    "samplers": lambda rng: rng.sample([*SAMPLER_NAMES[1:8], "temp", "penalties", "adaptive-p"], 5),
    "skip_special_tokens": lambda rng: rng.random() < 0.5,
    "spaces_between_special_tokens": lambda rng: False,
    "stop": lambda rng: rng.choice([".", [" the", "\n"]]),
    "stop_token_ids": lambda rng: rng.sample(IDS, 9),
    "stream": lambda rng: True,
    "structured_outputs": lambda rng: rng.choice([{"choice": ["red", "blue"]}, {"regex": "[0-9]{2,9}"}]),
    "suffix": lambda rng: " and they all went home.",
    "temperature": lambda rng: rng.choice([0, 0.6, 1.4]),
    "token_healing": lambda rng: True,
    "top_k": lambda rng: rng.choice([3, 40]),
    "top_p": lambda rng: rng.choice([0.5, 0.95]),
    "truncate_prompt_tokens": lambda rng: 3,
    "truncation_side": lambda rng: rng.choice(["left", "right"]),
    "user": lambda rng: "someone",
    # samplers
    "adaptive_decay": lambda rng: rng.choice([0, 0.7]),
    "adaptive_target": lambda rng: rng.choice([0.1, 0.5]),
    "dry_allowed_length": lambda rng: 1,
    "dry_base": lambda rng: 2,
    "dry_multiplier": lambda rng: 1,
    "dry_penalty_last_n": lambda rng: rng.choice([-1, 20]),
    "dry_sequence_breakers": lambda rng: ["\n", "dog"],
    "dynatemp_exponent": lambda rng: 0.5,
    "dynatemp_range": lambda rng: 0.5,
    "min_keep": lambda rng: 3,
    "mirostat": lambda rng: rng.choice([1, 2]),
    "mirostat_eta": lambda rng: 0.3,
    "mirostat_tau": lambda rng: 2,
    "repeat_last_n": lambda rng: rng.choice([-1, 0, 4]),
    "top_n_sigma": lambda rng: 1.5,
    "typical_p": lambda rng: 0.7,
    "xtc_probability": lambda rng: 0.6,
    "xtc_threshold": lambda rng: 0.05,
}


def mixed_body(seed: int) -> Json:
    """A request with a quarter of all fields, without those that the API does not allow together."""
    rng = random.Random(seed)
    names = {name for name in VALUES if rng.random() < 0.25}
    grammars = [name for name in GRAMMARS if name in names]
    names -= {*grammars[1:]}
    if grammars:
        names -= {"token_healing", "allowed_token_ids"}
    if "suffix" in names:
        names -= {"token_healing", "truncate_prompt_tokens", "echo"}
    if "token_healing" in names:
        names -= {"truncation_side", "allowed_token_ids"}
    if "stream" in names:
        names.discard("best_of")
    if "logprobs_mode" in names:
        names -= {name for name in names if name.startswith(NOT_PROCESSED)}
    if not names & {"logprobs", "prompt_logprobs"}:
        names.discard("logprob_token_ids")
    body = {"prompt": rng.choice([*TEXTS, [*TEXTS[:2]]]), "max_tokens": rng.randrange(6, 20), "seed": seed}
    return body | {name: VALUES[name](rng) for name in sorted(names)}


def reports(chunks: list[Json]) -> dict[int, list[Any]]:
    """What the events of each choice say about the prompt."""
    found: dict[int, list[Any]] = {}
    for part in (part for chunk in chunks for part in chunk["choices"]):
        found.setdefault(part["index"], []).extend(part.get("prompt_logprobs") or ())
    return found


def response(http: httpx.Client, body: Json) -> tuple[int, Any]:
    """The status, and what does not depend on the moment: the choices, or the error."""
    if body.get("stream"):
        chunks = stream(http, **body)
        return 200, (joined(chunks), reports(chunks))
    answer = http.post("/v1/completions", json=body)
    parsed = answer.json()
    if answer.status_code != 200:
        return answer.status_code, parsed
    parsed["usage"].pop("prompt_tokens_details")  # the cached ones depend on the requests before
    return 200, (parsed["choices"], parsed["usage"], parsed["system_fingerprint"])


def test_every_field_is_mixed_in() -> None:
    assert VALUES.keys() | ELSEWHERE | {"prompt", "max_tokens", "seed"} == {*FIELDS, *EXTENSIONS}


@pytest.mark.parametrize("count", [40, pytest.param(300, marks=pytest.mark.slow)])
def test_mixed_requests_have_the_same_response_alone_and_in_a_crowd(http: httpx.Client, count: int) -> None:
    bodies = [mixed_body(seed) for seed in range(count)]
    assert set().union(*bodies) >= VALUES.keys()
    alone = [response(http, body) for body in bodies]
    refused = [(body, found) for body, (status, found) in zip(bodies, alone, strict=True) if status != 200]
    assert len(refused) <= count // 20, refused[:3]
    order = random.Random(1).sample(range(count), count)
    with ThreadPoolExecutor(24) as pool:
        crowd = dict(zip(order, pool.map(lambda index: response(http, bodies[index]), order), strict=True))
    different = [(bodies[index], alone[index], crowd[index]) for index in range(count) if alone[index] != crowd[index]]
    assert not different, (len(different), different[0])
