"""`python scripts/plain_words.py [--list]`: count riddle-like words in documents and comments.

It prints the words per 1,000 words of (a) the documents, (b) the comments and docstrings of Python files in `src/` and
`tests/`, and (c) the comments of C++ and JavaScript files. `--list` also prints each occurrence. It reads
only files that git tracks. It skips code: fenced blocks in documents, and words between backquotes.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COUNTED = re.compile(
    r"\b(?:who|whom|whoever|whose|whatever|whichever|told|tell|tells|nobody|somebody|anybody|what\s+is|of\s+our\s+own)\b",
    re.IGNORECASE,
)
WORD = re.compile(r"[A-Za-z][A-Za-z'’-]*")
CODE = re.compile(r"`[^`\n]*`")
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'|`(?:\\.|[^`\\])*`", re.DOTALL)

Passage = tuple[int, str]
"""The line number at which a piece of prose begins, and the prose."""


def of_document(text: str) -> Iterator[Passage]:
    """Return the whole document as one passage, with empty lines in place of fenced blocks."""
    yield 1, re.sub(r"(?ms)^ *```.*?^ *```", lambda block: "\n" * block.group().count("\n"), text)


def of_python(text: str) -> Iterator[Passage]:
    """Return each docstring and each block of consecutive comments as one passage."""
    for node in ast.walk(ast.parse(text)):
        match node:  # includes strings that document a constant
            case ast.Expr(value=ast.Constant(value=str(docstring))):
                yield node.lineno, docstring
    first, last, lines = 0, 0, list[str]()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT:
            continue
        if token.start[0] != last + 1:
            yield first, "\n".join(lines)
            first, lines = token.start[0], []
        last = token.start[0]
        lines.append(token.string.lstrip("#"))
    yield first, "\n".join(lines)


def of_c(text: str) -> Iterator[Passage]:
    """Return each block of consecutive C++ or JavaScript comments as one passage."""
    first, end, parts = 1, 0, list[str]()
    for found in COMMENT.finditer(text):
        if found.group()[:2] not in ("//", "/*"):
            continue
        if text[end : found.start()].strip():
            yield first, "\n".join(parts)
            first, parts = text.count("\n", 0, found.start()) + 1, []
        end = found.end()
        parts.append(found.group().strip("/*"))
    yield first, "\n".join(parts)


GROUPS: tuple[tuple[str, tuple[str, ...], Callable[[str], Iterator[Passage]]], ...] = (
    ("documents", ("*.md",), of_document),
    ("Python comments and docstrings", ("src/*.py", "tests/*.py"), of_python),
    ("C++ and JavaScript comments", ("*.cpp", "*.hpp", "*.c", "*.h", "*.js", "*.mjs", "*.cjs"), of_c),
)


def tracked(patterns: tuple[str, ...]) -> list[str]:
    """The files that git tracks, as paths relative to the root of the repository."""
    command = ["git", "ls-files", "-z", "--", *patterns]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def main() -> None:
    """Print three figures, and with `--list` each occurrence."""
    parser = argparse.ArgumentParser(description="Words such as who, told and nobody per 1,000 words.")
    parser.add_argument("--list", action="store_true", help="print each occurrence as path:line: text")
    options = parser.parse_args()
    for group, patterns, passages in GROUPS:
        words = hits = 0
        for name in tracked(patterns):
            for first, prose in passages((ROOT / name).read_text(encoding="utf-8")):
                text = CODE.sub("", prose)
                words += len(WORD.findall(text))
                for found in COUNTED.finditer(text):
                    hits += 1
                    if options.list:
                        number = text.count("\n", 0, found.start())
                        print(f"{name}:{first + number}: {prose.splitlines()[number].strip()}")
        print(f"{1000 * hits / max(words, 1):5.1f} per 1,000 words of {group} ({hits} of {words:,})")


if __name__ == "__main__":
    main()
