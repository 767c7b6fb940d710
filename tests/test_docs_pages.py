"""The documents as a whole: every page can be reached, every link has a target, every limit is documented."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from afterword.cli import main

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("tests/*/README.md"), *DOCS.rglob("*.md")})
LINK = re.compile(r"""(?:\]\(|src(?:set)?=")([^)"\s]+)""")


def links(page: Path) -> list[str]:
    """Where a page's links lead, without its blocks of code."""
    text = re.sub(r"(?ms)^ *```.*?^ *```$|`[^`\n]*`", "", page.read_text(encoding="utf-8"))
    return [link for link in LINK.findall(text) if not link.startswith(("http:", "https:"))]


def anchors(page: Path) -> set[str]:
    """The names that a heading has as the end of an address, as code hosts make them."""
    heads = re.findall(r"(?m)^#+ (.+)$", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_index_names_every_page_in_a_sentence() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    sentences = dict(re.findall(r"(?m)^- \[[^\]]+\]\(([^)]+)\): (.+)$", index))
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")} - {"README.md"}
    assert not pages - set(sentences)
    assert min(len(sentences[page].split()) for page in pages) > 2


def test_the_index_of_decisions_has_every_record_with_its_date() -> None:
    index = (DOCS / "decisions.md").read_text(encoding="utf-8")
    listed = re.findall(r"(?m)^- (\S+) \[(.+)\]\(decisions/(\S+\.md)#", index)
    records = [
        (date, title, page.name)
        for page in sorted((DOCS / "decisions").glob("*.md"))
        for title, date in re.findall(r"(?m)^## (.+)\n\n(\d{4}-\d\d-\d\d)?", page.read_text(encoding="utf-8"))
    ]
    assert len(records) > 100
    assert sorted(listed) == sorted(records)


def test_every_limit_has_a_row_in_limits_md_with_its_value() -> None:
    page = (DOCS / "limits.md").read_text(encoding="utf-8")
    listed = CliRunner().invoke(main, ["serve", "--print-limits"]).output
    names = re.findall(r"(?m)^(\w+) +\S", listed)
    assert len(names) > 20
    assert not [name for name in names if f"`{name}`" not in page]


def test_the_readme_has_two_commands_to_set_up() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"(?m)^make .*$", text) == ["make serve", "make test"]
