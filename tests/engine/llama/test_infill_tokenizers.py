"""Tests of infill prompts with real tokenizers: their exact tokens, from the request on, and where BOS and spaces are.

A file of `infill_tokenizers` has the entries of a real tokenizer that the texts of these tests need, with their ids.
`source` says where they come from. The written prompts are those of the families' documents (`infill_families`).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from afterword.completion.infill import InfillRules
from afterword.completion.infill_request import parse_infill
from afterword.completion.object_fields import ContextFile
from afterword.completion.plan import make_plan
from afterword.completion.request import CompletionRequest
from afterword.completion.request_limits import RequestLimits
from afterword.completion.run import tokenize
from afterword.engine.llama.vocabulary import Vocabulary
from afterword.engine.protocol import ModelInfo
from engine.llama.vocabularies import load_extract
from scripted_engine import MODEL_INFO, ScriptedEngine

EXTRACTS = Path(__file__).with_name("infill_tokenizers")
EDITORS = Path(__file__).parents[2] / "captured" / "infill.jsonl"
PREFIX, SUFFIX = "def add(a, b):\n    return ", "\n\nprint(add(1, 2))\n"
FILES = (ContextFile("A = 1\n", "a.py"), ContextFile("B = 2\n", "b.py"))


@dataclass(frozen=True, slots=True)
class Expected:
    """`written`: the pieces of all tokens. Spaces that SentencePiece puts before a text are spaces here too."""

    family: str
    written: str
    ids: tuple[int, ...]


PROMPTS = {
    # BOS before the layout; the suffix without the space that SentencePiece puts before a text
    "codellama": Expected(
        "codellama",
        f"<s>▁<PRE> {PREFIX}▁<SUF>{SUFFIX}▁<MID>",
        (
            *(1, 32007, 822, 788, 29898, 29874, 29892, 289, 1125, 13, 1678, 736, 29871, 32008),
            *(13, 13, 2158, 29898, 1202, 29898, 29896, 29892, 29871, 29906, 876, 13, 32009),
        ),
    ),
    # as `MistralTokenizer.v3().encode_fim` of mistral-common 1.12.0 gives them (2026-11-29)
    "codestral": Expected(
        "codestral",
        f"<s>[SUFFIX]{SUFFIX}[PREFIX] {PREFIX}",
        (
            *(1, 13, 781, 781, 2799, 29500, 1756, 29500, 29508, 29493, 29473, 29518, 1511, 781),
            *(11, 1569, 1735, 29500, 29476, 29493, 1055, 2097, 781, 3055, 1372, 29473),
        ),
    ),
    # that of later models, as `MistralTokenizer.from_file(…).encode_fim` of mistral-common 1.13.1 gives them
    "codestral-tekken": Expected(
        "codestral",
        f"<s>[SUFFIX]{SUFFIX}[PREFIX]{PREFIX}",
        (
            *(1, 16, 1267, 3312, 77118, 1040, 1049, 1044, 1032, 1050, 3824),
            *(14, 3149, 2229, 8897, 1044, 1289, 3640, 1293, 1850, 1032),
        ),
    ),
    "deepseek-coder": Expected(
        "deepseek",
        f"<｜begin▁of▁sentence｜><｜fim▁begin｜>{PREFIX}<｜fim▁hole｜>{SUFFIX}<｜fim▁end｜>",
        (
            *(32013, 32016, 1551, 957, 7, 64, 11, 270, 1772, 185, 315, 967, 207, 32015),
            *(185, 185, 4128, 7, 1761, 7, 16, 11, 207, 17, 1435, 185, 32017),
        ),
    ),
    "qwen2.5-coder": Expected(
        "qwen",
        f"<|fim_prefix|>{PREFIX}<|fim_suffix|>{SUFFIX}<|fim_middle|>",
        (
            *(151659, 750, 912, 2877, 11, 293, 982, 262, 470, 220),
            *(151661, 271, 1350, 25906, 7, 16, 11, 220, 17, 1171, 151660),
        ),
    ),
    # that of StarCoder 1, Refact and Granite Code
    "starcoder": Expected(
        "starcoder",
        f"<fim_prefix>{PREFIX}<fim_suffix>{SUFFIX}<fim_middle>",
        (
            *(1, 589, 1015, 26, 83, 30, 323, 711, 284, 442, 225),
            *(3, 203, 203, 1216, 26, 669, 26, 35, 30, 225, 36, 490, 203, 2),
        ),
    ),
    "starcoder2": Expected(
        "starcoder",
        f"<fim_prefix>{PREFIX}<fim_suffix>{SUFFIX}<fim_middle>",
        (
            *(1, 610, 1035, 45, 102, 49, 342, 731, 303, 461, 244),
            *(3, 222, 222, 1243, 45, 688, 45, 54, 49, 244, 55, 509, 222, 2),
        ),
    ),
}
WITH_FILES = {
    "qwen2.5-coder": (
        "<|repo_name|>myproject\n<|file_sep|>a.py\nA = 1\n<|file_sep|>b.py\nB = 2\n<|file_sep|>filename\n",
        (
            *(151663, 2408, 4987, 198, 151664, 64, 7197, 198, 32, 284, 220, 16, 198),
            *(151664, 65, 7197, 198, 33, 284, 220, 17, 198, 151664, 8404, 198),
        ),
    ),
}


class Tokenizer(ScriptedEngine):
    """An engine with a real vocabulary that only tokenizes."""

    def __init__(self, vocabulary: Vocabulary, name: str) -> None:
        pieces = vocabulary.pieces()
        plain = vocabulary.tokenize("a", False)
        info: ModelInfo = replace(
            MODEL_INFO,
            context=4096,
            pieces=pieces,
            bos=vocabulary.bos(),
            eos=vocabulary.eos(),
            add_bos=vocabulary.add_bos(),
            space_prefix=b"".join(pieces[token] for token in plain).startswith(b" "),
            longest_token=0,
            infill=vocabulary.infill(name),
        )
        super().__init__(lambda *_: (), info)
        self.vocabulary = vocabulary

    async def tokenize(self, text: str, special: bool, client: str = "") -> tuple[int, ...]:
        return tuple(self.vocabulary.tokenize(text, special))


def prompt_of(engine: Tokenizer, files: Sequence[ContextFile] = ()) -> tuple[int, ...]:
    request = CompletionRequest(prompt=(PREFIX,), suffix=SUFFIX, input_extra=tuple(files))
    return planned(engine, request, InfillRules())


def planned(engine: Tokenizer, request: CompletionRequest, rules: InfillRules) -> tuple[int, ...]:
    tokens = asyncio.run(tokenize(request, engine, rules=rules))
    (prompt,) = make_plan(request, engine.model_info, tokens, 0).prompts
    return prompt.job.prompt


def spelled(engine: Tokenizer, ids: Sequence[int]) -> str:
    return b"".join(engine.model_info.pieces[token] for token in ids).decode()


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_has_the_tokens_of_the_familys_documents(name: str, tmp_path: Path) -> None:
    engine = Tokenizer(load_extract(EXTRACTS / f"{name}.json", tmp_path), name)
    expected = PROMPTS[name]
    layout = engine.model_info.infill
    assert layout is not None
    assert layout.family == expected.family
    ids = prompt_of(engine)
    assert spelled(engine, ids) == expected.written
    assert ids == expected.ids


@pytest.mark.parametrize("name", WITH_FILES)
def test_files_come_before_the_prompt(name: str, tmp_path: Path) -> None:
    engine = Tokenizer(load_extract(EXTRACTS / f"{name}.json", tmp_path), name)
    written, before = WITH_FILES[name]
    ids = prompt_of(engine, FILES)
    assert spelled(engine, ids) == written + PROMPTS[name].written
    assert ids == before + PROMPTS[name].ids


def written_with_separators(body: dict[str, Any]) -> str:
    """The prompt of `/infill` as Qwen's documents write it, with the names that llama-server uses."""
    files = "".join(f"<|file_sep|>{file['filename']}\n{file['text']}" for file in body["input_extra"])
    head = f"<|repo_name|>myproject\n{files}<|file_sep|>filename\n" if files else ""
    before, after = body["input_prefix"] + body["prompt"], body["input_suffix"]
    return f"{head}<|fim_prefix|>{before}<|fim_suffix|>{after}<|fim_middle|>"


def written_with_snippets(body: dict[str, Any]) -> str:
    """The prompt of `/infill` for a model without separators, as llama-server writes it."""
    files = "".join(f"\n\n--- snippet ---\n\n{file['text']}" for file in body["input_extra"])
    before, after = body["input_prefix"] + body["prompt"], body["input_suffix"]
    return f"{files}<fim_prefix>{before}<fim_suffix>{after}<fim_middle>"


@pytest.mark.parametrize(
    ("name", "written"), [("qwen2.5-coder", written_with_separators), ("starcoder", written_with_snippets)]
)
def test_the_requests_of_llama_vim_and_llama_vscode_have_the_tokens_of_the_layout(
    name: str, written: Callable[[dict[str, Any]], str], tmp_path: Path
) -> None:
    engine = Tokenizer(load_extract(EXTRACTS / f"{name}.json", tmp_path), name)
    rules = InfillRules(always=True, snippets=True, fill_context=True)  # those of the route
    for line in EDITORS.read_text("utf-8").splitlines():
        body = json.loads(line)["body"]
        request = parse_infill(json.dumps(body).encode(), RequestLimits()).completion
        assert planned(engine, request, rules) == tuple(engine.vocabulary.tokenize(written(body), True))


def test_every_extract_is_tested() -> None:
    assert {path.stem for path in EXTRACTS.iterdir()} == set(PROMPTS)
