"""Refuses jobs that the model's engine cannot compute exactly, by the name of the field. Pure."""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec

from afterword.engine.protocol import Job, JobLimits, ModelInfo, SamplerChain
from afterword.errors import RequestError


def check_job(job: Job, model_info: ModelInfo) -> None:
    """Raise `RequestError` for a job that the engine cannot compute exactly.

    A field that an engine does not know yet is refused too, so a new field never has no effect.
    """
    if job.banned_text and not model_info.takes_back:
        name = _request_field(job, "banned_text")
        raise RequestError(
            f"'{name}' is not supported for this model: generated tokens cannot be taken back from its recurrent "
            "state. Leave it out.",
            param=name,
        )
    if job.processed and job.sampling.chain:
        raise RequestError(
            f"'logprobs_mode' \"processed_logprobs\" cannot be combined with '{_chain_field(job.sampling.chain)}'.",
            param="logprobs_mode",
        )
    limits = model_info.job_limits
    if limits is None:
        return
    for value in (job, job.sampling):
        for field, default in _defaults_beyond(type(value), limits.fields):
            if getattr(value, field) != default:
                name = _request_field(job, field)
                raise RequestError(
                    f"'{name}' is not supported by the engine that runs this model. Leave it out.", param=name
                )
    _check_temperature(job.sampling.temperature, limits)
    _check_alternatives("logprobs", job.alternatives, limits.max_alternatives)
    _check_alternatives("prompt_logprobs", job.prompt_alternatives, limits.max_prompt_alternatives)
    if job.min_tokens and not set(limits.banned) <= set(job.end_tokens):
        raise RequestError(
            "'min_tokens' together with 'ignore_eos' is not supported by the engine that runs this model: it would not "
            "sample EOS for the first 'min_tokens' tokens.",
            param="min_tokens",
        )


@cache  # `fields` evaluates the types of all fields at each call
def _defaults_beyond(kind: type[msgspec.Struct], known: tuple[str, ...]) -> tuple[tuple[str, Any], ...]:
    """The fields of `kind` that an engine does not know, each with its default. Fields without one are known to all."""
    fields = msgspec.structs.fields(kind)
    return tuple((field.name, field.default) for field in fields if field.name not in known and not field.required)


def _request_field(job: Job, name: str) -> str:
    """The field of the request that has led to a field of the job or of its sampling."""
    if name == "grammar" and job.grammar:
        return job.grammar.field.partition(".")[0]
    if name == "chain" and job.sampling.chain:
        return _chain_field(job.sampling.chain)
    if name == "banned_text" and job.banned_text:
        return "banned_strings" if job.banned_text.folded else "bad_words"
    names = {"banned": "banned_tokens", "healed": "token_healing", "processed": "logprobs_mode"} | dict.fromkeys(
        ("reported", "reported_at"), "logprob_token_ids"
    )
    return names.get(name, name)


def _chain_field(chain: SamplerChain) -> str:
    """The first field that needs the chain; `samplers` if only its order does."""
    needed = {
        "allowed_token_ids": chain.allowed,
        "dry_multiplier": chain.dry,
        "mirostat": chain.mirostat,
        "typical_p": chain.typical_p != 1,
        "top_n_sigma": chain.top_n_sigma,
        "xtc_probability": chain.xtc_probability,
        "dynatemp_range": chain.dynatemp_range,
        "adaptive_target": chain.adaptive_target >= 0,
        "min_keep": chain.min_keep,
        "repeat_last_n": chain.last_n is not None,
    }
    return next((name for name, value in needed.items() if value), "samplers")


def _check_temperature(temperature: float, limits: JobLimits) -> None:
    if temperature and not limits.min_temperature <= temperature <= limits.max_temperature:
        raise RequestError(
            f"'temperature' must be 0 or from {limits.min_temperature:g} to {limits.max_temperature:g}: the engine "
            f"that runs this model cannot sample with {temperature:g}.",
            param="temperature",
        )


def _check_alternatives(name: str, count: int | None, most: int | None) -> None:
    if count is not None and most is not None and count > most:
        raise RequestError(
            f"'{name}' must be at most {most} with the engine that runs this model: it reports no more alternatives.",
            param=name,
        )
