"""How much one request may ask for, and how strictly it is read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Above OpenAI's own limits where that does no harm.

    `strict`: what OpenAI refuses is refused, extensions too, and `logprobs` is clamped as the live API did.
    `ignore_unknown`: fields that nobody knows are ignored, and listed in a header of the answer.
    """

    max_logprobs: int = 20
    max_stop: int = 16
    max_n: int = 128
    max_best_of: int = 20
    max_completions: int = 2048
    max_bias: int = 1024
    strict: bool = False
    ignore_unknown: bool = False


STRICT = Limits(max_logprobs=5, max_stop=4, strict=True)
"""OpenAI's own."""
