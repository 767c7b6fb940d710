"""Twenty gaps in held-out text, filled greedily by a GGUF file and scored; as a Markdown table.

The gaps are chosen by a seed, before any model has seen them. Knows llama-cpp-python and the held-out documents.
"""

import ast
import random
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import llama_cpp

from training.data import pieces
from training.rows import END, INFILL_LONGEST, MIDDLE, PREFIX, SUFFIX
from training.samples import ids_of

EACH = 10
LENGTH = 48  # tokens of a middle
FUNCTION = re.compile(r"^( *)def .*\n(?:(?:\1 +\S.*| *)\n)+", re.MULTILINE)
SHOWN = 28  # characters of prefix and suffix in the table

Span = tuple[int, int]


@dataclass(frozen=True)
class Case:
    """A text and the borders of the part that is to be found."""

    source: str
    kind: str
    text: str
    start: int
    end: int

    @property
    def parts(self) -> tuple[str, str, str]:
        return self.text[: self.start], self.text[self.start : self.end], self.text[self.end :]


def cases(documents: list[tuple[str, str]], seed: int) -> list[Case]:
    """Ten gaps in stories and ten in functions of Python modules, no text twice."""
    dice = random.Random(seed)
    stories = [piece for source, text in documents if source == "stories" for piece in pieces(text, INFILL_LONGEST)]
    library = [code for source, text in documents if source == "python" for code in functions(text)]
    return [
        *_choose("stories", stories, {"last words": _last_words, "clause": _clauses}, dice),
        *_choose("python", library, {"expression": _expressions, "rest": _rests, "line": _lines}, dice),
    ]


def _choose(
    source: str, texts: list[str], kinds: dict[str, Callable[[str], Iterator[Span]]], dice: random.Random
) -> Iterator[Case]:
    left = dice.sample(texts, len(texts))
    for number in range(EACH):
        kind, spans_of = list(kinds.items())[number % len(kinds)]
        while not (spans := list(spans_of(text := left.pop()))):
            pass
        yield Case(source, kind, text, *dice.choice(spans))


def functions(text: str) -> Iterator[str]:
    """The functions and methods that compile by themselves and fall into one row."""
    for match in FUNCTION.finditer(text + "\n"):
        code = textwrap.dedent(match.group()).strip() + "\n"
        if 100 <= len(code) <= INFILL_LONGEST and code.isascii() and compiles(code):
            yield code


def compiles(code: str) -> bool:
    try:
        compile(code, "gap", "exec")
    except (SyntaxError, ValueError):
        return False
    return True


def _last_words(text: str) -> Iterator[Span]:
    """The last word or the last two of a sentence, up to its sign."""
    for match in re.finditer(r"(?<= )(?=(\w+(?: \w+)?)[.!?](?:\s|$))", text):
        yield match.span(1)


def _clauses(text: str) -> Iterator[Span]:
    """What follows a comma or a connecting word, up to the sign."""
    for match in re.finditer(r"(?:,|\b(?:and|but|because|so|that)) (\w[^.,!?\"\n]{7,38})(?=[.!?](?:\s|$))", text):
        yield match.span(1)


def _expressions(code: str) -> Iterator[Span]:
    """Expressions within one line: what is assigned or returned, arguments, conditions."""
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
    """From behind a space within a line to its end."""
    for match in _body(code):
        for space in re.finditer(r"(?<=\S) (?=\S)", match.group(1)):
            yield match.start(1) + space.end(), match.end(1)


def _lines(code: str) -> Iterator[Span]:
    for match in _body(code):
        yield match.span(1)


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
    """Fill every gap once, greedily; a row for each, and the sums."""
    model = llama_cpp.Llama(str(path), n_ctx=2048, n_threads=1, verbose=False)
    lines = ["| | kind | before | expected | found | after | exact | compiles |", "|---|---|---|---|---|---|---|---|"]
    exact = {"stories": 0, "python": 0}
    valid = 0
    for number, case in enumerate(chosen, 1):
        before, expected, after = case.parts
        found = fill(model, before, after)
        same = found == expected
        exact[case.source] += same
        good = case.source == "python" and compiles(before + found + after)
        valid += good
        cells = [_cell(text) for text in (before[-SHOWN:], expected, found, after[:SHOWN])]
        judged = "" if case.source == "stories" else _yes(good)
        lines.append(f"| {number} | {case.source}, {case.kind} | {' | '.join(cells)} | {_yes(same)} | {judged} |")
    lines += ["", f"Exact: stories {exact['stories']} of {EACH}, Python {exact['python']} of {EACH}. "]
    lines[-1] += f"Python that compiles: {valid} of {EACH}."
    return "\n".join(lines)


def fill(model: llama_cpp.Llama, before: str, after: str) -> str:
    """The most likely token each time, until the model ends the middle."""
    model.reset()
    found: list[int] = []
    prompt = [PREFIX, *ids_of(model, before), SUFFIX, *ids_of(model, after), MIDDLE]
    for token in model.generate(prompt, temp=0.0, repeat_penalty=1.0):
        if token == END or len(found) == LENGTH:
            break
        found.append(token)
    return model.detokenize(found).decode("utf-8", "replace")


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _cell(text: str) -> str:
    """Text as code within a table: newlines and bars made visible or harmless."""
    if not text:
        return ""
    shown = text.replace("\n", "⏎").replace("|", "\\|")
    marks = "``" if "`" in shown else "`"
    edge = " " if "`" in shown else ""
    return f"{marks}{edge}{shown}{edge}{marks}"
