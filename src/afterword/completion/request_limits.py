"""How much one request may ask for, and how strictly it is read."""

from __future__ import annotations

from dataclasses import dataclass

from afterword.settings.limit_table import limit


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Above OpenAI's own limits where that does no harm.

    `strict`: what OpenAI refuses is refused, extensions too, and `logprobs` is clamped as the live API did.
    `ignore_unknown`: fields that nobody knows are ignored, and listed in a header of the answer.
    """

    max_logprobs: int = limit(20, "alternatives a token")
    max_stop: int = limit(16, "stop strings")
    max_n: int = limit(128, "answers a prompt")
    max_best_of: int = limit(20, "candidates a prompt")
    max_completions: int = limit(2048, "prompts times candidates")
    max_request_tokens: int = limit(2**22, "token ids in the prompts, and tokens that may be generated")
    max_answer: int = limit(2**29, "bytes of an answer, as estimated from the request")
    max_bias: int = limit(1024, "entries of logit_bias, and of stop_token_ids")
    max_name: int = limit(256, "characters of model, and of user")
    max_salt: int = limit(1024, "characters of cache_salt")
    strict: bool = False
    ignore_unknown: bool = False


STRICT = RequestLimits(max_logprobs=5, max_stop=4, strict=True)
"""OpenAI's own."""
