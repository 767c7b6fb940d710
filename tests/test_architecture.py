"""Rules about the source: which package may import which, how large files and functions are, which names are unique."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "afterword"
FILES = sorted(SOURCE.rglob("*.py"))

_TOKENIZE = {"engine.messages", "engine.protocol"}
MAY_IMPORT: dict[str, set[str]] = {
    # package or module: the others that it may import, besides itself and `errors`. "" is the version.
    "": set(),
    "errors": set(),
    "system": set(),
    "settings": set(),
    "models": {"system"},
    "observability": set(),
    "observability.key_counters": set(),
    "observability.metrics": {
        *("engine.protocol", "engine.parent.engine_metrics", "observability", "observability.key_counters", ""),
    },
    "observability.traces": {"observability.metrics", ""},
    "keys": {"settings", "system"},
    "transport": {"settings", "system", "transport.body_writer"},
    "transport.body_writer": set(),
    "completion": {"engine.draft", "engine.most_sampled", "engine.protocol", "engine.token_row", "settings"},
    "batch": {"completion", "settings", "system"},
    "config": {"batch", "completion", "transport", "engine.messages", "engine.protocol", "keys", "system"},
    "engine": set(),
    "engine.draft": set(),
    "engine.most_sampled": {"engine.protocol"},
    "engine.protocol": {"engine.token_row"},
    "engine.store_stats": {"engine.protocol"},
    "engine.token_row": set(),
    "engine.messages": {"engine.protocol", "engine.store_stats"},
    "engine.kernels": set(),
    "engine.core": {
        *("engine.draft", "engine.kernels", "engine.most_sampled", "engine.protocol", "engine.token_row"),
        "engine.core.fair_share",
    },
    "engine.parent.pending_job": {"engine.most_sampled", "engine.protocol", "engine.parent.engine_metrics"},
    "engine.parent.job_queue": {
        *("engine.protocol", "engine.parent.engine_metrics", "engine.parent.pending_job", "settings"),
    },
    "engine.parent.managed_engine": {"engine.protocol", "engine.parent.engine_metrics"},
    "engine.parent.worker_process": {"engine.messages"},
    "engine.parent.quarantine": {"engine.protocol"},
    "engine.parent.engine_metrics": {"engine.protocol", "engine.store_stats", "observability"},
    "engine.parent.tokenizer_client": _TOKENIZE,
    "engine.parent.restart_policy": set(),
    "engine.parent.watchdog": {"engine.messages"},
    "engine.parent.supervisor": {
        *("engine.messages", "engine.protocol", "engine.parent.engine_metrics", "engine.parent.pending_job"),
        *(
            "engine.parent.job_queue",
            "engine.parent.managed_engine",
            "engine.parent.quarantine",
            "engine.parent.restart_policy",
            "engine.parent.tokenizer_client",
            "engine.parent.watchdog",
        ),
        *("engine.parent.worker_process", "system"),
    },
    "engine.parent.model_manager": {
        *("engine.protocol", "engine.parent.engine_metrics", "engine.parent.managed_engine"),
        *("engine.parent.job_queue", "system"),
    },
    "engine.parent": set(),
    "engine.replicas": {
        *("engine.messages", "engine.protocol", "engine.parent.engine_metrics", "engine.parent.managed_engine"),
        *("engine.parent.pending_job", "engine.parent.job_queue", "engine.parent.tokenizer_client", "system"),
        "engine.replicas.routing",
    },
    "engine.replicas.routing": set(),
    "engine.worker.tokenizer_threads": {"engine.messages", "system"},
    "engine.grammar": {"engine.core", "engine.protocol"},
    "engine.worker.parent_process": set(),
    "engine.worker": {
        "engine.store_stats",
        *("engine.core", "engine.grammar", "engine.worker.tokenizer_threads", "engine.worker.parent_process", "system"),
        *_TOKENIZE,
    },
    "engine.store": {"engine.core", "engine.protocol", "engine.store_stats", "system"},
    "engine.llama": {
        "engine.store_stats",
        *("engine.kernels", "engine.core", "engine.store", "engine.worker", "system"),
        *("engine.llama.infill_families", "engine.llama.model_files"),
        *_TOKENIZE,
    },
    "engine.llama.infill_families": {"engine.protocol"},
    "engine.llama.model_files": set(),
    "engine.core.fair_share": {"engine.protocol"},
    # in the environment of vLLM, which has msgspec and numpy, but not the libraries of the server
    "engine.vllm": {
        "engine.token_row",
        *("engine.worker.tokenizer_threads", "engine.worker.parent_process", "engine.core.fair_share", "system"),
        *("engine.llama.infill_families", "engine.llama.model_files", "engine.vllm.model_folder"),
        *_TOKENIZE,
    },
    "engine.vllm.program": {"engine.parent.worker_process"},
    # in the server's environment
    "engine.http": {
        *("engine.vllm", "engine.vllm.model_folder", "engine.llama.model_files", "system"),
        *_TOKENIZE,
    },
    "engine.http.program": {"engine.parent.worker_process"},
    "engine.vllm.model_folder": set(),
    "api": {
        *("batch", "completion", "engine.protocol", "engine.parent.model_manager", "engine.parent.supervisor"),
        "engine.parent.managed_engine",
        *("config", "keys", "observability", "observability.metrics", "observability.traces", ""),
        "transport.body_writer",
    },
    "cli": {
        "engine.token_row",
        *("api", "batch", "completion", "config", "engine.kernels", "engine.messages"),
        *("engine.parent.model_manager", "engine.parent.job_queue", "engine.parent.supervisor"),
        *("engine.parent.worker_process", "engine.vllm.program", "engine.vllm.model_folder", "engine.http.program"),
        *("engine.replicas", "engine.replicas.routing"),
        *("engine.protocol", "keys", "models", "observability", "observability.metrics", "observability.traces"),
        *("settings", "system", "transport", ""),
    },
    "__main__": {"cli"},
}
OUTSIDE = {
    # a library and the only packages that may import it
    "llama_cpp": set(),  # engine.llama loads the library in it, with declarations of its own
    "starlette": {"api", "cli.ray_serve"},
    "python_multipart": {"api"},
    "uvicorn": {"transport"},
    "httptools": {"transport"},
    "click": {"cli"},
    "httpx2": {"batch", "cli", "engine.http", "engine.http.program"},
    "sqlite3": {"batch", "keys"},
    "huggingface_hub": {"models"},
    "numpy": {"engine.core", "engine.grammar", "engine.llama"},
    "llguidance": {"engine.grammar"},
    "tokenizers": {"engine.http", "engine.vllm"},
    "torch": {"engine.vllm"},
    "vllm": {"engine.vllm"},
    "ray": {"cli"},
    "yaml": {"cli"},
    "opentelemetry": {"observability.traces"},
    "prometheus_client": {"observability.key_counters", "observability.metrics"},
}


def package_of(module: str) -> str:
    """The longest name in `MAY_IMPORT` that is the module or a package around it; else the module itself."""
    known = [name for name in MAY_IMPORT if module == name or module.startswith(name + ".")]
    return max(known, key=len, default=module)


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
def test_a_package_imports_only_what_the_table_allows(path: Path) -> None:
    here = package_of(module_of(path))
    assert here in MAY_IMPORT, f"{here} is not in the table"
    for name in imports(path):
        library, _, inner = name.partition(".")
        if library in OUTSIDE:
            assert here in OUTSIDE[library], f"{here} must not import {library}"
        if library == "afterword":
            there = package_of(inner) if inner != "__version__" else ""
            assert there in MAY_IMPORT[here] | {here, "errors"}, f"{here} must not import {there} ({name})"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_files_and_functions_are_small_and_files_have_a_docstring(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert text.count("\n") <= 400
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 80, f"{path}: {node.name} is too long"


def test_a_public_class_name_is_defined_once() -> None:
    modules = defaultdict(list)
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                modules[node.name].append(module_of(path))
    assert not {name: places for name, places in modules.items() if len(places) > 1}


def test_the_story_of_a_request_names_files_that_exist() -> None:
    text = (ROOT / "docs" / "trace.md").read_text(encoding="utf-8")
    places = re.findall(r"`((?:src|tests)/[\w/.-]+\.\w+)(?::(\w+(?:\.\w+)?))?`", text)
    assert len(places) >= 10
    for file, name in places:
        path = ROOT / file
        assert path.is_file(), f"docs/trace.md names {file}"
        if name:
            assert re.search(rf"\b(?:def|class) {name.split('.')[-1]}\b", path.read_text(encoding="utf-8")), name


def test_the_repository_names_no_paths_of_one_machine_and_no_package_hosts() -> None:
    places = [*FILES, *(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md"), *ROOT.glob("*.txt"), ROOT / "Makefile"]
    for path in places:
        found = re.search(r"/(?:work|tmp|root|home)/\w+|pypi\.org|pythonhosted", path.read_text(encoding="utf-8"))
        assert not found, f"{path}: {found and found.group()}"
