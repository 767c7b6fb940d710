"""docs/api.md is complete: every field that a client can send or receive is in it."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest

from afterword.api.app import PROTECTED_ROUTES, PUBLIC_ROUTES
from afterword.api.responses import rate_limit_headers
from afterword.completion.object_fields import StreamOptions
from afterword.completion.request import EXTENSIONS, FIELDS

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
SOURCES = [ROOT / "src/afterword/errors.py", *(ROOT / "src/afterword").glob("[abckt]*/**/*.py")]


def keyword_values(name: str) -> set[object]:
    """Constants that the source passes as this keyword or sets under this name."""
    found: set[object] = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.keyword(arg=arg, value=ast.Constant(value=value)) if arg == name:
                    found.add(value)
                case ast.Assign(targets=[ast.Name(id=target)], value=ast.Constant(value=value)) if target == name:
                    found.add(value)
    return found - {None}


@pytest.mark.parametrize("name", [*FIELDS, *EXTENSIONS, *(field.name for field in fields(StreamOptions))])
def test_every_field_is_explained(name):
    assert re.search(rf"`(stream_options\.)?{name}`", REFERENCE)


@pytest.mark.parametrize("code", sorted(map(str, keyword_values("code"))))
def test_every_error_code_is_explained(code):
    assert f"`{code}`" in REFERENCE


@pytest.mark.parametrize("code", [f"{k}_{e}_value" for k in ("integer", "decimal") for e in ("below_min", "above_max")])
def test_every_range_code_is_explained(code):
    assert f"`{code}`" in REFERENCE


@pytest.mark.parametrize("status", sorted(keyword_values("status") | {405}, key=str))
def test_every_status_is_explained(status):
    assert f"| {status} |" in REFERENCE


@pytest.mark.parametrize("route", [*PUBLIC_ROUTES, *PROTECTED_ROUTES], ids=lambda route: route.path)
def test_every_route_is_explained(route):
    assert route.path.replace("{model:path}", "{id}") in REFERENCE


@pytest.mark.parametrize("name", [*rate_limit_headers.HEADERS, "x-should-retry", "retry-after", "x-request-id"])
def test_every_header_is_explained(name):
    assert f"`{name}" in REFERENCE.lower()


def test_the_operators_page_ties_itself_to_what_exists():
    names = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "keys.md").read_text(encoding="utf-8")))
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(names) > 10
    assert not {name for name in names if f"def {name}(" not in tests}


def test_codes_are_found_where_they_are():
    """The checks above can fail: they see the codes that exist."""
    assert {"model_not_found", "invalid_type", "unknown_url", "empty_array"} <= keyword_values("code")
    assert {400, 401, 404, 413, 500, 503} <= keyword_values("status")


# ---- and every statement is tied to what shows it


def test_what_the_reference_ties_itself_to_exists():
    names = set(re.findall(r"`(test_\w+)`", REFERENCE))
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(names) > 30
    assert not {name for name in names if f"def {name}(" not in tests}


def test_every_conformance_case_is_tied_to_a_statement_and_every_number_is_a_case():
    cases = (ROOT / "tests/conformance/cases.py").read_text(encoding="utf-8")
    known = {int(number) for number in re.findall(r"@case\((\d+)", cases)}
    rows = [line.rsplit("|", 2)[1] for line in REFERENCE.splitlines() if line.startswith("|")]
    prose = re.findall(r"\(([\d, to]+)[,)]", REFERENCE)
    tied: set[int] = set()
    for place in (*rows, *prose):
        for first, last in re.findall(r"\b(\d+)(?: to (\d+))?\b", re.sub(r"`[^`]*`", "", place)):
            tied |= set(range(int(first), int(last or first) + 1))
    assert known - tied <= {
        18,
        71,
        74,
    }  # the official client, several choices at once, rate limits: no rule of their own
    assert tied <= known


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_every_extension_is_tied_to_a_test(extension):
    row = next(line for line in REFERENCE.splitlines() if line.startswith(f"| `{extension}`"))
    assert "`test_" in row
