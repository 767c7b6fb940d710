"""Tests of the layout of infill prompts for each model family, and of the operator's template."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from gguf import TokenType

from afterword.completion.infill import infill_prompt
from afterword.completion.infill_trim import InfillTexts
from afterword.engine.llama.infill_families import FAMILIES, find_layout
from afterword.engine.llama.vocabulary import Vocabulary
from afterword.engine.protocol import InfillLayout
from afterword.errors import SettingError
from engine.llama.vocabularies import load
from oracle import tiny

SHARED = Path(__file__).resolve().parents[4] / "shared" / "vocabs"
BYTES = tiny.byte_vocabulary(infill=False, add_bos=False)
PIECES = tiny.piece_vocabulary(infill=False, add_bos=True)
# The token names of each family in an arbitrary order, and the layout that the family's documents state.
EXPECTED = {
    "starcoder": (BYTES, ("<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>"), (0, "prefix", 2, "suffix", 1)),
    "santacoder": (BYTES, ("<fim-prefix>", "<fim-middle>", "<fim-suffix>", "<fim-pad>"), (0, "prefix", 2, "suffix", 1)),
    "qwen": (BYTES, ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"), (0, "prefix", 2, "suffix", 1)),
    "seed-coder": (BYTES, ("<[fim-suffix]>", "<[fim-prefix]>", "<[fim-middle]>"), (0, "suffix", 1, "prefix", 2)),
    "codestral": (PIECES, ("[INST]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]"), (3, "suffix", 1, "prefix")),
    "deepseek": (BYTES, ("<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"), (1, "prefix", 0, "suffix", 2)),
    "codellama": (PIECES, ("▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>"), (0, "prefix", 2, "suffix", 1)),
    "glm": (BYTES, ("<|code_prefix|>", "<|code_middle|>", "<|code_suffix|>"), (0, "prefix", 2, "suffix", 1)),
    "falcon": (BYTES, ("<|prefix|>", "<|suffix|>", "<|middle|>"), (0, "prefix", 1, "suffix", 2)),
    "aixcoder": (
        PIECES,
        ("▁<AIX-SPAN-PRE>", "▁<AIX-SPAN-POST>", "▁<AIX-SPAN-MIDDLE>"),
        (0, 1, "suffix", 2, "prefix"),
    ),
}


def with_names(folder: Path, vocabulary: tiny.Vocabulary, *names: str) -> tuple[Vocabulary, int]:
    """A loaded vocabulary with further special tokens, and the id of the first of them."""
    more = tiny.with_tokens(vocabulary, *((name, TokenType.CONTROL) for name in names))
    return load(tiny.write_vocabulary(folder / "vocabulary.gguf", more)), len(vocabulary.tokens)


@pytest.mark.parametrize("family", EXPECTED)
def test_each_family_is_found_by_its_tokens(tmp_path: Path, family: str) -> None:
    words, names, expected = EXPECTED[family]
    vocabulary, first = with_names(tmp_path, words, *names)
    parts = tuple(part if isinstance(part, str) else first + part for part in expected)
    found = vocabulary.infill("Any")
    assert found is not None
    assert (found.family, found.parts, found.file) == (family, parts, ())


def test_every_family_is_tested() -> None:
    assert {family.name for family in FAMILIES} == {*EXPECTED, *FILES, "codegeex"}


def test_a_family_with_the_tokens_of_another_is_found_by_the_models_name(tmp_path: Path) -> None:
    """Mellum was trained with the suffix first, with StarCoder's tokens."""
    vocabulary, first = with_names(tmp_path, BYTES, "<fim_prefix>", "<fim_middle>", "<fim_suffix>")
    suffix_first = (first + 2, "suffix", first, "prefix", first + 1)
    ends = (first + 2, first, first + 1)
    assert vocabulary.infill("Mellum 4b Base") == InfillLayout("mellum", suffix_first, ends=ends)


def test_tokens_that_the_file_states_are_used_for_unknown_families(tmp_path: Path) -> None:
    own = replace(BYTES, special=BYTES.special | {"fim_pre": "<p>", "fim_suf": "<s>", "fim_mid": "<m>"})
    vocabulary, first = with_names(tmp_path, own, "<p>", "<s>", "<m>")
    parts = (first, "prefix", first + 1, "suffix", first + 2)
    assert vocabulary.infill("") == InfillLayout("other", parts, ends=(first, first + 1, first + 2))


def test_tokens_that_a_file_states_and_its_vocabulary_does_not_use_are_none(tmp_path: Path) -> None:
    """llama.cpp's conversion states CodeGemma's ids for all models of Gemma 1, which were not trained for infill."""
    names = ("<unused60>", "<unused61>", "<unused62>")
    own = replace(BYTES, special=BYTES.special | dict(zip(("fim_pre", "fim_mid", "fim_suf"), names, strict=True)))
    vocabulary, _ = with_names(tmp_path, own, *names)
    assert vocabulary.infill("gemma-2b") is None


CODEGEEX = ("<|user|>", "<|assistant|>", "[gMASK]", "<sop>", "<|code_prefix|>", "<|code_middle|>", "<|code_suffix|>")


def test_codegeex_has_the_suffix_first_in_a_message(tmp_path: Path) -> None:
    vocabulary, first = with_names(tmp_path, BYTES, *CODEGEEX)
    user, assistant, mask, start, prefix, middle, suffix = range(first, first + len(CODEGEEX))
    (line,) = vocabulary.tokenize("\n", False)
    found = vocabulary.infill("Codegeex4 All 9b")
    assert found is not None
    message = (mask, start, user, line)
    expected = (*message, suffix, "suffix", prefix, "prefix", middle, assistant, line)
    assert (found.family, found.parts) == ("codegeex", expected)
    assert set(found.ends) == {user, assistant, mask, start, prefix, middle, suffix}, "a line end is no end"
    texts = InfillTexts(*(vocabulary.tokenize(text, False) for text in (PREFIX, SUFFIX)))
    head = "[gMASK]<sop><|user|>\n"
    rest = f"<|code_suffix|>{SUFFIX}<|code_prefix|>{PREFIX}<|code_middle|><|assistant|>\n"
    assert infill_prompt(found, texts).ids == vocabulary.tokenize(head + rest, True)
    with_files = InfillTexts(texts.prefix, texts.suffix, tuple(vocabulary.tokenize(text, False) for text in OTHERS))
    files = "".join(f"###REFERENCE:\n###PATH:{text}\n" for text in OTHERS)
    written = f"{head}{files}###PATH:filename\n###LANGUAGE:\n###MODE:BLOCK\n{rest}"
    spelled = b"".join(vocabulary.pieces()[token] for token in infill_prompt(found, with_files).ids).decode()
    assert spelled == written
    glm = vocabulary.infill("glm-4")
    assert glm is not None
    assert (glm.family, glm.parts) == ("glm", (prefix, "prefix", suffix, "suffix", middle))


# The infill tokens of real tokenizers, by hand from the documents named: family, model's name, ids, and the layout.
REAL_IDS = {
    # llama.cpp `conversion/gemma.py`
    "codegemma": (
        "codegemma-2b",
        {67: "<|fim_prefix|>", 68: "<|fim_middle|>", 69: "<|fim_suffix|>", 70: "<|file_separator|>"},
        (67, "prefix", 69, "suffix", 68),
    ),
    # `added_tokens.json` of models made from bigcode/santacoder
    "santacoder": (
        "santacoder",
        {49153: "<fim-prefix>", 49154: "<fim-middle>", 49155: "<fim-suffix>", 49156: "<fim-pad>"},
        (49153, "prefix", 49155, "suffix", 49154),
    ),
    # what llama.cpp prints for a file of GLM 4
    "glm": (
        "GLM 4 9B 0414",
        {151347: "<|code_prefix|>", 151348: "<|code_middle|>", 151349: "<|code_suffix|>"},
        (151347, "prefix", 151349, "suffix", 151348),
    ),
    # `tokenizer_config.json` of aiXcoder-7B in copies by PrunaAI
    "aixcoder": (
        "aixcoder-7b-base",
        {260: "▁<AIX-SPAN-PRE>", 261: "▁<AIX-SPAN-MIDDLE>", 262: "▁<AIX-SPAN-POST>"},
        (260, 262, "suffix", 261, "prefix"),
    ),
}


@pytest.mark.parametrize("family", REAL_IDS)
def test_the_tokens_with_the_ids_of_real_tokenizers_are_laid_out(tmp_path: Path, family: str) -> None:
    model, names, expected = REAL_IDS[family]
    base = PIECES if family == "aixcoder" else BYTES
    size = max(names) + 1
    # The bytes and words stand after the tokens of the family, and all other ids are unused.
    tokens = tuple(names.get(token, f"<none {token}>") for token in range(size))
    types = tuple(TokenType.CONTROL if token in names else TokenType.UNUSED for token in range(size))
    scores = (-1000.0,) * size + base.scores if base.scores else ()
    whole = replace(base, tokens=tokens + base.tokens, types=types + base.types, scores=scores)
    vocabulary = load(tiny.write_vocabulary(tmp_path / "vocabulary.gguf", whole))
    layout = vocabulary.infill(model)
    assert layout is not None
    assert (layout.family, layout.parts) == (family, expected)
    assert set(names) >= {part for part in expected if isinstance(part, int)}
    assert set(names) == set(layout.ends), "each of these tokens ends a middle"


@pytest.mark.parametrize("names", [("<other>",), ("<fim_prefix>", "<fim_suffix>"), ("[PREFIX]",)])
def test_a_model_without_all_tokens_cannot_fill_gaps(tmp_path: Path, names: tuple[str, ...]) -> None:
    vocabulary, _ = with_names(tmp_path, BYTES, *names)
    assert vocabulary.infill("") is None


def test_a_template_replaces_the_familys_layout(tmp_path: Path) -> None:
    vocabulary, first = with_names(tmp_path, BYTES, "<fim_prefix>", "<fim_middle>", "<fim_suffix>")
    layout = vocabulary.infill("", "<fim_suffix>{suffix}<fim_prefix>\n{prefix}<fim_middle>")
    newline = BYTES.tokens.index("Ċ")
    parts = (first + 2, "suffix", first, newline, "prefix", first + 1)
    assert layout == InfillLayout("custom", parts, ends=(first + 2, first, first + 1))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("<fim_prefix>{prefix}", "must contain {prefix} and {suffix} once each"),
        ("<fim_prefix>{prefix}{prefix}<fim_suffix>{suffix}", "once each"),
        ("<fim_prefix>{prefix}<fim_sufix>{suffix}", "'<fim_sufix>' is not a special token"),
    ],
)
def test_a_wrong_template_is_an_error(tmp_path: Path, template: str, message: str) -> None:
    vocabulary, _ = with_names(tmp_path, BYTES, "<fim_prefix>", "<fim_middle>", "<fim_suffix>")
    with pytest.raises(SettingError) as caught:
        vocabulary.infill("", template)
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("deepseek-coder", InfillLayout("deepseek", (32016, "prefix", 32015, "suffix", 32017))),
        ("starcoder", InfillLayout("starcoder", (1, "prefix", 3, "suffix", 2))),
        ("refact", InfillLayout("starcoder", (1, "prefix", 3, "suffix", 2))),
        ("qwen2", None),
        ("llama-spm", None),
    ],
)
def test_real_vocabularies(name: str, expected: InfillLayout | None) -> None:
    found = shared_vocabulary(name).infill(name)
    assert (found and (found.family, found.parts)) == (expected and (expected.family, expected.parts))


def shared_vocabulary(name: str) -> Vocabulary:
    path = SHARED / f"ggml-vocab-{name}.gguf"
    if not path.exists():
        pytest.skip("no vocabularies in ../shared/vocabs")
    return load(path)


PREFIX, SUFFIX = "def add(a, b):\n    return ", "\n\nprint(add(1, 2))\n"
OTHERS = ("a.py\nA = 1\n", "b.py\nB = 2\n")
# For each real tokenizer: a prompt as the documents of the family write it, and its tokens.
WRITTEN = {
    "deepseek-coder": (
        f"<｜fim▁begin｜>{PREFIX}<｜fim▁hole｜>{SUFFIX}<｜fim▁end｜>",
        (
            *(32016, 1551, 957, 7, 64, 11, 270, 1772, 185, 315, 967, 207, 32015),
            *(185, 185, 4128, 7, 1761, 7, 16, 11, 207, 17, 1435, 185, 32017),
        ),
    ),
    "starcoder": (
        f"<fim_prefix>{PREFIX}<fim_suffix>{SUFFIX}<fim_middle>",
        (
            *(1, 610, 1035, 45, 102, 49, 342, 731, 303, 461, 244),
            *(3, 222, 222, 1243, 45, 688, 45, 54, 49, 244, 55, 509, 222, 2),
        ),
    ),
    "refact": (
        f"<fim_prefix>{PREFIX}<fim_suffix>{SUFFIX}<fim_middle>",
        (
            *(1, 589, 1015, 26, 83, 30, 323, 711, 284, 442, 225),
            *(3, 203, 203, 1216, 26, 669, 26, 35, 30, 225, 36, 490, 203, 2),
        ),
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_real_tokenizers_give_the_tokens_of_the_written_prompt(name: str) -> None:
    vocabulary = shared_vocabulary(name)
    layout = vocabulary.infill(name)
    assert layout is not None
    texts = InfillTexts(vocabulary.tokenize(PREFIX, False), vocabulary.tokenize(SUFFIX, False))
    written, expected = WRITTEN[name]
    assert infill_prompt(layout, texts).ids == expected == vocabulary.tokenize(written, True)


def test_the_real_tokenizer_of_starcoder_2_gives_the_tokens_of_the_written_prompt_with_files() -> None:
    vocabulary = shared_vocabulary("starcoder")  # that of StarCoder 2
    layout = vocabulary.infill("starcoder2")
    assert layout is not None
    prefix, suffix, *files = (vocabulary.tokenize(text, False) for text in (PREFIX, SUFFIX, *OTHERS))
    ids = infill_prompt(layout, InfillTexts(prefix, suffix, tuple(files))).ids
    before = "<repo_name>myproject" + "".join(f"<file_sep>{text}" for text in OTHERS)
    written = f"{before}<file_sep><fim_prefix>filename\n{PREFIX}<fim_suffix>{SUFFIX}<fim_middle>"
    assert ids == vocabulary.tokenize(written, True)
    assert ids[:10] == (5, 1791, 2268, 6, 102, 51, 997, 222, 70, 299)


# The token names of a family, and its layouts of files and of a prompt after files. A text stands for its tokens.
FILES = {
    "qwen": (
        ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|repo_name|>", "<|file_sep|>"),
        (4, "file"),
        (3, "myproject\n", "files", 4, "filename\n", 0, "prefix", 1, "suffix", 2),
    ),
    "starcoder": (
        ("<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<repo_name>", "<file_sep>"),
        (4, "file"),
        (3, "myproject", "files", 4, 0, "filename\n", "prefix", 1, "suffix", 2),
    ),
    "codegemma": (
        ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|file_separator|>"),
        ("file", 3),
        ("files", "filename\n", 0, "prefix", 1, "suffix", 2),
    ),
    "mellum": (
        ("<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<filename>"),
        (3, "file"),
        ("files", 3, "filename\n", 1, "suffix", 0, "prefix", 2),
    ),
}


@pytest.mark.parametrize("family", FILES)
def test_families_with_file_separators_have_a_layout_for_files(tmp_path: Path, family: str) -> None:
    names, file, with_files = FILES[family]
    vocabulary, first = with_names(tmp_path, BYTES, *names)
    found = vocabulary.infill(f"a {family}")
    expected: list[int | str] = []
    for part in with_files:
        if isinstance(part, int):
            expected.append(first + part)
        elif part in ("files", "prefix", "suffix"):
            expected.append(part)
        else:
            expected += vocabulary.tokenize(part, False)
    assert found is not None
    assert found.family == family
    assert found.file == tuple(first + part if isinstance(part, int) else part for part in file)
    assert found.with_files == tuple(expected)


def test_a_middle_ends_before_the_tokens_of_its_layout_and_those_between_files(tmp_path: Path) -> None:
    vocabulary, first = with_names(tmp_path, BYTES, "<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<file_sep>", "<x>")
    found = vocabulary.infill("")
    assert found is not None
    assert found.ends == (first, first + 1, first + 2, first + 3)
    assert found.file == ()


def test_the_first_family_with_all_tokens_is_chosen() -> None:
    tokens = {"<fim_prefix>": 1, "<fim_suffix>": 2, "<fim_middle>": 3, "<|fim_prefix|>": 4}
    layout = find_layout(tokens, "", None, list)
    assert layout is not None
    assert layout.family == "starcoder"
