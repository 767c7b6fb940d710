"""Parses the body of `POST /infill`, which has llama-server's fields, to a `CompletionRequest` and further options."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from afterword.completion import fields, object_fields
from afterword.completion.field_errors import too_long
from afterword.completion.fields import Field, JsonSchema, field_parser
from afterword.completion.json_body import parse_object
from afterword.completion.length_names import LENGTH_NAMES, other_lengths
from afterword.completion.model_defaults import DefaultsOf, no_defaults
from afterword.completion.request import CompletionRequest
from afterword.completion.request_descriptions import INFILL_DESCRIPTIONS, described_schema
from afterword.completion.request_limits import RequestLimits
from afterword.completion.sampler_fields import SAMPLER_FIELDS, SAMPLER_NAMES, has_further_samplers, samplers
from afterword.engine.protocol import INFILL_MIN_P
from afterword.errors import RequestError

SAMPLERS = (*SAMPLER_NAMES, "infill")
"""llama-server's names."""

UNLIMITED = 2**31 - 1
"""`CompletionRequest.max_tokens` for an `n_predict` of -1. `InfillRules.fill_context` reduces it to the context."""

_LENGTH_HINT = "(HINT: set the maximum number of generated tokens in 'n_predict'.)"
_REQUIRED = ("input_prefix", "input_suffix")
_INT32, _INT64 = 2**31, 2**63
_MOST_PATHS, _LONGEST_PATH = 64, 256  # paths are read on the event loop, once for each middle
_NAMES = {"max_tokens": "n_predict", "n": "n_cmpl", "repetition_penalty": "repeat_penalty"}  # of /v1/completions
_DEFAULTS = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}  # those of llama-server
_SAMPLER_OF = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalties",
    "presence_penalty": "penalties",
    "frequency_penalty": "penalties",
}


@dataclass(frozen=True, slots=True)
class InfillRequest:
    """A parsed body of `/infill`.

    `completion`: the prompt, its length and how it is sampled. `indent`: the fewest spaces and tabs at the beginning of
    a line; a line with fewer ends the middle. `predict_ms`: milliseconds of generation after which the next line end
    ends the middle; 0 for no limit. `shares_cache`: whether the prefix cache is used. `response_fields`: the paths of
    the members that the response has; None for all members.
    """

    completion: CompletionRequest
    indent: int = 0
    predict_ms: int = 0
    shares_cache: bool = True
    return_tokens: bool = False
    response_fields: tuple[str, ...] | None = None


@field_parser({"type": "array", "maxItems": _MOST_PATHS, "items": {"type": "string", "maxLength": _LONGEST_PATH}})
def _paths(name: str, value: Any, limits: RequestLimits) -> tuple[str, ...]:
    paths: tuple[str, ...] = fields.strings(name, value, limits)
    if len(paths) > _MOST_PATHS:
        raise too_long(name, "array", _MOST_PATHS, len(paths))
    longest = max(map(len, paths), default=0)
    if longest > _LONGEST_PATH:
        raise too_long(name, "string", _LONGEST_PATH, longest)
    return paths


INFILL_FIELDS: dict[str, Field] = {
    "model": fields.name_string,
    "input_prefix": fields.string,
    "input_suffix": fields.string,
    "input_extra": object_fields.input_extra,
    "prompt": fields.string,
    "n_predict": fields.integer(-1, _INT32 - 1),
    "n_cmpl": fields.integer(1, lambda limits: limits.max_n),
    "n_indent": fields.integer(0, _INT32 - 1),
    "t_max_prompt_ms": fields.integer(-1, _INT64 - 1),
    "t_max_predict_ms": fields.integer(-1, _INT64 - 1),
    "samplers": samplers(SAMPLERS),
    "temperature": fields.decimal(0, 2),
    "top_k": fields.top_k,
    "top_p": fields.decimal(0, 1),
    "min_p": fields.decimal(0, 1),
    "repeat_penalty": fields.decimal(0.01, 2),
    "presence_penalty": fields.decimal(-2, 2),
    "frequency_penalty": fields.decimal(-2, 2),
    "logit_bias": fields.logit_bias,
    "seed": fields.integer(-1, _INT64 - 1),
    "stop": fields.stop,
    "ignore_eos": fields.boolean,
    "stream": fields.boolean,
    "cache_prompt": fields.boolean,
    "id_slot": fields.integer(-1, _INT32 - 1),
    "return_tokens": fields.boolean,
    "response_fields": _paths,
    **SAMPLER_FIELDS,
}


def parse_infill(body: bytes, limits: RequestLimits, defaults: DefaultsOf = no_defaults) -> InfillRequest:
    """Parse a body of `/infill`. `defaults`: the operator's values by the names of `/v1/completions`.

    Raises `RequestError`, whose message quotes only names and numbers of the body.
    """
    limits = replace(limits, strict=False)  # OpenAI's API has no such route, and editors send an empty `stop`
    values = parse_object(body)
    unknown = tuple(name[:64] for name in values if name not in INFILL_FIELDS)
    refused = other_lengths(values, "n_predict") if limits.ignore_unknown else unknown
    if refused:
        hint = f" {_LENGTH_HINT}" if refused[0] in LENGTH_NAMES else ""
        message = f"Unrecognized request argument supplied: {refused[0]}{hint}"
        raise RequestError(message, param=refused[0], code="unknown_parameter")
    known = {name: value for name, value in values.items() if name in INFILL_FIELDS and value is not None}
    for name in _REQUIRED:
        if name not in known:
            raise RequestError(f'"{name}" is required', param=name)
    renamed = {_NAMES.get(name, name): value for name, value in defaults(values.get("model")).items()}
    whole = {name: value for name, value in renamed.items() if name in INFILL_FIELDS} | known
    given = {name: INFILL_FIELDS[name](name, value, limits) for name, value in whole.items()}
    return InfillRequest(
        completion=_completion(given, unknown),
        indent=given.get("n_indent", 0),
        predict_ms=max(0, given.get("t_max_predict_ms", 0)),
        shares_cache=given.get("cache_prompt", True),
        return_tokens=given.get("return_tokens", False),
        response_fields=given.get("response_fields") or None,
    )


def _completion(given: dict[str, Any], unknown: tuple[str, ...]) -> CompletionRequest:
    seed, length = given.get("seed", -1), given.get("n_predict", -1)
    same = ("model", "input_extra", "logit_bias", "stop", "ignore_eos", "stream")
    request = CompletionRequest(
        prompt=(given["input_prefix"] + given.get("prompt", ""),),
        suffix=given["input_suffix"],
        max_tokens=UNLIMITED if length < 0 else length,
        n=given.get("n_cmpl", 1),
        seed=None if seed < 0 else seed,
        ignored=unknown,
        return_token_ids=True,  # the reason for the end of a choice is read from its last token
        **{name: given[name] for name in same if name in given},
    )
    return _with_sampling(request, given)


def _with_sampling(request: CompletionRequest, given: dict[str, Any]) -> CompletionRequest:
    """The request with the samplers of a body: those whose names are in `samplers`.

    Without a sampler that only `SamplerChain` has, they are applied in the order of the kernel, which is faster.
    """
    values = _DEFAULTS | given | {"repetition_penalty": given.get("repeat_penalty", 1.0)}
    order = given.get("samplers", SAMPLER_NAMES)
    numbers = {name: values[name] for name in (*_SAMPLER_OF, *SAMPLER_FIELDS) if name in values}
    whole = replace(request, samplers=order, **numbers)
    if has_further_samplers(whole):
        return whole
    chosen = {name: values[name] for name, sampler in _SAMPLER_OF.items() if sampler in order and name in values}
    if "infill" in order:
        chosen["min_p"] = max(chosen.get("min_p", 0.0), INFILL_MIN_P)
    return replace(request, **chosen)


def infill_schema(limits: RequestLimits) -> JsonSchema:
    """The JSON Schema of the bodies that `parse_infill` accepts."""
    limits = replace(limits, strict=False)
    described = {
        "type": "object",
        "properties": {
            name: field.schema(limits) if name in _REQUIRED else _or_null(field, limits)
            for name, field in INFILL_FIELDS.items()
        },
        "required": list(_REQUIRED),
        "additionalProperties": limits.ignore_unknown,
        "examples": [{"input_prefix": "def add(a, b):\n    return ", "input_suffix": "\n", "n_predict": 16}],
    }
    return described_schema(described, "", INFILL_DESCRIPTIONS)


def _or_null(field: Field, limits: RequestLimits) -> JsonSchema:
    return {"anyOf": [field.schema(limits), {"type": "null"}]}
