"""`suffix`: a prompt and the text after the gap, laid out the way the model was trained to fill gaps."""

from __future__ import annotations

from afterword.engine.protocol import InfillTokens


def infill_prompt(tokens: InfillTokens, prefix: tuple[int, ...], suffix: tuple[int, ...]) -> tuple[int, ...]:
    """Prefix, suffix, then the middle for the model to write."""
    return (tokens.prefix, *prefix, tokens.suffix, *suffix, tokens.middle)
