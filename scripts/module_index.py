"""`python scripts/module_index.py [--write]`: generate the list of all source files with their first sentences.

It prints the page, or writes docs/modules.md with `--write`. The sentence of a Python file comes from its docstring,
that of a C++ or JavaScript file from the comment at its top. The sentence of a folder comes from its `__init__.py`, or
from the comment at the top of its `index.html`. `tests/test_module_index.py` fails if the page is old.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "afterword"
PAGE = ROOT / "docs" / "modules.md"
SUFFIXES = {".py", ".cpp", ".hpp", ".js"}
HEADER = """# Source files

Every file of `src/afterword` with its first sentence, by package. [trace.md](trace.md) follows one request through the
important ones; `tests/test_architecture.py` states which package may import which. This page is generated:
`python scripts/module_index.py --write`.
"""


def main() -> None:
    """Print the page or write it."""
    parser = argparse.ArgumentParser(description="List all source files with their first sentences.")
    parser.add_argument("--write", action="store_true", help="write docs/modules.md instead of printing it")
    page = index()
    if parser.parse_args().write:
        PAGE.write_text(page, encoding="utf-8")
    else:
        print(page, end="")


def index() -> str:
    """The whole page."""
    files = sorted((path for path in SOURCE.rglob("*") if path.suffix in SUFFIXES), key=_order)
    return HEADER + "".join(_section(folder, group) for folder, group in groupby(files, lambda path: path.parent))


def first_sentence(path: Path) -> str:
    """The first sentence of a file's docstring or top comment, on one line. Empty without one."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        prose = ast.get_docstring(ast.parse(text)) or ""
    elif path.suffix == ".html":
        found = re.match(r"<!doctype html>\n<!-- (.+?) -->\n", text, re.DOTALL)
        prose = found[1] if found else ""
    else:
        comment = re.match(r"(?://[^\n]*\n)+", text)
        prose = re.sub(r"(?m)^// ?", "", comment[0]) if comment else ""
    paragraph = " ".join(prose.split("\n\n")[0].split())
    return re.split(r"(?<=[.:])\s(?=[A-Z`])", paragraph)[0].rstrip(":")


def _order(path: Path) -> tuple[str, bool, str]:
    return path.parent.relative_to(SOURCE).as_posix(), path.name != "__init__.py", path.name


def _section(folder: Path, files: Iterator[Path]) -> str:
    name = folder.relative_to(SOURCE.parent).as_posix()
    rows = []
    page = folder / "index.html"
    about = first_sentence(page) if page.exists() else ""
    for path in files:
        if path.name == "__init__.py":
            about = first_sentence(path)
        else:
            link = f"[{path.name}](../{path.relative_to(ROOT).as_posix()})"
            rows.append(f"| {link} | {first_sentence(path).replace('|', chr(92) + '|')} |\n")
    if not rows:
        return ""
    return f"\n## {name}\n\n{about}\n\n| file | |\n|---|---|\n{''.join(rows)}".replace("\n\n\n", "\n\n")


if __name__ == "__main__":
    main()
