"""Our own search for special tokens and our cuts change no token of any text, and are linear where llama.cpp is not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from gguf import TokenType

from afterword.engine.llama import library, split_points, vocabulary
from afterword.engine.llama.library import native
from afterword.engine.llama.special_tokens import SpecialToken, SpecialTokens
from afterword.engine.llama.vocabulary import Vocabulary
from afterword.models.registry import locate, parse_spec
from oracle import tiny

CONTROL, USER, UNKNOWN, NORMAL = TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN, TokenType.NORMAL
BYTES = tiny.byte_vocabulary(infill=True, add_bos=False)
PIECES = tiny.piece_vocabulary(infill=True, add_bos=True)
OVERLAPPING = [("<a>b", CONTROL), ("b<a><b", USER), ("<a", CONTROL), ("a><a><b", USER), ("aaa", CONTROL)]
RUNS = [(character * size, USER) for character in ("\n", "\t", "▁") for size in (2, 3, 5, 8, 31)]
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
    "tokens that take spaces after them away": tiny.with_tokens(BYTES, *PHI),
    "a token that takes spaces before it away": replace(
        tiny.with_tokens(BYTES, ("<mask>", CONTROL), ("<other>", CONTROL)), pre="jina-v2-code"
    ),
    "no space before texts": PIECES,
    "order that llama.cpp alone knows": tiny.with_tokens(BYTES, ("<x>", CONTROL), (">y<", CONTROL)),
}
NAMES = {"tokens that take spaces after them away": "phi-3-tiny"}


def load(path: Path) -> Vocabulary:
    library.initialize(verbose=False)
    params = native.llama_model_default_params()
    params.vocab_only = True
    model = native.llama_model_load_from_file(os.fsencode(path), params)
    assert model, library.last_error()
    return Vocabulary(model)


@pytest.fixture(scope="module", params=MADE)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    path = tmp_path_factory.mktemp("vocabulary") / "made.gguf"
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "no space before texts":
            patch.setattr(tiny.GGUFWriter, "add_add_space_prefix", lambda *_: None)
        tiny.write_vocabulary(path, MADE[request.param], NAMES.get(request.param, "tiny"))
    return load(path)


@pytest.fixture(scope="module")
def builtin() -> Vocabulary:
    return load(Path(locate(parse_spec(None)).path))


def texts(names: list[str], seed: int, count: int) -> Iterator[str]:
    """Texts of special tokens, of parts of them, and of what lies between."""
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
def test_made_vocabularies_tokenize_as_llama_cpp_does(
    made: Vocabulary, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    monkeypatch.setattr(split_points, "PIECE_LENGTH", length)
    monkeypatch.setattr(vocabulary, "PIECE_LENGTH", length)
    check_same(made, seed=length, count=300)


def test_the_built_in_vocabulary_tokenizes_as_llama_cpp_does(builtin: Vocabulary) -> None:
    check_same(builtin, seed=1, count=300)


def test_only_where_the_order_matters_llama_cpp_finds_the_special_tokens(made: Vocabulary, request: Any) -> None:
    ambiguous = request.node.callspec.params["made"] == "order that llama.cpp alone knows"
    assert made.ambiguous == ambiguous
    assert (made.slow_runs is not None) == ambiguous


# ---- what is given to llama.cpp


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the texts that llama.cpp has tokenized, in bytes."""
    sizes: list[int] = []
    tokenize = native.llama_tokenize

    def counted(vocab: object, text: bytes, size: int, *more: object) -> int:
        sizes.append(size)
        return int(tokenize(vocab, text, size, *more))

    monkeypatch.setattr(native, "llama_tokenize", counted)
    return sizes


@pytest.mark.parametrize("unit", ["<|endoftext|>", "<|fim_prefix|>", "<|endoftext|><|fim_suffix|>"])
def test_special_tokens_are_not_searched_for_by_llama_cpp(tmp_path: Path, given: list[int], unit: str) -> None:
    words = load(tiny.write_vocabulary(tmp_path / "bytes.gguf", BYTES))
    given.clear()
    assert len(words.tokenize(unit * 20_000, True)) == 20_000 * unit.count("|>")
    assert not given


@pytest.mark.parametrize("unit", ["<", "é", "漢", "<é", "a<", "word <", "\0"])
def test_what_is_written_as_bytes_is_given_to_llama_cpp_in_short_pieces(
    tmp_path: Path, given: list[int], unit: str
) -> None:
    pieces = load(tiny.write_vocabulary(tmp_path / "pieces.gguf", PIECES))
    text = unit * (40_000 // len(unit))
    whole = tuple(pieces._ids(text.encode(), False))
    given.clear()
    assert pieces.tokenize(text, False) == whole
    assert max(given) <= 4 * (split_points.PIECE_LENGTH + len(unit))


def test_a_text_is_tokenized_part_by_part(tmp_path: Path, given: list[int]) -> None:
    pieces = load(tiny.write_vocabulary(tmp_path / "pieces.gguf", PIECES))
    given.clear()
    parts = pieces.parts("<" * 100_000, False)
    next(parts)
    assert len(given) == 1, "the rest is not begun before it is asked for"


def test_a_text_without_places_to_cut_stays_whole(tmp_path: Path, given: list[int]) -> None:
    pieces = load(tiny.write_vocabulary(tmp_path / "pieces.gguf", PIECES))
    given.clear()
    pieces.tokenize("the " * 3_000, False)
    assert len(given) == 1


# ---- the rules, without a library


def split(text: str, *tokens: SpecialToken) -> list[int | str]:
    data = text.encode()
    found = SpecialTokens(tokens).split(data)
    return [piece if isinstance(piece, int) else data[slice(*piece)].decode() for piece in found]


def token(number: int, text: str, left: bool = False, right: bool = False) -> SpecialToken:
    return SpecialToken(number, text.encode(), left, right)


def test_longer_tokens_come_first_wherever_they_are() -> None:
    tokens = token(1, "<a"), token(2, "a>>")
    assert split("<a>>", *tokens) == ["<", 2]
    assert split("<a>><a", *tokens) == ["<", 2, 1]


def test_a_token_may_take_spaces_on_a_side_of_it() -> None:
    assert split("x \n<m> y", token(1, "<m>", left=True)) == ["x", 1, " y"]
    assert split("x <m> \ty", token(1, "<m>", right=True)) == ["x ", 1, "y"]
    assert split(" <m> <m> ", token(1, "<m>", left=True, right=True)) == [1, 1]


def test_nothing_is_found_where_there_is_nothing() -> None:
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
def test_order_matters_where_tokens_of_one_length_can_overlap(tokens: list[SpecialToken], ambiguous: bool) -> None:
    assert SpecialTokens(tokens).ambiguous == ambiguous


def test_many_tokens_with_a_common_beginning_are_found() -> None:
    tokens = [token(number, f"<unused{number:04}>") for number in range(3000)]
    text = "".join(f"<unused{number:04}>x" for number in range(0, 3000, 7))
    assert split(text, *tokens) == [piece for number in range(0, 3000, 7) for piece in (number, "x")]
