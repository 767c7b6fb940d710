"""Lays out a prompt and its `suffix` with the model's infill tokens, in the order in which models are trained."""

from __future__ import annotations

from afterword.engine.protocol import InfillTokens


def infill_prompt(tokens: InfillTokens, prefix: tuple[int, ...], suffix: tuple[int, ...]) -> tuple[int, ...]:
    """The order is prefix, suffix, middle: the model generates the text between prefix and suffix."""
    return (tokens.prefix, *prefix, tokens.suffix, *suffix, tokens.middle)
