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
        *("batch", "completion", "engine.protocol", "engine.parent.model_manager", "engine.parent.supervisor"),
        *("config", "keys", "observability.request_log", "observability.metrics", "observability.traces", ""),
    },
    "batch": {"completion", "settings.limit_table", "system.tasks"},
    "completion": {"engine.protocol", "settings.limit_table"},
    "transport": {"settings.limit_table", "system.tasks"},
    "engine.protocol": set(),
    "engine.messages": {"engine.protocol"},
    "engine.parent.pending_job": {"engine.protocol", "engine.parent.engine_metrics"},
    "engine.parent.worker_process": {"engine.messages"},
    "engine.parent.quarantine": {"engine.protocol"},
    "engine.parent.engine_metrics": {"engine.protocol", "observability.histogram"},
    "engine.parent.tokenizer_client": {"engine.messages", "engine.protocol"},
    "engine.worker.tokenizer_threads": {"engine.messages", "system.tasks"},
    "engine.parent.watchdog": {"engine.messages"},
    "engine.parent.supervisor": {
        *("engine.messages", "engine.parent.pending_job", "engine.parent.worker_process", "engine.protocol"),
        *(
            "engine.parent.quarantine",
            "engine.parent.engine_metrics",
            "engine.parent.tokenizer_client",
            "engine.parent.watchdog",
            "settings.limit_table",
            "system.tasks",
        ),
    },
    "engine.parent.model_manager": {
        "engine.protocol",
        "engine.parent.supervisor",
        "engine.parent.engine_metrics",
        "system.tasks",
    },
    "engine.worker.worker_main": {
        "engine.core",
        "engine.messages",
        "engine.protocol",
        "engine.worker.tokenizer_threads",
        "system.tasks",
    },
    "engine.kernels.compiled": set(),
    "engine.core": {"engine.kernels.compiled", "engine.protocol"},
    "engine.llama": {
        "engine.kernels.compiled",
        "engine.core",
        "engine.worker.worker_main",
        "engine.messages",
        "engine.protocol",
    },
    "models": set(),
    "keys": {"settings.limit_table", "system.tasks"},
    "observability.request_log": set(),
    "config": {"batch", "completion", "transport", "engine.messages", "engine.protocol", "keys", "system.resources"},
    "errors": set(),
    "observability.histogram": set(),
    "settings.limit_table": set(),
    "system.resources": set(),
    "system.tasks": set(),
    "observability.metrics": {"engine.protocol", "engine.parent.engine_metrics", "observability.histogram", ""},
    "observability.traces": {"observability.metrics", ""},
}
OUTSIDE = {
    # a library and the only rooms that may know it
    "llama_cpp": {"engine.llama"},
    "starlette": {"api"},
    "python_multipart": {"api"},
    "uvicorn": {"transport"},
    "httptools": {"transport"},
    "click": {"cli"},
    "httpx2": {"batch", "cli"},
    "sqlite3": {"batch", "keys"},
    "huggingface_hub": {"models"},
    "numpy": {"engine.core", "engine.llama"},
    "opentelemetry": {"observability.traces"},
    "prometheus_client": {"observability.metrics"},
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
