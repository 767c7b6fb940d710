"""docs/modules.md lists every source file with its first sentence."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SPEC = importlib.util.spec_from_file_location("module_index", ROOT / "scripts" / "module_index.py")
assert SPEC is not None
assert SPEC.loader is not None
module_index = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(module_index)

PAGE = module_index.index()
FILES = sorted(path for path in module_index.SOURCE.rglob("*") if path.suffix in module_index.SUFFIXES)


def test_the_page_is_up_to_date() -> None:
    page = module_index.PAGE.read_text(encoding="utf-8")
    assert page == PAGE, "run python scripts/module_index.py --write"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(module_index.SOURCE).as_posix())
def test_each_file_is_listed_and_says_what_it_does(path: Path) -> None:
    assert module_index.first_sentence(path)
    if path.name != "__init__.py":
        assert f"(../{path.relative_to(ROOT).as_posix()})" in PAGE


def test_each_folder_says_what_it_has() -> None:
    sections = PAGE.split("\n## ")[1:]
    assert len(sections) > 15
    assert not [section for section in sections if re.match(r"\S+\n\n\| file", section)]
