"""Tests of `Vocabulary` with real tokenizers: llama.cpp's own test cases, and round trips of unusual texts."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TypeVar

import pytest

from afterword.engine.llama import library
from afterword.engine.llama.library import native
from afterword.engine.llama.vocabulary import Vocabulary
from afterword.engine.worker.tokenizer_threads import stack_bytes

T = TypeVar("T")

FOLDER = Path(__file__).resolve().parents[4] / "shared" / "vocabs"
BETWEEN = "\n__ggml_vocab_test__\n"
FILES = sorted(FOLDER.glob("*.gguf"))
UNUSUAL = {
    "emoji": "😀👩‍👩‍👧‍👦🏳️‍🌈 👍🏽😶‍🌫️" * 20,
    "combining marks": "Z̷͝a̸̛l̵g̴o e\u0301e\u0301 ́́́" + "\u0300" * 500,
    "NUL and controls": "a\0b\0\0c \x01\x02\x7f\x80\x9f",
    "line ends": "a\r\nb\n\rc\r\r\n\n\td\v\f\u2028\u2029\x85",
    "lone spaces": " ",
    "spaces": "  a   b    c     \n \n  ",
    "exotic spaces": "\u00a0\u2003\u3000\u200b\ufeff",
    "scripts": "漢字かな交じり한국어 עברית العربية ไทย नमस्ते ኣማርኛ 𐍈𝔘 ﷽",
    "noncharacters": "\ufffd\uffff\U0010ffff\ue000",
    "names of special tokens": "<s></s><unk><|endoftext|><|im_start|><0x0A><fim_prefix>[INST]",
    "digits and marks": "3333333333 1,000,000.00 !!!???...///\\\\\\''\"\"``",
    "code": "def f(x):\n\treturn {'a': [x ** 2 for _ in range(10)]}  # ünï\n\n\n" * 5,
}
RUNS = ("a", " ", "\n", "é", "漢", "😀", "0", "!", "\0", "ab ")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A vocabulary without a model. `pieces` are the bytes of every id."""

    name: str
    vocabulary: Vocabulary
    pieces: tuple[bytes, ...]

    def round_trip(self, text: str) -> str:
        """The joined pieces of a text's tokens, without the space that SentencePiece puts before it."""
        tokens = self.vocabulary.tokenize(text, False)
        joined = b"".join(self.pieces[token] for token in tokens).decode()
        return joined if joined == text else joined.removeprefix(" ")


@pytest.fixture(scope="module", params=FILES or [None], ids=lambda file: file.stem if file else "none")
def loaded(request: pytest.FixtureRequest) -> Iterator[Loaded]:
    if request.param is None:
        pytest.skip("no vocabularies in ../shared/vocabs")
    library.initialize(verbose=False)
    params = native.llama_model_default_params()
    params.vocab_only = True
    model = native.llama_model_load_from_file(os.fsencode(request.param), params)
    assert model, library.last_error()
    vocabulary = Vocabulary(model)
    yield Loaded(request.param.name, vocabulary, vocabulary.pieces())
    native.llama_model_free(model)


def on_a_large_stack(work: Callable[[], T]) -> T:
    """The result of `work` on a thread with a stack like that of the worker's tokenizer threads."""
    results: list[T] = []
    before = threading.stack_size(stack_bytes("x" * 2**18))
    try:
        thread = threading.Thread(target=lambda: results.append(work()))
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    return results[0]


def test_llama_cpps_own_test_cases(loaded: Loaded) -> None:
    texts = (FOLDER / f"{loaded.name}.inp").read_bytes().decode().removesuffix(BETWEEN).split(BETWEEN)
    lines = (FOLDER / f"{loaded.name}.out").read_text().splitlines()
    for text, line in zip(texts, lines, strict=True):
        assert loaded.vocabulary.tokenize(text, False) == tuple(map(int, line.split())), repr(text)


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_texts_survive_a_round_trip(loaded: Loaded, name: str) -> None:
    assert loaded.vocabulary.keeps_text
    text = UNUSUAL[name]
    assert on_a_large_stack(lambda: loaded.round_trip(text)) == text


def test_a_run_of_one_character_survives_a_round_trip(loaded: Loaded) -> None:
    for run in RUNS:
        text = run * 2000
        assert on_a_large_stack(lambda text=text: loaded.round_trip(text)) == text, repr(run)


def test_sentencepiece_reads_its_space_symbol_as_a_space(loaded: Loaded) -> None:
    sentencepiece = loaded.pieces[loaded.vocabulary.tokenize("a", False)[0]] == b" a"
    assert loaded.round_trip("a▁b") == ("a b" if sentencepiece else "a▁b")


@pytest.mark.parametrize("run", ["a", *(pytest.param(run, marks=pytest.mark.slow) for run in RUNS[1:])], ids=ascii)
def test_a_run_of_100_000_characters_survives_a_round_trip(loaded: Loaded, run: str) -> None:
    text = (run * 100_000)[:100_000]
    assert on_a_large_stack(lambda: loaded.round_trip(text)) == text


def test_special_tokens_are_found_like_in_llama_cpp(loaded: Loaded) -> None:
    vocabulary, random = loaded.vocabulary, Random(loaded.name)
    names = [token.text.decode() for token in vocabulary._special_tokens(True)]
    parts = [*names, *(name[1:] for name in names), *(name[: len(name) // 2] for name in names)]
    plain = [" ", "  ", "\n", "the", "<", "|>", "é", "漢", "▁", "\0"] * (1 + len(names) // 10)
    for _ in range(200):
        text = "".join(random.choices(parts + plain, k=random.choice((1, 4, 30))))
        for special in (False, True):
            assert vocabulary.tokenize(text, special) == tuple(vocabulary._ids(text.encode(), special)), repr(text)


def test_no_text_has_fewer_tokens_than_the_longest_token_allows(loaded: Loaded) -> None:
    """The server refuses a text before tokenizing if its bytes divided by the longest token's exceed the context."""
    longest = max(map(len, loaded.pieces))
    for text in UNUSUAL.values():
        assert len(loaded.vocabulary.tokenize(text, False)) >= len(text.encode()) // longest
