"""Chooses the middle of an infill document like the gaps that editors request.

Works on plain text. In prose the gap is some words, the rest of a sentence, or sentences; in code some tokens, the rest
of a line, a line, or the rest of a block. Most gaps begin at a word, with the space before it or without, at random.
"""

import random
import re
from bisect import bisect_right

Span = tuple[int, int]

WITH_SPACE = 0.55  # most prompts end before the space; the gap then begins with it
SENTENCE = re.compile(r"[^\s][^\n]*?(?:[.!?][\"']*(?=\s|$)|(?=\s*(?:\n|$)))")
LINE = re.compile(r"\S[^\n]*")
WORD = re.compile(r"[\w']+|[^\w\s]")
SIGNS = re.compile(r"[.!?]+[\"']*$")
BLOCK_END = re.compile(r"\n+(?=\S)|\n*$")


def prose_gap(text: str, rng: random.Random) -> Span:
    """A gap in prose: positions of its start and end."""
    sentences = [match.span() for match in SENTENCE.finditer(text)]
    if not sentences:
        return 0, len(text)
    number = rng.randrange(len(sentences))
    start, end = sentences[number]
    kind = rng.random()
    if kind < 0.1:
        return _characters(start, end, rng)
    if kind < 0.25:
        return _with_space(text, start, end, rng)
    starts, ends = _words(text, start, end)
    first = rng.randrange(len(starts))
    if kind < 0.5:
        last = min(first + int(6 ** rng.random()) - 1, len(ends) - 1)
        return _with_space(text, starts[first], ends[last], rng)
    if kind < 0.85:
        rest = text[starts[first] : end]
        sign = SIGNS.search(rest)
        if sign and sign.start() and rng.random() < 0.5:  # up to the punctuation, which stays in the suffix
            end -= len(rest) - sign.start()
    else:
        end = sentences[min(number + rng.randint(1, 3), len(sentences) - 1)][1]
    return _with_space(text, starts[first], end, rng)


def code_gap(text: str, rng: random.Random) -> Span:
    """A gap in code: positions of its start and end."""
    lines = [match.span() for match in LINE.finditer(text)]
    if not lines:
        return 0, len(text)
    start, end = rng.choice(lines)
    kind = rng.random()
    if kind < 0.08:
        return _characters(start, end, rng)
    if kind < 0.16:
        return start, end
    if kind >= 0.65:  # as in a new function with a docstring and no body
        start, end = rng.choice([line for line in lines if '"""' in text[slice(*line)]] or lines)
    starts, ends = _words(text, start, end)
    first = rng.randrange(len(starts))
    if kind < 0.36:
        last = min(first + int(8 ** rng.random()) - 1, len(ends) - 1)
        return _with_space(text, starts[first], ends[last], rng)
    if kind >= 0.55:
        end = _block_end(text, end) if kind >= 0.65 else _some_lines(lines, start, rng)
    return _with_space(text, starts[first], end, rng)


def _words(text: str, start: int, end: int) -> tuple[list[int], list[int]]:
    spans = [match.span() for match in WORD.finditer(text, start, end)] or [(start, end)]
    return [first for first, _ in spans], [last for _, last in spans]


def _characters(start: int, end: int, rng: random.Random) -> Span:
    """Any characters of the line or sentence; short gaps are more frequent than long ones."""
    start = rng.randrange(start, end)
    return start, min(start + int(31 ** rng.random()), end)


def _with_space(text: str, start: int, end: int, rng: random.Random) -> Span:
    if text[start - 1 : start] == " " and text[start - 2 : start - 1].strip() and rng.random() < WITH_SPACE:
        start -= 1
    return start, end


def _block_end(text: str, at: int) -> int:
    """The end of the function that contains this position: before the newlines that precede an unindented line."""
    match = BLOCK_END.search(text, at)
    return match.start() if match else len(text)


def _some_lines(lines: list[Span], start: int, rng: random.Random) -> int:
    number = bisect_right(lines, start, key=lambda line: line[0]) - 1
    return lines[min(number + rng.randint(1, 3), len(lines) - 1)][1]
