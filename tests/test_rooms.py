"""The house rules: which room may know which, how large things may grow, and that the map shows real places."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "afterword"
FILES = sorted(SOURCE.rglob("*.py"))

MAY_IMPORT = {
    # room: the rooms of this package that it may import, besides itself and errors
    "api": {
        *("batch", "completion", "engine.protocol", "engine.roster", "engine.supervisor"),
        *("config", "keys", "log", "metrics", "traces", ""),
    },
    "batch": {"completion", "limits", "tasks"},
    "completion": {"engine.protocol", "limits"},
    "door": {"limits", "tasks"},
    "engine.protocol": set(),
    "engine.frames": {"engine.protocol"},
    "engine.pending": {"engine.protocol", "engine.tally"},
    "engine.process": {"engine.frames"},
    "engine.quarantine": {"engine.protocol"},
    "engine.tally": {"engine.protocol", "histogram"},
    "engine.texts": {"engine.frames", "engine.protocol"},
    "engine.tokenizing": {"engine.frames", "tasks"},
    "engine.watch": {"engine.frames"},
    "engine.supervisor": {
        *("engine.frames", "engine.pending", "engine.process", "engine.protocol"),
        *("engine.quarantine", "engine.tally", "engine.texts", "engine.watch", "limits", "tasks"),
    },
    "engine.roster": {"engine.protocol", "engine.supervisor", "engine.tally", "tasks"},
    "engine.child": {"engine.core", "engine.frames", "engine.protocol", "engine.tokenizing", "tasks"},
    "engine.compiled": set(),
    "engine.core": {"engine.compiled", "engine.protocol"},
    "engine.llama": {"engine.compiled", "engine.core", "engine.child", "engine.frames", "engine.protocol"},
    "models": set(),
    "keys": {"limits", "tasks"},
    "log": set(),
    "config": {"batch", "completion", "door", "engine.frames", "engine.protocol", "keys", "machine"},
    "errors": set(),
    "histogram": set(),
    "limits": set(),
    "machine": set(),
    "tasks": set(),
    "metrics": {"engine.protocol", "engine.tally", "histogram", ""},
    "traces": {"metrics", ""},
}
OUTSIDE = {
    # a library and the only rooms that may know it
    "llama_cpp": {"engine.llama"},
    "starlette": {"api"},
    "python_multipart": {"api"},
    "uvicorn": {"door"},
    "httptools": {"door"},
    "click": {"cli"},
    "httpx2": {"batch", "cli"},
    "sqlite3": {"batch", "keys"},
    "huggingface_hub": {"models"},
    "numpy": {"engine.core", "engine.llama"},
    "opentelemetry": {"traces"},
    "prometheus_client": {"metrics"},
}


def room(module: str) -> str:
    """The room of a module: the longest of the names above that it lies in; else its first part."""
    known = [name for name in MAY_IMPORT if module == name or module.startswith(name + ".")]
    return max(known, key=len, default=module.split(".", maxsplit=1)[0])


def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_room_imports_only_what_it_may_know(path):
    here = room(module_of(path))
    for name in imports(path):
        package, _, inner = name.partition(".")
        if package in OUTSIDE:
            assert here in OUTSIDE[package], f"{here} must not know {package}"
        if package == "afterword" and here in MAY_IMPORT:
            there = room(inner) if inner != "__version__" else ""
            allowed = MAY_IMPORT[here] | {here, "errors"}
            assert there in allowed, f"{here} must not know {there} ({name})"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_files_and_functions_stay_small_and_say_what_they_are(path):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert text.count("\n") <= 400
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 80, f"{path}: {node.name} is too long"


def test_the_map_names_places_that_exist():
    text = (ROOT / "docs" / "trace.md").read_text(encoding="utf-8")
    places = re.findall(r"`((?:src|tests)/[\w/.-]+\.py)(?::(\w+(?:\.\w+)?))?`", text)
    assert len(places) >= 10
    for file, name in places:
        path = ROOT / file
        assert path.is_file(), f"docs/trace.md names {file}"
        if name:
            assert re.search(rf"\b(?:def|class) {name.split('.')[-1]}\b", path.read_text(encoding="utf-8")), name


def test_every_file_of_the_request_path_is_on_the_map():
    text = (ROOT / "docs" / "trace.md").read_text(encoding="utf-8")
    on_the_path = [path for path in FILES if room(module_of(path)) != "models" and path.name != "__init__.py"]
    missing = [str(path.relative_to(ROOT)) for path in on_the_path if str(path.relative_to(ROOT)) not in text]
    assert not missing


def test_the_repository_speaks_of_itself_alone():
    """No paths of one machine and no package hosts in what is shipped."""
    places = [*FILES, *(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md"), *ROOT.glob("*.txt"), ROOT / "Makefile"]
    for path in places:
        found = re.search(r"/(?:work|tmp|root|home)/\w+|pypi\.org|pythonhosted", path.read_text(encoding="utf-8"))
        assert not found, f"{path}: {found and found.group()}"
