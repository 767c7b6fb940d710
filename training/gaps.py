"""Where the middle of an infill document begins and ends, as an editor asks for it.

Knows text alone. In prose the gap is some words, the rest of a sentence, sentences; in code some tokens, the rest of a
line, a line, or the rest of a block. Most gaps begin where a word does, with its space or without, by chance.
"""

import random
import re
from bisect import bisect_right

Span = tuple[int, int]

WITH_SPACE = 0.55  # a prompt mostly ends before the space; the gap then begins with it
SENTENCE = re.compile(r"[^\s][^\n]*?(?:[.!?][\"']*(?=\s|$)|(?=\s*(?:\n|$)))")
LINE = re.compile(r"\S[^\n]*")
WORD = re.compile(r"[\w']+|[^\w\s]")
SIGNS = re.compile(r"[.!?]+[\"']*$")
BLOCK_END = re.compile(r"\n+(?=\S)|\n*$")


def prose_gap(text: str, dice: random.Random) -> Span:
    """A gap in a text that is made of sentences."""
    sentences = [match.span() for match in SENTENCE.finditer(text)]
    if not sentences:
        return 0, len(text)
    number = dice.randrange(len(sentences))
    start, end = sentences[number]
    kind = dice.random()
    if kind < 0.1:
        return _characters(start, end, dice)
    if kind < 0.25:
        return _with_space(text, start, end, dice)
    starts, ends = _words(text, start, end)
    first = dice.randrange(len(starts))
    if kind < 0.5:
        last = min(first + int(6 ** dice.random()) - 1, len(ends) - 1)
        return _with_space(text, starts[first], ends[last], dice)
    if kind < 0.85:
        rest = text[starts[first] : end]
        sign = SIGNS.search(rest)
        if sign and sign.start() and dice.random() < 0.5:  # up to the sign, which stays in the suffix
            end -= len(rest) - sign.start()
    else:
        end = sentences[min(number + dice.randint(1, 3), len(sentences) - 1)][1]
    return _with_space(text, starts[first], end, dice)


def code_gap(text: str, dice: random.Random) -> Span:
    """A gap in a text that is made of lines."""
    lines = [match.span() for match in LINE.finditer(text)]
    if not lines:
        return 0, len(text)
    start, end = dice.choice(lines)
    kind = dice.random()
    if kind < 0.08:
        return _characters(start, end, dice)
    if kind < 0.16:
        return start, end
    if kind >= 0.65:  # as when a function is begun, and its docstring says what is to come
        start, end = dice.choice([line for line in lines if '"""' in text[slice(*line)]] or lines)
    starts, ends = _words(text, start, end)
    first = dice.randrange(len(starts))
    if kind < 0.36:
        last = min(first + int(8 ** dice.random()) - 1, len(ends) - 1)
        return _with_space(text, starts[first], ends[last], dice)
    if kind >= 0.55:
        end = _block_end(text, end) if kind >= 0.65 else _some_lines(lines, start, dice)
    return _with_space(text, starts[first], end, dice)


def _words(text: str, start: int, end: int) -> tuple[list[int], list[int]]:
    spans = [match.span() for match in WORD.finditer(text, start, end)] or [(start, end)]
    return [first for first, _ in spans], [last for _, last in spans]


def _characters(start: int, end: int, dice: random.Random) -> Span:
    """Any characters of the line or sentence, few more often than many."""
    start = dice.randrange(start, end)
    return start, min(start + int(31 ** dice.random()), end)


def _with_space(text: str, start: int, end: int, dice: random.Random) -> Span:
    if text[start - 1 : start] == " " and text[start - 2 : start - 1].strip() and dice.random() < WITH_SPACE:
        start -= 1
    return start, end


def _block_end(text: str, at: int) -> int:
    """Where the function ends that is open at this place: before the newlines that an unindented line follows."""
    match = BLOCK_END.search(text, at)
    return match.start() if match else len(text)


def _some_lines(lines: list[Span], start: int, dice: random.Random) -> int:
    number = bisect_right(lines, start, key=lambda line: line[0]) - 1
    return lines[min(number + dice.randint(1, 3), len(lines) - 1)][1]
