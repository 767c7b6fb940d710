"""Tests that splitting texts before tokenizing changes no token, and that it avoids llama.cpp's quadratic time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from gguf import TokenType

from afterword.engine.llama import split_points, vocabulary
from afterword.engine.llama.library import native
from afterword.engine.llama.special_tokens import SpecialToken, SpecialTokens
from afterword.engine.llama.vocabulary import Vocabulary
from afterword.models.registry import locate, parse_spec
from engine.llama.vocabularies import load
from oracle import tiny

CONTROL, USER, UNKNOWN, NORMAL = TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN, TokenType.NORMAL
BYTES = tiny.byte_vocabulary(infill=True, add_bos=False)
PIECES = tiny.piece_vocabulary(infill=True, add_bos=True)
OVERLAPPING = [("<a>b", CONTROL), ("b<a><b", USER), ("<a", CONTROL), ("a><a><b", USER), ("aaa", CONTROL)]
RUNS = [(character * size, USER) for character in ("\n", "\t", "▁") for size in (2, 3, 5, 8, 31)]
SPACES = [(" " * size, USER) for size in (2, 3, 5, 8, 31)]
KINDS = [("<ctl>", CONTROL), ("<usr>", USER), ("<unk2>", UNKNOWN), ("漢", USER), ("<<", USER), ("\x01", CONTROL)]
PHI = [("</s>", NORMAL), ("<s>", CONTROL), ("<unk>", UNKNOWN), ("<|end|>", CONTROL), ("<|user|>", USER)]
MADE = {
    "bytes": BYTES,
    "pieces": PIECES,
    "bytes with overlapping tokens": tiny.with_tokens(BYTES, *OVERLAPPING),
    "pieces with overlapping tokens": tiny.with_tokens(PIECES, *OVERLAPPING),
    "bytes with runs": tiny.with_tokens(BYTES, *RUNS),
    "pieces with runs, as Gemma": tiny.with_tokens(PIECES, *RUNS, *((f"<unused{n}>", USER) for n in range(300))),
    "bytes with all kinds": tiny.with_tokens(BYTES, *KINDS),
    "pieces with all kinds": tiny.with_tokens(PIECES, *KINDS),
    "tokens that strip spaces after them": tiny.with_tokens(BYTES, *PHI),
    "a token that strips spaces before it": replace(
        tiny.with_tokens(BYTES, ("<mask>", CONTROL), ("<other>", CONTROL)), pre="jina-v2-code"
    ),
    "pieces with spaces, as Gemma": replace(tiny.with_tokens(PIECES, *RUNS[:10], *SPACES), space_prefix=False),
    "no space before texts": replace(PIECES, space_prefix=False),
    "ambiguous order": tiny.with_tokens(BYTES, ("<x>", CONTROL), (">y<", CONTROL)),
}
NAMES = {"tokens that strip spaces after them": "phi-3-tiny"}


@pytest.fixture(scope="module", params=MADE)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    path = tmp_path_factory.mktemp("vocabulary") / "made.gguf"
    tiny.write_vocabulary(path, MADE[request.param], NAMES.get(request.param, "tiny"))
    return load(path)


@pytest.fixture(scope="module")
def builtin() -> Vocabulary:
    return load(Path(locate(parse_spec(None)).path))


def texts(names: list[str], seed: int, count: int) -> Iterator[str]:
    """Random texts of special tokens, parts of them, and plain text."""
    random = Random(seed)
    plain = [" ", "  ", "\n", "\t", "a", "the", " the", "<", ">", "|", "▁", "é", "漢", "\0", "\ue000", "b<", "s>"]
    halves = [name[: len(name) // 2] for name in names] + [name[1:] for name in names]
    spaced = [name + " \n" for name in names] + ["\t " + name for name in names]
    for _ in range(count):
        several = [
            random.choice(random.choice((names, plain, halves, spaced))) for _ in range(random.choice((2, 8, 40)))
        ]
        yield "".join(several)


def check_same(vocabulary: Vocabulary, seed: int, count: int) -> None:
    names = [found.text.decode("utf-8", "replace") for found in vocabulary._special_tokens(True)]
    for text in texts(names or ["</s>"], seed, count):
        for special in (False, True):
            assert vocabulary.tokenize(text, special) == tuple(vocabulary._ids(text.encode(), special)), repr(text)


@pytest.mark.parametrize("length", [4096, 3])
def test_synthetic_vocabularies_tokenize_like_llama_cpp(
    made: Vocabulary, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    monkeypatch.setattr(split_points, "PIECE_LENGTH", length)
    monkeypatch.setattr(vocabulary, "PIECE_LENGTH", length)
    check_same(made, seed=length, count=300)


def test_the_built_in_vocabulary_tokenizes_like_llama_cpp(builtin: Vocabulary) -> None:
    check_same(builtin, seed=1, count=300)


def test_only_ambiguous_vocabularies_are_left_to_llama_cpp(made: Vocabulary, request: Any) -> None:
    ambiguous = request.node.callspec.params["made"] == "ambiguous order"
    assert made.ambiguous == ambiguous
    assert (made.slow_runs is not None) == ambiguous


# ---- calls of llama.cpp


@pytest.fixture
def tokenized_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes in bytes of the texts that were passed to `llama_tokenize`."""
    sizes: list[int] = []
    tokenize = native.llama_tokenize

    def counted(vocab: object, text: bytes, size: int, *more: object) -> int:
        sizes.append(size)
        return int(tokenize(vocab, text, size, *more))

    monkeypatch.setattr(native, "llama_tokenize", counted)
    return sizes


@pytest.mark.parametrize("unit", ["<|endoftext|>", "<|fim_prefix|>", "<|endoftext|><|fim_suffix|>"])
def test_special_tokens_are_not_passed_to_llama_cpp(tmp_path: Path, tokenized_sizes: list[int], unit: str) -> None:
    words = load(tiny.write_vocabulary(tmp_path / "bytes.gguf", BYTES))
    tokenized_sizes.clear()
    assert len(words.tokenize(unit * 20_000, True)) == 20_000 * unit.count("|>")
    assert not tokenized_sizes


@pytest.mark.parametrize("unit", ["<", "é", "漢", "<é", "a<", "word <", "\0"])
def test_characters_without_tokens_are_passed_in_short_pieces(
    tmp_path: Path, tokenized_sizes: list[int], unit: str
) -> None:
    pieces = load(tiny.write_vocabulary(tmp_path / "pieces.gguf", PIECES))
    text = unit * (40_000 // len(unit))
    whole = tuple(pieces._ids(text.encode(), False))
    tokenized_sizes.clear()
    assert pieces.tokenize(text, False) == whole
    assert max(tokenized_sizes) <= 4 * (split_points.PIECE_LENGTH + len(unit))


def test_names_that_no_merge_produces_do_not_prevent_a_split(tmp_path: Path, tokenized_sizes: list[int]) -> None:
    """`<unused100>` contains "00" in a vocabulary without a token for "0"."""
    names = [(f"<unused{number}>", TokenType.USER_DEFINED) for number in range(99, 102)]
    pieces = load(tiny.write_vocabulary(tmp_path / "pieces.gguf", tiny.with_tokens(PIECES, *names)))
    whole = tuple(pieces._ids(b"0" * 20_000, False))
    tokenized_sizes.clear()
    assert pieces.tokenize("0" * 20_000, False) == whole
    assert max(tokenized_sizes) <= 2 * split_points.PIECE_LENGTH


def test_a_text_is_tokenized_part_by_part(tmp_path: Path, tokenized_sizes: list[int]) -> None:
    pieces = load(tiny.write_vocabulary(tmp_path / "pieces.gguf", PIECES))
    tokenized_sizes.clear()
    parts = pieces.parts("<" * 100_000, False)
    next(parts)
    assert len(tokenized_sizes) == 1, "the rest is not tokenized yet"


def test_a_text_without_split_points_is_not_split(tmp_path: Path, tokenized_sizes: list[int]) -> None:
    pieces = load(tiny.write_vocabulary(tmp_path / "pieces.gguf", PIECES))
    tokenized_sizes.clear()
    pieces.tokenize("the " * 3_000, False)
    assert len(tokenized_sizes) == 1


# ---- the rules, without llama.cpp


def split(text: str, *tokens: SpecialToken) -> list[int | str]:
    data = text.encode()
    found = SpecialTokens(tokens).split(data)
    return [piece if isinstance(piece, int) else data[slice(*piece)].decode() for piece in found]


def token(number: int, text: str, left: bool = False, right: bool = False) -> SpecialToken:
    return SpecialToken(number, text.encode(), left, right)


def test_longer_tokens_are_found_first() -> None:
    tokens = token(1, "<a"), token(2, "a>>")
    assert split("<a>>", *tokens) == ["<", 2]
    assert split("<a>><a", *tokens) == ["<", 2, 1]


def test_a_token_can_strip_spaces() -> None:
    assert split("x \n<m> y", token(1, "<m>", left=True)) == ["x", 1, " y"]
    assert split("x <m> \ty", token(1, "<m>", right=True)) == ["x ", 1, "y"]
    assert split(" <m> <m> ", token(1, "<m>", left=True, right=True)) == [1, 1]


def test_a_text_without_special_tokens_is_not_split() -> None:
    assert split("", token(1, "<m>")) == []
    assert split("<m", token(1, "<m>")) == ["<m"]
    assert split("<m>") == ["<m>"]


@pytest.mark.parametrize(
    ("tokens", "ambiguous"),
    [
        ([token(1, "<a>"), token(2, "<b>")], False),
        ([token(1, "<a>"), token(2, ">b<")], True),
        ([token(1, "aaa"), token(2, "bbb")], False),
        ([token(1, "aa"), token(2, "aaa")], False),
        ([token(1, "ab"), token(2, "ba")], True),
        ([token(1, "<m>", right=True), token(2, " x ")], True),
        ([token(1, "x" * 600), token(2, "y" * 600)], True),
    ],
    ids=str,
)
def test_overlapping_tokens_of_equal_length_are_ambiguous(tokens: list[SpecialToken], ambiguous: bool) -> None:
    assert SpecialTokens(tokens).ambiguous == ambiguous


def test_many_tokens_with_a_common_prefix_are_found() -> None:
    tokens = [token(number, f"<unused{number:04}>") for number in range(3000)]
    text = "".join(f"<unused{number:04}>x" for number in range(0, 3000, 7))
    assert split(text, *tokens) == [piece for number in range(0, 3000, 7) for piece in (number, "x")]


@pytest.mark.parametrize("symbol", [" ", "▁"])
def test_runs_of_characters_survive_a_round_trip(tmp_path: Path, symbol: str) -> None:
    """A file may spell the spaces of a user-defined token as spaces or, as SentencePiece does, with its symbol."""
    runs = [(character * size, USER) for character in ("\n", "\t", symbol) for size in (2, 3, 5, 8, 31)]
    words = replace(tiny.with_tokens(PIECES, *runs), space_prefix=False)
    vocabulary = load(tiny.write_vocabulary(tmp_path / "runs.gguf", words))
    pieces = vocabulary.pieces()
    for size in (1, 2, 3, 4, 7, 100, 10_000):
        for character in " \n\t":
            text = character * size
            spelled = b"".join(pieces[token] for token in vocabulary.tokenize(text, False)).decode()
            assert spelled == text, (size, character)
