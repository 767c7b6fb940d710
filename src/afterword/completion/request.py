"""Parses a request body to a `CompletionRequest`, or raises an error that names the field.

Absent fields get the API's default, or None where the default depends on other fields. `plan.py` checks what depends on
the model: token ids, the context length and infill.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from afterword.completion import ban_fields, fields, grammar_fields, object_fields
from afterword.completion.fields import Field, JsonSchema, Prompt, ReportedIds
from afterword.completion.json_body import parse_object
from afterword.completion.length_names import other_lengths
from afterword.completion.model_defaults import DefaultsOf, no_defaults
from afterword.completion.object_fields import ContextFile, StreamOptions
from afterword.completion.other_names import has_other_names, with_own_names
from afterword.completion.request_descriptions import DESCRIPTIONS, described_schema
from afterword.completion.request_limits import RequestLimits
from afterword.completion.sampler_fields import DEFAULT_BREAKERS, SAMPLER_FIELDS, SAMPLER_NAMES, samplers
from afterword.completion.token_healing import check_healing
from afterword.engine.most_sampled import most_sampled
from afterword.engine.protocol import Grammar, RepetitionDetection
from afterword.errors import RequestError

_LENGTH_HINT = "(HINT: set the maximum number of generated tokens in 'max_tokens'.)"
_INT32, _INT64 = 2**31, 2**63


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """A parsed request body: the API's fields, then extensions.

    Extensions have vLLM's names and meanings; `input_extra`, `json_schema`, `grammar` and the samplers those of
    llama-server; `ban_fields` says which those of other servers are. `response_format` is a field of OpenAI's chat API.

    `ignored`: the names of unknown fields, if the operator allows them (`RequestLimits.ignore_unknown`).
    """

    model: str | None = None
    prompt: tuple[Prompt, ...] = (None,)
    best_of: int | None = None
    echo: bool = False
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    max_tokens: int = 16
    n: int = 1
    presence_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    stream_options: StreamOptions | None = None
    suffix: str | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    user: str | None = None
    # extensions
    add_special_tokens: bool | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    banned_strings: tuple[str, ...] = ()
    banned_tokens: tuple[int, ...] = ()
    cache_salt: str | None = None
    custom_token_bans: tuple[int, ...] = ()
    grammar: Grammar | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    input_extra: tuple[ContextFile, ...] = ()
    json_schema: Grammar | None = None
    logprob_token_ids: ReportedIds = ()
    logprobs_mode: str = "raw_logprobs"
    min_p: float = 0.0
    min_tokens: int = 0
    prediction: str | None = None
    priority: int = 0
    prompt_logprobs: int | None = None
    repetition_detection: RepetitionDetection | None = None
    repetition_penalty: float = 1.0
    response_format: Grammar | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    samplers: tuple[str, ...] | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool = True
    stop_token_ids: tuple[int, ...] = ()
    structured_outputs: Grammar | None = None
    token_healing: bool = False
    top_k: int = 0
    truncate_prompt_tokens: int | None = None
    truncation_side: str = "left"
    # samplers
    adaptive_decay: float = 0.9
    adaptive_target: float = -1.0
    dry_allowed_length: int = 2
    dry_base: float = 1.75
    dry_multiplier: float = 0.0
    dry_penalty_last_n: int = 64
    dry_sequence_breakers: tuple[str, ...] = DEFAULT_BREAKERS
    dynatemp_exponent: float = 1.0
    dynatemp_range: float = 0.0
    min_keep: int = 0
    mirostat: int = 0
    mirostat_eta: float = 0.1
    mirostat_tau: float = 5.0
    repeat_last_n: int | None = None
    top_n_sigma: float = -1.0
    typical_p: float = 1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    ignored: tuple[str, ...] = ()

    @property
    def candidates(self) -> int:
        """The number of outputs to generate for each prompt: `best_of`, or else `n`."""
        return self.n if self.best_of is None else self.best_of

    @property
    def constraints(self) -> list[Grammar]:
        """What the text must be: at most one in a valid request."""
        given = (self.response_format, self.structured_outputs, self.json_schema, self.grammar)
        return [each for each in given if each is not None]

    @property
    def banned_ids(self) -> tuple[int, ...]:
        """The tokens that are never generated."""
        return tuple(sorted({*self.banned_tokens, *self.custom_token_bans}))

    @property
    def reported_ids(self) -> tuple[int, ...]:
        """`logprob_token_ids` for all positions alike."""
        return tuple(each for each in self.logprob_token_ids if isinstance(each, int))

    @property
    def reported_lists(self) -> tuple[tuple[int, ...], ...]:
        """`logprob_token_ids` for each position by itself."""
        return tuple(each for each in self.logprob_token_ids if isinstance(each, tuple))

    @property
    def scores_prompt(self) -> bool:
        """Whether the response has log probabilities of the prompt."""
        return self.prompt_logprobs is not None or (self.echo and self.logprobs is not None)

    @property
    def is_infill(self) -> bool:
        """Whether the prompt is laid out with the model's infill tokens."""
        return bool(self.suffix or self.input_extra)


FIELDS: dict[str, Field] = {
    "model": fields.name_string,
    "prompt": fields.prompt,
    "best_of": fields.integer(0, lambda limits: limits.max_best_of),
    "echo": fields.boolean,
    "frequency_penalty": fields.decimal(-2, 2),
    "logit_bias": fields.logit_bias,
    "logprobs": fields.logprobs,
    "max_tokens": fields.integer(0, _INT32 - 1),
    "n": fields.integer(1, lambda limits: limits.max_n),
    "presence_penalty": fields.decimal(-2, 2),
    "seed": fields.integer(-_INT64, _INT64 - 1),
    "stop": fields.stop,
    "stream": fields.boolean,
    "stream_options": object_fields.stream_options,
    "suffix": fields.string,
    "temperature": fields.decimal(0, 2),
    "top_p": fields.decimal(0, 1),
    "user": fields.name_string,
}
"""The API's own fields."""

EXTENSIONS: dict[str, Field] = {
    "add_special_tokens": fields.boolean,
    "allowed_token_ids": fields.some_token_ids,
    "bad_words": ban_fields.bad_words,
    "banned_strings": ban_fields.banned_strings,
    "banned_tokens": ban_fields.banned_tokens,
    "cache_salt": fields.salt,
    "custom_token_bans": ban_fields.banned_tokens,
    "grammar": grammar_fields.grammar,
    "ignore_eos": fields.boolean,
    "include_stop_str_in_output": fields.boolean,
    "input_extra": object_fields.input_extra,
    "json_schema": grammar_fields.json_schema,
    "logprob_token_ids": fields.reported_token_ids,
    "logprobs_mode": fields.one_of("raw_logprobs", "processed_logprobs"),
    "min_p": fields.decimal(0, 1),
    "min_tokens": fields.integer(0, _INT32 - 1),
    "prediction": object_fields.prediction,
    "priority": fields.integer(-_INT32, _INT32 - 1),
    "prompt_logprobs": fields.integer(-1, lambda limits: limits.most_logprobs),
    "repetition_detection": object_fields.repetition_detection,
    "repetition_penalty": fields.decimal(0.01, 2),
    "response_format": grammar_fields.response_format,
    "return_token_ids": fields.boolean,
    "return_tokens_as_token_ids": fields.boolean,
    "samplers": samplers(SAMPLER_NAMES),
    "skip_special_tokens": fields.boolean,
    "spaces_between_special_tokens": fields.boolean,
    "stop_token_ids": fields.token_ids,
    "structured_outputs": grammar_fields.structured_outputs,
    "token_healing": fields.boolean,
    "top_k": fields.top_k,
    "truncate_prompt_tokens": fields.truncation,
    "truncation_side": fields.one_of("left", "right"),
    **SAMPLER_FIELDS,
}
"""Fields that OpenAI's API does not have. With `RequestLimits.strict` they are unknown fields."""


def parse(body: bytes, limits: RequestLimits, defaults: DefaultsOf = no_defaults) -> CompletionRequest:
    """Parse a request body. `defaults`: the operator's values of fields that the body does not have.

    Raises `RequestError`, whose message quotes only field names and numbers of the body.
    """
    values = parse_object(body)
    known = known_fields(limits)
    if not limits.strict and has_other_names(values):
        values = with_own_names(values, known, limits)
    if limits.strict and not values.get("model"):
        raise RequestError("you must provide a model parameter")
    unknown = tuple(name[:64] for name in values if name not in known)
    if unknown and not limits.ignore_unknown:
        raise _unknown(unknown[0], values)
    for name in other_lengths(values, "max_tokens"):
        raise _unknown(name, values)
    given = {name: value for name, value in values.items() if name in known and value is not None}
    whole = {**defaults(values.get("model")), **given}
    every = FIELDS | EXTENSIONS  # the operator may give extensions a default also where requests cannot have them
    request = CompletionRequest(
        **{name: every[name](name, value, limits) for name, value in whole.items()}, ignored=unknown
    )
    _check_combinations(request, limits)
    return request


def _unknown(name: str, values: dict[str, Any]) -> RequestError:
    hint = f" {_LENGTH_HINT}" if name in other_lengths(values, "max_tokens") else ""
    message = f"Unrecognized request argument supplied: {name}{hint}"
    return RequestError(message, param=name, code="unknown_parameter")


def known_fields(limits: RequestLimits) -> dict[str, Field]:
    return FIELDS if limits.strict else FIELDS | EXTENSIONS


def schema(limits: RequestLimits) -> JsonSchema:
    """The JSON Schema of the bodies that `parse` accepts, without rules that concern several fields or the model."""
    known = known_fields(limits)
    standard = {each.name: each.default for each in dataclasses.fields(CompletionRequest)}
    properties: JsonSchema = {
        name: {
            "anyOf": [field.schema(limits), {"type": "null"}],
            "default": _shown_default(standard[name]),
        }
        for name, field in known.items()
    }
    if limits.strict:
        properties["model"] = {"type": "string", "minLength": 1}
    described = {
        "type": "object",
        "properties": properties,
        "required": ["model"] if limits.strict else [],
        "additionalProperties": limits.ignore_unknown,
    }
    return described_schema(described, "", DESCRIPTIONS)


def _shown_default(value: Any) -> Any:
    """The default of a field as JSON; null for an empty array, which means the same."""
    if isinstance(value, tuple):
        return [*value] if any(value) else None
    return value


# ---- rules that concern several fields


def _check_combinations(request: CompletionRequest, limits: RequestLimits) -> None:
    if request.n > request.candidates:
        raise RequestError(
            "You requested that the server return more choices than it will generate (HINT: you must set 'n' "
            f"(currently {request.n}) to be at most 'best_of' (currently {request.candidates}), or omit either "
            "parameter if you don't specifically want to use them.)"
        )
    if request.stream:
        _check_stream(request)
    elif request.stream_options is not None:
        raise RequestError(
            "The 'stream_options' parameter is only allowed when 'stream' is enabled.", param="stream_options"
        )
    if request.max_tokens == 0:
        _check_scoring(request)
    if request.min_tokens > request.max_tokens:
        raise RequestError(
            f"'min_tokens' ({request.min_tokens}) must be at most 'max_tokens' ({request.max_tokens}).",
            param="min_tokens",
        )
    if request.is_infill and request.echo and request.logprobs is not None:
        name, read = ("suffix", "the suffix") if request.suffix else ("input_extra", "these files")
        raise RequestError(
            f"'{name}' cannot be combined with both 'echo' and 'logprobs': the model reads {read} too, so the "
            "prompt's log probabilities would not be those of the prompt alone. Leave out one of the three.",
            param=name,
        )
    if request.is_infill and request.truncate_prompt_tokens is not None:
        raise RequestError(
            "'truncate_prompt_tokens' cannot be combined with 'suffix' or 'input_extra'. (HINT: the server shortens "
            "such prompts if it runs with --infill-trim.)",
            param="truncate_prompt_tokens",
        )
    if request.logprob_token_ids and request.logprobs is None and request.prompt_logprobs is None:
        raise RequestError(
            "'logprob_token_ids' requires 'logprobs' or 'prompt_logprobs' to be set.", param="logprob_token_ids"
        )
    if len(request.prompt) * request.candidates > limits.max_completions:
        raise RequestError(
            f"Too many parallel completions requested. You submitted {len(request.prompt)} prompts with "
            f"{request.candidates} completions each, but you can request at most {limits.max_completions} in total.",
            param="prompt",
        )
    _check_tokens(request, limits)
    check_healing(request)
    if len(request.constraints) > 1:
        first, second = (each.field.partition(".")[0] for each in request.constraints[:2])
        raise RequestError(
            f"'{first}' and '{second}' both say what the text must be. Leave out one of them.", param=second
        )


def _check_tokens(request: CompletionRequest, limits: RequestLimits) -> None:
    """Check `max_request_tokens`.

    A `max_tokens` above it is left to the plan: its error names the model's context length.
    """
    read = sum(len(prompt) for prompt in request.prompt if isinstance(prompt, tuple))
    takes_back = request.max_tokens > 0 and bool(request.banned_strings or request.bad_words)
    sampled = most_sampled(request.max_tokens, takes_back)
    written = len(request.prompt) * request.candidates * sampled
    if request.max_tokens <= limits.max_request_tokens < read + written:
        raise RequestError(
            f"Too many tokens requested. Your prompts and completions can have {read + written} tokens together, but "
            f"you can request at most {limits.max_request_tokens}.",
            param="max_tokens" if written > read else "prompt",
        )
    reported = len(request.prompt) * sum(map(len, request.reported_lists))  # each job has them
    if reported > limits.max_request_tokens:
        raise RequestError(
            f"'logprob_token_ids' has {reported} ids, those of each prompt counted, but a request can have at most "
            f"{limits.max_request_tokens}.",
            param="logprob_token_ids",
        )


def _check_stream(request: CompletionRequest) -> None:
    if request.candidates > request.n:
        raise RequestError(
            "Results cannot be streamed when 'best_of' is greater than 'n'. (HINT: set 'best_of' to at most 'n', or "
            "set 'stream' to false.)",
            param="best_of",
        )


def _check_scoring(request: CompletionRequest) -> None:
    if not request.echo:
        raise RequestError(
            "You requested a length 0 completion, but you did not set the 'echo' parameter. That means that we will "
            "return no data to you. (HINT: set 'echo' to true in order for the API to echo back the prompt to you.)"
        )
    if request.logprobs is None:
        raise RequestError(
            "You requested a length 0 completion, but did not specify a 'logprobs' parameter to see the probability "
            "of each token. Either request a completion with length greater than 1, or set 'logprobs' to 0 (to see "
            "the probabilities of each token you submitted) or more (to also see the probabilities over alternative "
            "tokens)."
        )
