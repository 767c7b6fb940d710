"""The texts of `bench.prediction`: what is generated, what is drafted, and the ratio that each case should reach."""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.engine import SEQUENCES

_ROOT = Path(__file__).resolve().parent.parent
SOURCE = _ROOT / "src/afterword/engine/core/scheduler.py"
PASSAGE = _ROOT / "tests/real_model/passage.txt"
PROMPT = 32  # tokens of a prompt that is not given
_WORDS = 4000  # token ids, which every vocabulary has
_PIECES = re.compile(r" ?\w+| ?[^\w\s]+|\s+")  # about as many tokens as a tokenizer finds
_NEUTRAL = 0.97  # the least ratio where nothing is accepted

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Case:
    """`texts`: what is generated, one text for each job. `prediction`: of every job.

    `ngrams`: with `--speculate ngram`. `right`: the share of tokens of a draft model that are right; None: without a
    draft model. `prompt`: of every job; none: a random one for each job. `least`: the ratio to reach, if there is one;
    `least_of_possible`: the same as a share of what the passes allow.
    """

    name: str
    texts: tuple[Tokens, ...]
    prediction: Tokens = ()
    ngrams: bool = False
    right: float | None = None
    prompt: Tokens = ()
    least: float | None = None
    least_of_possible: float | None = None

    def prompt_of(self, number: int) -> Tokens:
        """The prompt of a job."""
        return self.prompt or random_tokens(PROMPT, 2 + number)

    @property
    def longest(self) -> int:
        """The most tokens of a prompt and its text."""
        return max(len(self.prompt_of(number)) + len(text) for number, text in enumerate(self.texts))


def cases(lines: int, length: int) -> list[Case]:
    """Cases without a draft model: a file of `lines` lines, other texts of `length` tokens."""
    file, prediction = changed_lines(lines)
    other, repetitive = random_tokens(length, 100), repetitive_text(length)
    crowd = tuple(random_tokens(length // 4, 200 + number) for number in range(SEQUENCES))
    repeated = tuple((random_tokens(24, 300 + number) * length)[: length // 2] for number in range(SEQUENCES))
    return [
        Case("changed lines", (file,), prediction, least_of_possible=0.8),
        Case("other text as prediction", (other,), random_tokens(length, 102), least=_NEUTRAL),
        Case("one stream of repetitive text, ngram", (repetitive,), ngrams=True, least=2.0),
        Case("one stream of ordinary text, ngram", (other,), ngrams=True, least=_NEUTRAL),
        *(
            Case(
                f"one stream, misleading repetitions of {size} tokens, ngram",
                (misleading(length, size),),
                ngrams=True,
                least=0.97,
            )
            for size in (4, 6, 14)
        ),
        Case("16 streams of ordinary text, ngram", crowd, ngrams=True, least=1.0),
        Case("16 streams of repetitive text, ngram", repeated, ngrams=True, least=1.0),
    ]


def draft_cases(length: int) -> list[Case]:
    """Cases with a draft model."""
    alone = (random_tokens(length, 100),)
    crowd = tuple(random_tokens(length // 4, 200 + number) for number in range(SEQUENCES))
    return [
        *(Case(f"draft model, {right:.0%} right", alone, right=right) for right in (0.9, 0.7, 0.0)),
        *(Case(f"16 streams, draft model, {right:.0%} right", crowd, right=right) for right in (0.9, 0.0)),
    ]


def real_case(tokenize: Callable[[str], Tokens], complete: Callable[[Tokens, int], Tokens]) -> Case:
    """A model that can chat repeats a text. The prediction is an older version of it, with every 25th word replaced.

    `complete`: the greedy completion of a prompt with so many tokens.
    """
    words = PASSAGE.read_text(encoding="utf-8").split()
    older = ["former" if number % 25 == 12 else word for number, word in enumerate(words)]
    request = f"Repeat the following text, word for word:\n\n{' '.join(words)}"
    prompt = tokenize(f"<|im_start|>user\n{request}<|im_end|>\n<|im_start|>assistant\n")
    prediction = tokenize(" ".join(older))
    return Case("real text", (complete(prompt, len(prediction)),), prediction, prompt=prompt, least=2.0)


def changed_lines(lines: int) -> tuple[Tokens, Tokens]:
    """A Python file, and its prediction: the file with 5 other lines."""
    whole = SOURCE.read_text(encoding="utf-8").splitlines(keepends=True)
    source = (whole * (1 + lines // len(whole)))[:lines]
    before = list(source)
    for part in range(5):
        at = max((2 * part + 1) * len(source) // 10, 1)
        before[at] = re.sub(r"\w+", "former", before[at], count=1) + "    # before\n"
    return _ids("".join(source)), _ids("".join(before))


def repetitive_text(length: int) -> Tokens:
    """The same 24 tokens again and again, each time followed by another one."""
    line = random_tokens(24, 101)
    return tuple(token for number in range(length // 25 + 1) for token in (*line, 5 + number % _WORDS))[:length]


def misleading(length: int, repeated: int) -> Tokens:
    """The same `repeated` tokens again and again, each time followed by 12 others: drafts begin, and are wrong."""
    line, numbers = random_tokens(repeated, 103), random.Random(104)
    text: list[int] = []
    while len(text) < length:
        text += [*line, *(numbers.randrange(5, _WORDS) for _ in range(12))]
    return tuple(text[:length])


def random_tokens(count: int, seed: int) -> Tokens:
    """Random tokens, which repeat nothing."""
    numbers = random.Random(seed)
    return tuple(numbers.randrange(5, _WORDS) for _ in range(count))


def _ids(text: str) -> Tokens:
    pieces: Sequence[str] = _PIECES.findall(text)
    return tuple(5 + zlib.crc32(piece.encode()) % (_WORDS - 5) for piece in pieces)
