"""What a spec means, and which models are already on this machine.

Knows folders and file names, and the layout of the Hub's cache; it opens no model and no connection.

    spec                        model
    (none), afterword-tiny      the built-in one
    hf:owner/repo               the best-suited file of a repository on the Hub
    hf:owner/repo:Q4_K_M        its file of this quantisation
    hf:owner/repo:file.gguf     this very file
    anything else               the path of a GGUF file
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from afterword.errors import SettingError
from afterword.models.gguf import is_later_part, part_names, split_stem

BUILTIN = "afterword-tiny"
PREFERRED = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "F16", "BF16")

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
FILE = re.compile(r'[^/\\:*?"<>|\x00-\x1f]+(/[^/\\:*?"<>|\x00-\x1f]+)*')
QUANT = re.compile(
    r"(?<![A-Za-z0-9])((?:UD-)?I?Q\d(?:_\w+)?|BF16|F16|F32|FP16|FP32|MXFP4|NVFP4|TQ\d_\d)(?![A-Za-z0-9])",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """The model that comes with Afterword."""


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file on the Hub, `wanted` by its quantisation or name; empty for the best of the repository."""

    repository: str
    wanted: str = ""

    def __str__(self) -> str:
        return f"hf:{self.repository}" + (f":{self.wanted}" if self.wanted else "")


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A GGUF file by its path."""

    path: Path


Spec = BuiltIn | HubFile | LocalFile


@dataclass(frozen=True, slots=True)
class Model:
    """A model on the disk: the name clients use for it, its (first) file, and where it came from."""

    id: str
    path: Path
    source: Literal["built-in", "hub", "file"]


def parse_spec(text: str | None) -> Spec:
    """What `text` names, whether or not it exists; SettingError if it can name nothing."""
    if text is None or text == BUILTIN:
        return BuiltIn()
    if not text.startswith("hf:"):
        if not text:
            raise SettingError("The model's name is empty.")
        return LocalFile(Path(os.path.expanduser(text)))
    repository, colon, wanted = text[3:].partition(":")
    if not REPOSITORY.fullmatch(repository) or ".." in repository or (colon and not is_safe(wanted)):
        raise SettingError(f"{text!r} does not name a model; write hf:owner/repo or hf:owner/repo:Q4_K_M.")
    return HubFile(repository, wanted)


def locate(spec: Spec) -> Model:
    """Find a model that is already on this machine; SettingError says what to do if it is not."""
    match spec:
        case BuiltIn():
            return _builtin()
        case HubFile():
            return _in_cache(spec)
        case LocalFile(path):
            if not os.path.isfile(path):  # unlike Path.is_file, it never raises
                raise SettingError(_missing(path))
            return Model(split_stem(path.name), path, "file")


def installed() -> list[Model]:
    """The built-in model and every model in the Hub's cache, one entry for each id."""
    models = [_builtin()] if builtin_path().is_file() else []
    for folder in sorted(cache_folder().glob("models--*--*")):
        repository = folder.name.removeprefix("models--").replace("--", "/", 1)
        found: dict[str, Model] = {}
        for snapshot in _snapshots(repository):
            names = _complete(snapshot)
            for name in names:
                model = _hub_model(repository, snapshot, name, names)
                found.setdefault(model.id, model)
        models += found.values()
    return models


def builtin_path() -> Path:
    """Where the built-in model lies when it is installed."""
    return Path(str(resources.files("afterword.models"))) / "builtin" / f"{BUILTIN}.gguf"


def cache_folder() -> Path:
    """The Hub's cache, wherever the environment puts it."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{home}/huggingface"
    hub = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    return Path(os.path.expandvars(hub)).expanduser()


def choose_file(names: Iterable[str], spec: HubFile) -> str:
    """The file among `names` that the spec means (of a split model, the first); SettingError if not one."""
    models = model_files(names)
    if not models:
        raise SettingError(f"{spec.repository} holds no GGUF model; look for a repository named …-GGUF.")
    found = _matching(models, spec.wanted)
    if len(found) == 1:
        return found[0]
    problem = "has several files that fit" if found else f"has no file that fits {spec.wanted!r}"
    listing = ", ".join(found or models)
    raise SettingError(f"{spec.repository} {problem}; write hf:{spec.repository}:FILE for one of: {listing}.")


def model_files(names: Iterable[str]) -> list[str]:
    """The language models among a repository's files: no projectors, calibration data or later parts."""
    return sorted(
        name
        for name in names
        if name.lower().endswith(".gguf")
        and is_safe(name)
        and not is_later_part(name)
        and not re.search("mmproj|imatrix", name.rpartition("/")[2], re.IGNORECASE)
    )


def is_safe(name: str) -> bool:
    """Whether a file name from outside stays inside the folder that it is joined to."""
    return FILE.fullmatch(name) is not None and ".." not in name


def _matching(models: Sequence[str], wanted: str) -> list[str]:
    if wanted.lower().endswith(".gguf"):
        return [name for name in models if wanted in (name, name.rpartition("/")[2])]
    if wanted:
        exact = [name for name in models if _quant(name).upper() == wanted.upper()]
        return exact or [name for name in models if wanted.lower() in name.lower()]
    for quant in PREFERRED:
        if found := [name for name in models if _quant(name) == quant]:
            return found
    return list(models)


def _quant(name: str) -> str:
    """The quantisation in a file's name, in capitals, or nothing."""
    found = QUANT.findall(name)
    return found[-1].upper().replace("FP16", "F16").replace("FP32", "F32") if found else ""


def _hub_model(repository: str, snapshot: Path, name: str, names: Sequence[str]) -> Model:
    quant = _quant(name)
    unique = quant and sum(_quant(other) == quant for other in names) == 1
    return Model(f"{repository}:{quant if unique else name}", snapshot / name, "hub")


def _builtin() -> Model:
    if not builtin_path().is_file():
        raise SettingError("The built-in model is missing; name another model, or reinstall Afterword.")
    return Model(BUILTIN, builtin_path(), "built-in")


def _in_cache(spec: HubFile) -> Model:
    for snapshot in _snapshots(spec.repository):
        names = _complete(snapshot)
        if _matching(names, spec.wanted):
            return _hub_model(spec.repository, snapshot, choose_file(names, spec), names)
    raise SettingError(f"{spec} is not on this machine; run `afterword pull {spec}` first.")


def _snapshots(repository: str) -> Iterator[Path]:
    """The repository's cached revisions, the current one first, then the newest."""
    folder = cache_folder() / f"models--{repository.replace('/', '--')}"
    main = folder / "refs" / "main"
    current = main.read_text().strip() if main.is_file() else ""
    snapshots = [path for path in folder.glob("snapshots/*") if path.is_dir()]
    yield from sorted(snapshots, key=lambda path: (path.name != current, -path.stat().st_mtime))


def _complete(snapshot: Path) -> list[str]:
    """The models in one revision of which every part is there."""
    names = (str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file())
    return [name for name in model_files(names) if all((snapshot / part).is_file() for part in part_names(name))]


def _missing(path: Path) -> str:
    if os.path.isdir(path):
        models = ", ".join(_models_in(path))
        return f"{path} is a folder; " + (f"name a file in it: {models}." if models else "it holds no GGUF model.")
    if close := difflib.get_close_matches(path.name, _models_in(path.parent), n=3, cutoff=0.5):
        return f"{path} does not exist; did you mean {' or '.join(close)}?"
    repository = str(path).partition(":")[0]
    if REPOSITORY.fullmatch(repository) and not repository.lower().endswith(".gguf"):
        return f"{path} does not exist; for a model from the Hub, write hf:{path}."
    return f"{path} does not exist."


def _models_in(folder: Path) -> list[str]:
    try:
        return model_files(os.listdir(folder))
    except (OSError, ValueError):  # ValueError: a path with a NUL in it
        return []
