"""The reference is complete: whatever a caller can send or be told stands in it."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest

from afterword.api.app import GUARDED, OPEN
from afterword.completion.fields import StreamOptions
from afterword.completion.request import EXTENSIONS, FIELDS

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
SOURCES = [ROOT / "src/afterword/errors.py", *(ROOT / "src/afterword").glob("[ac]*/*.py")]


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


@pytest.mark.parametrize("route", [*OPEN, *GUARDED], ids=lambda route: route.path)
def test_every_route_is_explained(route):
    assert route.path.replace("{model:path}", "{id}") in REFERENCE


def test_codes_are_found_where_they_are():
    """The checks above can fail: they see the codes that exist."""
    assert {"model_not_found", "invalid_type", "unknown_url", "empty_array"} <= keyword_values("code")
    assert {400, 401, 404, 413, 500, 503} <= keyword_values("status")
