"""The layouts of infill prompts by model family, and which of them a vocabulary has the tokens for.

A layout is written as a template: the names of special tokens, `{prefix}` and `{suffix}`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from afterword.engine.protocol import InfillLayout
from afterword.errors import SettingError

_GAP = re.compile(r"\{(prefix|suffix)\}")


@dataclass(frozen=True, slots=True)
class InfillFamily:
    """Models with the same layout. `source`: the document that states it.

    `model_name`: a part of the name in the model file. Only models with such a name have this layout, because others
    with the same tokens have another one.
    """

    name: str
    template: str
    source: str
    model_name: str = ""


FAMILIES = (
    InfillFamily(
        "mellum",
        "<fim_suffix>{suffix}<fim_prefix>{prefix}<fim_middle>",
        "https://huggingface.co/JetBrains/Mellum-4b-base",
        model_name="mellum",
    ),
    InfillFamily(
        "starcoder",
        "<fim_prefix>{prefix}<fim_suffix>{suffix}<fim_middle>",
        "https://huggingface.co/bigcode/starcoder2-15b",
    ),
    InfillFamily(
        "santacoder",
        "<fim-prefix>{prefix}<fim-suffix>{suffix}<fim-middle>",
        "https://huggingface.co/bigcode/santacoder",
    ),
    InfillFamily(
        "qwen",
        "<|fim_prefix|>{prefix}<|fim_suffix|>{suffix}<|fim_middle|>",
        "https://github.com/QwenLM/Qwen2.5-Coder",
    ),
    InfillFamily(
        "seed-coder",
        "<[fim-suffix]>{suffix}<[fim-prefix]>{prefix}<[fim-middle]>",
        "https://huggingface.co/ByteDance-Seed/Seed-Coder-8B-Base",
    ),
    InfillFamily(
        "codestral",
        "[SUFFIX]{suffix}[PREFIX]{prefix}",
        "https://github.com/mistralai/mistral-common",
    ),
    InfillFamily(
        "deepseek",
        "<｜fim▁begin｜>{prefix}<｜fim▁hole｜>{suffix}<｜fim▁end｜>",
        "https://github.com/deepseek-ai/DeepSeek-Coder",
    ),
    InfillFamily("codellama", "▁<PRE>{prefix}▁<SUF>{suffix}▁<MID>", "https://github.com/meta-llama/codellama"),
    InfillFamily("codellama", "<PRE>{prefix}<SUF>{suffix}<MID>", "https://github.com/meta-llama/codellama"),
    InfillFamily(
        "glm",
        "<|code_prefix|>{prefix}<|code_suffix|>{suffix}<|code_middle|>",
        "https://huggingface.co/zai-org/GLM-4.5",
    ),
    InfillFamily(
        "falcon",
        "<|prefix|>{prefix}<|suffix|>{suffix}<|middle|>",
        "https://huggingface.co/tiiuae/Falcon-H1-Tiny-Coder-90M",
    ),
)
"""The first family whose tokens a vocabulary has is used."""


def find_layout(tokens: Mapping[str, int], model_name: str, known: tuple[int, int, int] | None) -> InfillLayout | None:
    """The layout of a model; None if it has no infill tokens.

    `tokens`: the ids of special tokens by name. `known`: the ids of the tokens for prefix, suffix and middle that the
    model file states or llama.cpp finds, for models of no known family. Most models have that order.
    """
    for family in FAMILIES:
        if family.model_name in model_name.lower():
            parts = _parse(family.template, lambda name: [tokens[name]] if name in tokens else [])
            if parts is not None:
                return InfillLayout(family.name, parts)
    if known is None:
        return None
    prefix, suffix, middle = known
    return InfillLayout("other", (prefix, "prefix", suffix, "suffix", middle))


def parse_template(
    template: str, tokenize: Callable[[str], Sequence[int]], special: Callable[[int], bool]
) -> InfillLayout:
    """The layout of an operator's template.

    `tokenize`: turns the text around the gaps into token ids. `special`: whether an id is that of a special token.
    Raises `SettingError` if the template does not contain `{prefix}` and `{suffix}` once each, or if a text around them
    has no special token: its name is then spelled wrong, or the model does not have it.
    """
    if sorted(_GAP.findall(template)) != ["prefix", "suffix"]:
        raise SettingError(
            "--infill-template must contain {prefix} and {suffix} once each, such as "
            '"<fim_prefix>{prefix}<fim_suffix>{suffix}<fim_middle>".'
        )
    for text in _GAP.split(template)[::2]:
        if text and not any(map(special, tokenize(text))):
            raise SettingError(f"--infill-template: {text!r} is not a special token of the model.")
    return InfillLayout("custom", _parse(template, tokenize) or ())


def _parse(template: str, tokenize: Callable[[str], Sequence[int]]) -> tuple[int | str, ...] | None:
    """The parts of a template; None if a text in it has no tokens."""
    parts: list[int | str] = []
    for number, text in enumerate(_GAP.split(template)):
        if number % 2:
            parts.append(text)
        elif text:
            ids = tokenize(text)
            if not ids:
                return None
            parts.extend(ids)
    return tuple(parts)
