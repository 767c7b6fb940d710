"""The layouts of infill prompts by model family, and which of them a vocabulary has the tokens for.

A layout is written as a template: the names of special tokens, text, `{prefix}` and `{suffix}`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from afterword.engine.protocol import InfillLayout
from afterword.errors import SettingError

_GAP = re.compile(r"\{(prefix|suffix|files|file)\}")
_NAME = re.compile(r"▁?<[^<>]*>|\[[A-Za-z]+\]")  # of a special token in a template


@dataclass(frozen=True, slots=True)
class InfillFamily:
    """Models with the same layout. `source`: the document that states it.

    `model_name`: a part of the name in the model file. Only models with such a name have this layout, because others
    with the same tokens have another one. `also`: a further token that tells the family from others.

    `with_files`: the layout after other files of the same repository, `{files}`, and `file`: the layout of each of
    them. `{file}` is its name, a line end and its text. Empty if the source states no such layout. The names of
    repository and current file, which requests do not have, are those that llama-server writes.
    """

    name: str
    template: str
    source: str
    model_name: str = ""
    also: str = ""
    with_files: str = ""
    file: str = ""


_ENDS = (
    *("<|file_separator|>", "<|file_sep|>", "<|repo_name|>", "<|fim_pad|>"),
    *("<file_sep>", "<repo_name>", "<filename>", "<reponame>", "<fim_pad>", "<fim-pad>", "<[fim-pad]>"),
    *("▁<EOT>", "<EOT>", "<|EOT|>", "[MIDDLE]"),
)
"""Tokens between files, and end tokens of infill. A middle ends before any of them that the vocabulary has.

CodeGemma's model card lists the first of them with the infill tokens as ends of the middle, Qwen's examples stop at all
of theirs.
"""

FAMILIES = (
    InfillFamily(
        "mellum",
        "<fim_suffix>{suffix}<fim_prefix>{prefix}<fim_middle>",
        "https://huggingface.co/JetBrains/Mellum-4b-base",
        model_name="mellum",
        with_files="{files}<filename>filename\n<fim_suffix>{suffix}<fim_prefix>{prefix}<fim_middle>",
        file="<filename>{file}",
    ),
    InfillFamily(
        "starcoder",
        "<fim_prefix>{prefix}<fim_suffix>{suffix}<fim_middle>",
        "https://huggingface.co/bigcode/starcoder2-15b",
        # section 5.1 of arXiv 2402.19173: the file's name stands behind the token for the prefix
        with_files="<repo_name>myproject{files}<file_sep><fim_prefix>filename\n{prefix}<fim_suffix>{suffix}<fim_middle>",
        file="<file_sep>{file}",
    ),
    InfillFamily(
        "santacoder",
        "<fim-prefix>{prefix}<fim-suffix>{suffix}<fim-middle>",
        "https://huggingface.co/bigcode/santacoder",
    ),
    InfillFamily(
        "codegemma",
        "<|fim_prefix|>{prefix}<|fim_suffix|>{suffix}<|fim_middle|>",
        "figure 2 of arXiv 2406.11409",
        also="<|file_separator|>",
        with_files="{files}filename\n<|fim_prefix|>{prefix}<|fim_suffix|>{suffix}<|fim_middle|>",
        file="{file}<|file_separator|>",
    ),
    InfillFamily(
        "qwen",
        "<|fim_prefix|>{prefix}<|fim_suffix|>{suffix}<|fim_middle|>",
        "https://github.com/QwenLM/Qwen2.5-Coder",
        with_files="<|repo_name|>myproject\n{files}<|file_sep|>filename\n"
        "<|fim_prefix|>{prefix}<|fim_suffix|>{suffix}<|fim_middle|>",
        file="<|file_sep|>{file}",
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
        "codegeex",
        "[gMASK]<sop><|user|>\n<|code_suffix|>{suffix}<|code_prefix|>{prefix}<|code_middle|><|assistant|>\n",
        # and guides/Infilling_guideline.md of https://github.com/THUDM/CodeGeeX4; its tokenizer begins every text so
        "https://huggingface.co/THUDM/codegeex4-all-9b",
        model_name="codegeex",
        with_files="[gMASK]<sop><|user|>\n{files}###PATH:filename\n###LANGUAGE:\n###MODE:BLOCK\n"
        "<|code_suffix|>{suffix}<|code_prefix|>{prefix}<|code_middle|><|assistant|>\n",
        file="###REFERENCE:\n###PATH:{file}\n",
    ),
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
    InfillFamily(
        "aixcoder",
        "▁<AIX-SPAN-PRE>▁<AIX-SPAN-POST>{suffix}▁<AIX-SPAN-MIDDLE>{prefix}",
        "https://github.com/aixcoder-plugin/aiXcoder-7B",
    ),
)
"""The first family whose tokens a vocabulary has is used."""


def find_layout(
    tokens: Mapping[str, int],
    model_name: str,
    known: tuple[int, int, int] | None,
    tokenize: Callable[[str], Sequence[int]],
) -> InfillLayout | None:
    """The layout of a model; None if it has no infill tokens.

    `tokens`: the ids of special tokens by name. `known`: the ids of the tokens for prefix, suffix and middle that the
    model file states or llama.cpp finds, for models of no known family. Most models have that order. `tokenize`: turns
    plain text into token ids.
    """
    special = re.compile("(" + "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) + ")")

    def mixed(text: str) -> list[int]:
        words = special.split(text) if tokens else [text]
        return [token for word in words if word for token in ([tokens[word]] if word in tokens else tokenize(word))]

    for family in FAMILIES:
        if family.model_name not in model_name.lower():
            continue
        if not _has_names(tokens, family.template + family.also):
            continue
        parts = _parse(family.template, mixed)
        with_files: tuple[int | str, ...] = ()
        file: tuple[int | str, ...] = ()
        if family.file and _has_names(tokens, family.with_files + family.file):
            with_files, file = _parse(family.with_files, mixed), _parse(family.file, mixed)
        return InfillLayout(family.name, parts, with_files, file, _ends(parts, tokens))
    if known is None:
        return None
    prefix, suffix, middle = known
    parts = (prefix, "prefix", suffix, "suffix", middle)
    return InfillLayout("other", parts, ends=(*known, *(end for end in _ends((), tokens) if end not in known)))


def parse_template(
    template: str, tokenize: Callable[[str], Sequence[int]], special: Callable[[int], bool]
) -> InfillLayout:
    """The layout of an operator's template.

    `tokenize`: turns the text around the gaps into token ids. `special`: whether an id is that of a special token.
    Raises `SettingError` if the template does not contain `{prefix}` and `{suffix}` once each, or if a text around them
    has no special token: its name is then spelled wrong, or the model does not have it.
    """
    if sorted(_GAP.findall(template)) != ["prefix", "suffix"]:  # {files} would need a template of a file too
        raise SettingError(
            "--infill-template must contain {prefix} and {suffix} once each, such as "
            '"<fim_prefix>{prefix}<fim_suffix>{suffix}<fim_middle>".'
        )
    for text in _GAP.split(template)[::2]:
        if text and not any(map(special, tokenize(text))):
            raise SettingError(f"--infill-template: {text!r} is not a special token of the model.")
    parts = _parse(template, tokenize)
    return InfillLayout("custom", parts, ends=tuple(part for part in parts if isinstance(part, int) and special(part)))


def _has_names(tokens: Mapping[str, int], template: str) -> bool:
    """Whether all special tokens that a template names are in the vocabulary."""
    return all(name in tokens for name in _NAME.findall(template))


def _ends(parts: tuple[int | str, ...], tokens: Mapping[str, int]) -> tuple[int, ...]:
    """The tokens that end a middle: the layout's special ones, which have no meaning in it, and those between files."""
    special = set(tokens.values())
    known = (tokens[name] for name in _ENDS if name in tokens)
    return tuple(dict.fromkeys((*(part for part in parts if isinstance(part, int) and part in special), *known)))


def _parse(template: str, tokenize: Callable[[str], Sequence[int]]) -> tuple[int | str, ...]:
    """The parts of a template: the tokens of its texts, and the names of its gaps."""
    parts: list[int | str] = []
    for number, text in enumerate(_GAP.split(template)):
        if number % 2:
            parts.append(text)
        elif text:
            parts.extend(tokenize(text))
    return tuple(parts)
