"""What other programs have put on the disk: Ollama's store and LM Studio's.

Knows their layouts and reads what they wrote; believes none of it, and changes nothing.

Ollama: `manifests/HOST/NAMESPACE/NAME/TAG` (or, newer, under `manifests-v2`) is JSON that names layers by their digest,
or lists further such manifests; the layer of weights is a GGUF file, `blobs/sha256-…`.
LM Studio: `PUBLISHER/REPOSITORY/….gguf`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afterword.models.file_names import model_files
from afterword.models.gguf_facts import part_names, split_stem
from afterword.models.gguf_header import describe_broken_link

_WEIGHTS = "application/vnd.ollama.image.model"
_ADAPTER = "application/vnd.ollama.image.adapter"
_HOSTS, _NAMESPACE = ("registry.ollama.ai", "ollama.com"), "library"  # left out of names
_SERVICE = Path("/usr/share/ollama/.ollama/models")  # where Ollama keeps them when it runs as a system's service
_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")
_LARGEST = 2**20  # bytes of a manifest


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model in a store, by the name that it has there; or why it cannot be used. `path` is its (first) file."""

    name: str
    path: Path
    problem: str | None = None


def ollama() -> list[StoredModel]:
    """Every model of Ollama's, by its name and tag."""
    found: dict[str, StoredModel] = {}
    for folder in _ollama_folders():
        for manifests in (folder / "manifests-v2", folder / "manifests"):
            for path in sorted(_files(manifests)):
                places = path.relative_to(manifests).parts
                if len(places) == len(("host", "namespace", "name", "tag")):
                    name = _ollama_name(*places)
                    found.setdefault(name, _ollama_model(folder, path, name))
    return list(found.values())


def lmstudio() -> list[StoredModel]:
    """Every model of LM Studio's: publisher, repository and file without its ending."""
    found: dict[str, StoredModel] = {}
    for folder in (Path("~/.lmstudio/models").expanduser(), Path("~/.cache/lm-studio/models").expanduser()):
        files = [path.relative_to(folder).as_posix() for path in _files(folder)]
        for name in model_files(files):
            parent, _, file = name.rpartition("/")
            if parent.count("/") >= 1:  # else it is nobody's
                model = StoredModel(f"{parent}/{split_stem(file)}", folder / name, _missing_part(folder, name))
                found.setdefault(model.name, model)
    return list(found.values())


def _ollama_folders() -> list[Path]:
    named = os.environ.get("OLLAMA_MODELS")
    return [Path(named).expanduser()] if named else [Path("~/.ollama/models").expanduser(), _SERVICE]


def _ollama_model(folder: Path, manifest: Path, name: str) -> StoredModel:
    """The model that a manifest describes."""
    choices = [layers for layers in _manifests(folder, manifest) if _digest(layers, _WEIGHTS)]
    if not choices:
        return StoredModel(name, manifest, f"{manifest} names no GGUF file.")
    blob = folder / "blobs" / str(_digest(choices[0], _WEIGHTS))
    if _digest(choices[0], _ADAPTER):
        return StoredModel(name, blob, "It has a LoRA adapter beside its weights, and would answer without it.")
    return StoredModel(name, blob, None if blob.is_file() else f"{blob} is missing; run `ollama pull {name}`.")


def _ollama_name(host: str, namespace: str, name: str, tag: str) -> str:
    """What Ollama calls it."""
    places = [] if host in _HOSTS else [host]
    places += [] if namespace == _NAMESPACE and not places else [namespace]
    return f"{'/'.join([*places, name])}:{tag}"


def _manifests(folder: Path, path: Path) -> Iterator[list[dict[str, Any]]]:
    """The layers in a manifest; where it lists others, one for each program that may run the model, those of each."""
    content = _json(path)
    yield _objects(content.get("layers"))
    for child in _objects(content.get("manifests")):
        blob = _blob(child.get("digest"))
        listed = _json(folder / "blobs" / blob) if blob and "layers" not in child else child
        yield _objects(listed.get("layers"))


def _digest(layers: list[dict[str, Any]], kind: str) -> str | None:
    """The name of the file that is the layer of some kind."""
    names = (_blob(layer.get("digest")) for layer in layers if layer.get("mediaType") == kind)
    return next((name for name in names if name), None)


def _blob(digest: object) -> str | None:
    """The name of the file with that digest."""
    found = _DIGEST.fullmatch(digest.lower()) if isinstance(digest, str) else None
    return f"sha256-{found[1]}" if found else None


def _json(path: Path) -> dict[str, Any]:
    """An object in a file; an empty one if there is none."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if path.stat().st_size <= _LARGEST:
            content = json.loads(path.read_bytes())
            return content if isinstance(content, dict) else {}
    return {}


def _objects(value: object) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _missing_part(folder: Path, name: str) -> str | None:
    missing = [part for part in part_names(name) if not (folder / part).is_file()]
    return f"{folder / missing[0]} {describe_broken_link(folder / missing[0]) or 'is missing'}." if missing else None


def _files(folder: Path) -> Iterator[Path]:
    """Everything under a folder that is no folder; nothing of what may not be read."""
    for place, folders, names in os.walk(folder):
        folders.sort()
        yield from (Path(place) / name for name in names if not name.startswith("."))
