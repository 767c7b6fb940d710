"""Lays out a prompt and its `suffix` with the model's infill tokens, in the order in which the model was trained."""

from __future__ import annotations

from afterword.engine.protocol import InfillLayout, ModelInfo

_MARK = "\ue000"  # a character that no token continues


def infill_prompt(
    layout: InfillLayout, prefix: tuple[int, ...], suffix: tuple[int, ...]
) -> tuple[tuple[int, ...], int]:
    """The tokens that the model reads, and how many of them come before the prefix."""
    ids: list[int] = []
    before = 0
    for part in layout.parts:
        if part == "prefix":
            before = len(ids)
            ids.extend(prefix)
        elif part == "suffix":
            ids.extend(suffix)
        else:
            ids.append(int(part))
    return tuple(ids), before


def before_suffix(model_info: ModelInfo) -> str:
    """What to put before a suffix when it is tokenized; `suffix_tokens` removes it again.

    Some tokenizers put a space before a text. It belongs before the prefix and not before the suffix, which follows
    the gap: models with such tokenizers (CodeLlama, Codestral) were trained without it.
    """
    return _MARK if model_info.space_prefix else ""


def suffix_tokens(ids: tuple[int, ...], model_info: ModelInfo) -> tuple[int, ...]:
    """The tokens of the suffix, from the tokens of `before_suffix` and the suffix."""
    rest = len(f" {_MARK}".encode()) if model_info.space_prefix else 0
    for count, token in enumerate(ids):
        if rest <= 0:
            return ids[count:]
        rest -= len(model_info.pieces[token])
    return ()
