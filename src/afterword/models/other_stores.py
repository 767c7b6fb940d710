"""Lists the models that Ollama and LM Studio have downloaded.

The module only reads their folders, validates everything it reads, and changes nothing. The layouts are:

- Ollama: `manifests/HOST/NAMESPACE/NAME/TAG` (newer: `manifests-v2/…`) is a JSON file. It names layers by their digest,
  or lists further manifests. The layer with the weights is a GGUF file, `blobs/sha256-…`.
- LM Studio: `PUBLISHER/REPOSITORY/….gguf`.
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
_HOSTS, _NAMESPACE = ("registry.ollama.ai", "ollama.com"), "library"  # the defaults, which names omit
_SERVICE = Path("/usr/share/ollama/.ollama/models")  # the folder of Ollama when it runs as a system service
_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")
_LARGEST = 2**20  # bytes; larger manifests are ignored


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model in a store. `name`: its name in that store. `path`: its first file. `problem`: why it is unusable."""

    name: str
    path: Path
    problem: str | None = None


def ollama() -> list[StoredModel]:
    """All models in Ollama's store, named `name:tag`."""
    found: dict[str, StoredModel] = {}
    for folder in _ollama_folders():
        for manifests in (folder / "manifests-v2", folder / "manifests"):
            for path in sorted(_files(manifests)):
                parts = path.relative_to(manifests).parts
                if len(parts) == len(("host", "namespace", "name", "tag")):
                    name = _ollama_name(*parts)
                    found.setdefault(name, _ollama_model(folder, path, name))
    return list(found.values())


def lmstudio() -> list[StoredModel]:
    """All models in LM Studio's store, named `publisher/repository/file` without the suffix `.gguf`."""
    found: dict[str, StoredModel] = {}
    for folder in (Path("~/.lmstudio/models").expanduser(), Path("~/.cache/lm-studio/models").expanduser()):
        files = [path.relative_to(folder).as_posix() for path in _files(folder)]
        for name in model_files(files):
            parent, _, file = name.rpartition("/")
            if parent.count("/") >= 1:  # a file that is not in PUBLISHER/REPOSITORY is no model of LM Studio
                model = StoredModel(f"{parent}/{split_stem(file)}", folder / name, _missing_part(folder, name))
                found.setdefault(model.name, model)
    return list(found.values())


def _ollama_folders() -> list[Path]:
    named = os.environ.get("OLLAMA_MODELS")
    return [Path(named).expanduser()] if named else [Path("~/.ollama/models").expanduser(), _SERVICE]


def _ollama_model(folder: Path, manifest: Path, name: str) -> StoredModel:
    """The model of a manifest file."""
    choices = [layers for layers in _manifests(folder, manifest) if _digest(layers, _WEIGHTS)]
    if not choices:
        return StoredModel(name, manifest, f"{manifest} names no GGUF file.")
    blob = folder / "blobs" / str(_digest(choices[0], _WEIGHTS))
    if _digest(choices[0], _ADAPTER):
        return StoredModel(name, blob, "It has a LoRA adapter, which Afterword would ignore.")
    return StoredModel(name, blob, None if blob.is_file() else f"{blob} is missing; run `ollama pull {name}`.")


def _ollama_name(host: str, namespace: str, name: str, tag: str) -> str:
    """The model's name in Ollama's commands."""
    prefix = [] if host in _HOSTS else [host]
    prefix += [] if namespace == _NAMESPACE and not prefix else [namespace]
    return f"{'/'.join([*prefix, name])}:{tag}"


def _manifests(folder: Path, path: Path) -> Iterator[list[dict[str, Any]]]:
    """The layers of a manifest. If it lists further manifests (one for each runner), the layers of each of them."""
    content = _json(path)
    yield _objects(content.get("layers"))
    for child in _objects(content.get("manifests")):
        blob = _blob(child.get("digest"))
        listed = _json(folder / "blobs" / blob) if blob and "layers" not in child else child
        yield _objects(listed.get("layers"))


def _digest(layers: list[dict[str, Any]], kind: str) -> str | None:
    """The file name of the first layer of a media type, None if there is none."""
    names = (_blob(layer.get("digest")) for layer in layers if layer.get("mediaType") == kind)
    return next((name for name in names if name), None)


def _blob(digest: object) -> str | None:
    """The name of the file with a digest, None if the digest is malformed."""
    found = _DIGEST.fullmatch(digest.lower()) if isinstance(digest, str) else None
    return f"sha256-{found[1]}" if found else None


def _json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if the file is missing, too large or not a JSON object."""
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
    """All files below a folder, except hidden files and folders without read permission."""
    for parent, folders, names in os.walk(folder):
        folders.sort()
        yield from (Path(parent) / name for name in names if not name.startswith("."))
