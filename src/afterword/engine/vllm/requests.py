"""What is sent to vLLM for one sample of a job, and what comes back. Pure: it does not import vLLM.

vLLM's meanings of these fields are those of Afterword: bias, then penalties, then temperature, min_p, top_k and top_p;
log probabilities are those of the unmodified model. What vLLM refuses or computes otherwise is translated here
(`top_p` 0, `max_tokens` 0), or left out of `LIMITS`.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from afterword.engine.protocol import Job, JobLimits, Token, Value
from afterword.engine.token_row import MAX_LISTED

MERGED_TOKENS = 16
"""How many tokens of a sample vLLM reports together, after the first one, for a job whose tokens nobody reads earlier.

Each output costs the worker and the server time. If the request ends early, up to 15 tokens of each sample are not
charged: those that were not reported. `engine.http` has each token reported.
"""

LIMITS = JobLimits(
    fields=(
        *("min_tokens", "alternatives", "prompt_alternatives", "namespace", "client"),
        *("prediction", "whole"),  # change only how fast tokens are generated, and when they are reported
        *("temperature", "top_p", "top_k", "min_p", "logit_bias"),
        *("presence_penalty", "frequency_penalty", "repetition_penalty"),
    ),
    min_temperature=0.01,  # vLLM raises lower temperatures to this one
    max_temperature=2.0,
    max_alternatives=MAX_LISTED,  # vLLM makes an object of each, and keeps all of a prompt's until they are complete
    max_prompt_alternatives=MAX_LISTED,
)

Alternatives = Sequence[tuple[int, float]]
"""Token ids with their log probabilities, in any order. That of the token itself is among them."""


class SampleRequest(Value, frozen=True):
    """One request to vLLM: `sample` of a job. `fields`: those of vLLM's `SamplingParams`."""

    name: str
    prompt: tuple[int, ...]
    cache_salt: str
    fields: Mapping[str, Any]

    @property
    def reads_only_ids(self) -> bool:
        """Whether each token is reported at once, and without log probabilities."""
        fields = self.fields
        return fields["logprobs"] is None and fields["prompt_logprobs"] is None and "stream_interval" not in fields


class PromptScore(Value, frozen=True):
    """A prompt token's score as vLLM reports it. `rank` counts tokens that are as likely as the token itself."""

    id: int
    rank: int
    alternatives: Alternatives


class SampleOutput(Value, frozen=True):
    """What vLLM has reported since the last output. `scores` and `cached` come with the first output.

    `ids`: new tokens; `alternatives`: one for each of them, or None without log probabilities.
    """

    ids: tuple[int, ...]
    alternatives: tuple[Alternatives, ...] | None = None
    scores: tuple[PromptScore, ...] = ()
    cached: int = 0


def sample_request(job_id: int, job: Job, sample: int, vocabulary: int) -> SampleRequest:
    """The request for one sample of a job. The first sample also brings the scores of the prompt.

    `vocabulary`: how many tokens the model has; vLLM reports no more alternatives.
    """
    sampling = job.sampling
    greedy = sampling.temperature == 0 or sampling.top_p == 0 or job.max_tokens == 0
    fields: dict[str, Any] = {
        "temperature": 0.0 if greedy else sampling.temperature,
        "top_p": 1.0 if greedy else sampling.top_p,
        "top_k": 0 if greedy else sampling.top_k,
        "min_p": 0.0 if greedy else sampling.min_p,
        "seed": None if greedy else seed_of(job.key, sample),
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        "logit_bias": {token: float(bias) for token, bias in sampling.logit_bias} or None,
        "max_tokens": max(job.max_tokens, 1),  # vLLM always generates a token; with 0 it is left out
        "min_tokens": job.min_tokens,
        "stop_token_ids": list(job.end_tokens),
        "ignore_eos": True,  # `end_tokens` has the EOS tokens where they end the sample
        "logprobs": _at_most(job.alternatives, vocabulary),
        "prompt_logprobs": _at_most(job.prompt_alternatives, vocabulary) if sample == 0 else None,
        "detokenize": False,
    }
    if job.whole:
        fields["stream_interval"] = MERGED_TOKENS
    return SampleRequest(f"{job_id}-{sample}", job.prompt, job.namespace, fields)


def seed_of(key: bytes, sample: int) -> int:
    """The seed of a sample, from 0 to 2^63 - 1. vLLM draws a random seed for -1, and larger ones cannot be sent."""
    digest = hashlib.blake2b(struct.pack("<Q", sample), digest_size=8, key=key).digest()
    return int.from_bytes(digest, "little") >> 1


def generated_tokens(job: Job, output: SampleOutput) -> list[Token]:
    """The generated tokens of an output."""
    if output.alternatives is None:
        return [Token(token) for token in output.ids]
    return [
        _token(token, alternatives, job.alternatives or 0)
        for token, alternatives in zip(output.ids, output.alternatives, strict=True)
    ]


def scored_tokens(job: Job, scores: Sequence[PromptScore]) -> list[Token]:
    """The prompt tokens of an output."""
    return [
        _token(score.id, score.alternatives, job.prompt_alternatives or 0, vllm_rank=score.rank) for score in scores
    ]


def _token(token: int, alternatives: Alternatives, count: int, vllm_rank: int = 0) -> Token:
    """A token with its log probability and the `count` most likely alternatives. Of equal ones the lower id is first.

    vLLM's rank counts all tokens that are at least as likely. Where all of these were reported, those that are as
    likely are subtracted.
    """
    ordered = sorted(alternatives, key=lambda pair: (-pair[1], pair[0]))
    logprob = next(value for other, value in ordered if other == token)
    rank = 1 + sum(value > logprob for _, value in ordered) if 0 < vllm_rank <= count else vllm_rank
    return Token(token, logprob, tuple(ordered[:count]), rank)


def _at_most(count: int | None, most: int) -> int | None:
    return None if count is None else min(count, most)
