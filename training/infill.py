"""Fills twenty gaps in held-out text greedily with a GGUF file, and prints a Markdown table of the results.

A seed selects the gaps. The module runs `afterword complete` on the held-out documents.
"""

import ast
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from training.data import compiles, functions, held_out, pieces
from training.rows import INFILL_LONGEST
from training.samples import complete

CASES = {"stories": 10, "python": 5, "made python": 5}
LENGTH = 48  # tokens of a middle
EXAMPLE = 'def add(a, b):\n    """Return the sum of', "\n\n\nprint(add(2, 3))\n"
SHOWN = 28  # characters of prefix and suffix in the table

Span = tuple[int, int]


@dataclass(frozen=True)
class Case:
    """A text and the positions of the gap that the model must fill."""

    source: str
    kind: str
    text: str
    start: int
    end: int

    @property
    def parts(self) -> tuple[str, str, str]:
        return self.text[: self.start], self.text[self.start : self.end], self.text[self.end :]


def cases(documents: list[tuple[str, str]], seed: int) -> list[Case]:
    """Ten gaps in stories, five in functions of Python's library, five in generated ones; all texts differ."""
    rng = random.Random(seed)
    stories = [piece for source, text in documents if source == "stories" for piece in pieces(text, INFILL_LONGEST)]
    library = [code for source, text in documents if source == "python" for code in functions(text)]
    made = {code + "\n": 0 for source, text in documents if source == "made python" for code in _unseen(text)}
    in_code = {"expression": _expressions, "rest": _rests, "line": _lines}
    return [
        *_choose("stories", stories, {"last words": _last_words, "clause": _clauses}, rng),
        *_choose("python", library, in_code, rng),
        *_choose("made python", list(made), {"docstring on": _docstrings, **in_code}, rng),
    ]


def _unseen(program: str) -> list[str]:
    """The held-out functions of a generated program."""
    parts = program.strip().split("\n\n\n")
    return [part for part in parts if part.startswith("def ") and held_out(part, "made python")]


def _choose(
    source: str, texts: list[str], kinds: dict[str, Callable[[str], Iterator[Span]]], rng: random.Random
) -> Iterator[Case]:
    """In two of four gaps the gap includes the space before it, if that space is within a line."""
    left = rng.sample(texts, len(texts))
    for number in range(CASES[source]):
        kind, spans_of = list(kinds.items())[number % len(kinds)]
        while not (spans := list(spans_of(text := left.pop()))):
            pass
        start, end = rng.choice(spans)
        inside = text[start - 1] == " " and not text[start - 2].isspace()
        yield Case(source, kind, text, start - (inside and number % 4 > 1), end)


def _last_words(text: str) -> Iterator[Span]:
    """The last one or two words of a sentence, up to its punctuation."""
    for match in re.finditer(r"(?<= )(?=(\w+(?: \w+)?)[.!?](?:\s|$))", text):
        yield match.span(1)


def _clauses(text: str) -> Iterator[Span]:
    """The text between a comma or a conjunction and the punctuation."""
    for match in re.finditer(r"(?:,|\b(?:and|but|because|so|that)) (\w[^.,!?\"\n]{7,38})(?=[.!?](?:\s|$))", text):
        yield match.span(1)


def _expressions(code: str) -> Iterator[Span]:
    """Expressions within one line: assigned or returned values, arguments, conditions."""
    starts = [0, *(at + 1 for at, sign in enumerate(code) if sign == "\n")]
    for node in ast.walk(ast.parse(code)):
        found: list[ast.expr | None] = []
        if isinstance(node, ast.Assign | ast.Return):
            found = [node.value]
        elif isinstance(node, ast.Call):
            found = [*node.args]
        elif isinstance(node, ast.If | ast.While):
            found = [node.test]
        for one in found:
            if one and one.lineno == one.end_lineno and 3 <= (one.end_col_offset or 0) - one.col_offset <= 40:
                start = starts[one.lineno - 1]
                yield start + one.col_offset, start + (one.end_col_offset or 0)


def _rests(code: str) -> Iterator[Span]:
    """From after a space within a line to the end of the line."""
    for match in _body(code):
        for space in re.finditer(r"(?<=\S) (?=\S)", match.group(1)):
            yield match.start(1) + space.end(), match.end(1)


def _lines(code: str) -> Iterator[Span]:
    for match in _body(code):
        yield match.span(1)


def _docstrings(code: str) -> Iterator[Span]:
    """From after a word of the docstring to the end of the function."""
    if match := re.search(r'"""(.+)"""', code):
        for space in re.finditer(" ", match.group(1)):
            yield match.start(1) + space.end(), len(code) - 1


def _body(code: str) -> Iterator[re.Match[str]]:
    """The lines of code after the docstring, from after the indent."""
    function = ast.parse(code).body[0]
    assert isinstance(function, ast.FunctionDef)
    documented = ast.get_docstring(function) is not None and len(function.body) > 1
    first = function.body[documented].lineno
    for match in re.finditer(r"^ +(\S.*)$", code, re.MULTILINE):
        if code.count("\n", 0, match.start()) + 1 >= first and not match.group(1).startswith("#"):
            yield match


def table(path: Path, chosen: list[Case]) -> str:
    """Fill each gap once, greedily. Returns a table with a row for each gap, and the totals."""
    lines = ["| | kind | before | expected | found | after | exact | compiles |", "|---|---|---|---|---|---|---|---|"]
    exact, valid = dict.fromkeys(CASES, 0), dict.fromkeys(CASES, 0)
    for number, case in enumerate(chosen, 1):
        before, expected, after = case.parts
        found = fill(path, before, after)
        same, good = found == expected, compiles(before + found + after)
        exact[case.source] += same
        valid[case.source] += good
        cells = [_cell(text) for text in (before[-SHOWN:], expected, found, after[:SHOWN])]
        judged = "" if case.source == "stories" else _yes(good)
        lines.append(f"| {number} | {case.source}, {case.kind} | {' | '.join(cells)} | {_yes(same)} | {judged} |")
    sums = [f"{source} {exact[source]} of {number}" for source, number in CASES.items()]
    compiled = [f"{source} {valid[source]} of {number}" for source, number in list(CASES.items())[1:]]
    lines += ["", f"Exact: {', '.join(sums)}. Compiles: {', '.join(compiled)}."]
    return "\n".join(lines)


def example(path: Path) -> str:
    """The example of the model card, filled."""
    before, after = EXAMPLE
    return "\n".join(["```python", (before + fill(path, before, after) + after).rstrip("\n"), "```"])


def fill(path: Path, before: str, after: str) -> str:
    """Generate the middle greedily until the model ends it."""
    return complete(path, before, suffix=after, temperature=0, max_tokens=LENGTH)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _cell(text: str) -> str:
    """A text as code in a table cell, with visible newlines and escaped bars."""
    if not text:
        return ""
    shown = text.replace("\n", "⏎").replace("|", "\\|")
    marks = "``" if "`" in shown else "`"
    edge = " " if "`" in shown else ""
    return f"{marks}{edge}{shown}{edge}{marks}"
