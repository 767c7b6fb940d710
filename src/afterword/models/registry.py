"""Parses model specs, and finds the models on this machine.

The module knows folders, file names and the layout of the Hub's cache. It opens no model file and no connection.

    spec                        model
    (none), afterword-tiny      the built-in model
    hf:owner/repo               the preferred file of a repository on the Hub
    hf:owner/repo:Q4_K_M        the repository's file with this quantization
    hf:owner/repo:file.gguf     the file with this name
    ollama:name[:tag]           a model in Ollama's store
    lmstudio:publisher/repo     the preferred file of a repository that LM Studio has downloaded
    lmstudio:publisher/repo/file   the file with this name
    anything else               the path of a GGUF file
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Literal

from afterword.errors import SettingError
from afterword.models import other_stores
from afterword.models.file_names import (
    check_utf8,
    is_safe,
    matching_models,
    model_files,
    printable,
    quant_of,
    similar_names,
)
from afterword.models.gguf_facts import part_names, split_stem
from afterword.models.gguf_header import describe_broken_link

BUILTIN = "afterword-tiny"
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)

Source = Literal["built-in", "hub", "ollama", "lmstudio", "file"]
StoreName = Literal["ollama", "lmstudio"]
STORES: tuple[StoreName, ...] = ("ollama", "lmstudio")
_PREFIXES: dict[Source, str] = {"hub": "hf:", "ollama": "ollama:", "lmstudio": "lmstudio:"}


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """The model in Afterword's wheel."""


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file on the Hub. `wanted`: its quantization or name, empty for the preferred file of the repository."""

    repository: str
    wanted: str = ""

    def __str__(self) -> str:
        return f"hf:{self.repository}" + (f":{self.wanted}" if self.wanted else "")


@dataclass(frozen=True, slots=True)
class StoreModel:
    """A model in the store of another program. `name`: its name in that store."""

    store: StoreName
    name: str

    def __str__(self) -> str:
        return f"{self.store}:{self.name}"


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A GGUF file, named by its path."""

    path: Path


Spec = BuiltIn | HubFile | StoreModel | LocalFile


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter of a model: a GGUF file, and the factor of what it adds. `base`: the model's name in requests."""

    path: Path
    scale: float
    base: str


@dataclass(frozen=True, slots=True)
class Model:
    """A model on the disk.

    `id`: its name in requests. `path`: its (first) file. `problem`: a sentence that says why it cannot be used.
    `adapter`: is applied to the weights in the file.
    """

    id: str
    path: Path
    source: Source
    problem: str | None = None
    adapter: Adapter | None = None

    @property
    def spec(self) -> str:
        """The spec that names this model."""
        return str(self.path) if self.source == "file" else f"{_PREFIXES.get(self.source, '')}{self.id}"


def parse_spec(text: str | None) -> Spec:
    """Parse a spec. Raises `SettingError` for an invalid one. The model need not exist."""
    if text is None or text == BUILTIN:
        return BuiltIn()
    check_utf8(text)
    for store in STORES:
        if text.startswith(f"{store}:"):
            return StoreModel(store, text.removeprefix(f"{store}:"))
    if not text.startswith("hf:"):
        if not text:
            raise SettingError("The model's name is empty. Name a file, hf:owner/repo or another spec.")
        return LocalFile(Path(os.path.expanduser(text)))
    repository, colon, wanted = text[3:].partition(":")
    if not REPOSITORY.fullmatch(repository) or ".." in repository or (colon and not is_safe(wanted)):
        raise SettingError(f"{text!r} does not name a model. Write hf:owner/repo or hf:owner/repo:Q4_K_M.")
    return HubFile(repository, wanted)


def locate(spec: Spec) -> Model:
    """Find a model on this machine. Raises `SettingError` with advice if it is not there."""
    model = _found(spec)
    check_utf8(str(model.path))
    return model


def _found(spec: Spec) -> Model:
    match spec:
        case BuiltIn():
            return _builtin()
        case HubFile():
            return _in_cache(spec)
        case StoreModel():
            return _in_store(spec)
        case LocalFile(path):
            if not os.path.isfile(path):  # unlike Path.is_file, it never raises
                raise SettingError(_missing(path))
            return Model(split_stem(path.name), path, "file")


def installed() -> list[Model]:
    """All usable models on this machine that have a name: built-in, in the Hub's cache, in other programs' stores."""
    return [model for model in present() if model.problem is None]


def present() -> list[Model]:
    """Like `installed`, but with incomplete and unusable models, which have a `problem`."""
    found = [
        *([_builtin()] if builtin_path().is_file() else []),
        *_cached(),
        *(_stored("ollama", model) for model in other_stores.ollama()),
        *(_stored("lmstudio", model) for model in other_stores.lmstudio()),
    ]
    return [_printable(model) for model in found]


def _printable(model: Model) -> Model:
    """The model with a printable id, and with a `problem` if its path is not UTF-8."""
    try:
        check_utf8(str(model.path))
    except SettingError as error:
        return replace(model, id=printable(model.id), problem=error.message)
    return model


def builtin_path() -> Path:
    """The path of the built-in model, which exists only in an installed wheel or a built checkout."""
    return Path(str(resources.files("afterword.models"))) / "builtin" / f"{BUILTIN}.gguf"


def cache_folder() -> Path:
    """The folder of the Hub's cache, by the environment variables that the Hub's own library reads."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{home}/huggingface"
    hub = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    return Path(os.path.expandvars(hub)).expanduser()


def choose_file(names: Iterable[str], spec: HubFile) -> str:
    """The file among `names` that the spec selects (of a split model, the first part).

    Raises `SettingError` if no file or several files match.
    """
    models = model_files(names)
    if not models:
        raise SettingError(f"{spec.repository} contains no GGUF model. Look for a repository named …-GGUF.")
    found = matching_models(models, spec.wanted)
    if len(found) == 1:
        return found[0]
    problem = "has several matching files" if found else f"has no file that matches {spec.wanted!r}"
    listing = ", ".join(map(printable, found or models))
    raise SettingError(f"{spec.repository} {problem}. Write hf:{spec.repository}:FILE with one of: {listing}.")


def _hub_model(repository: str, snapshot: Path, name: str, names: Sequence[str]) -> Model:
    quant = quant_of(name)
    unique = quant and sum(quant_of(other) == quant for other in names) == 1
    return Model(f"{repository}:{quant if unique else name}", snapshot / name, "hub")


def _builtin() -> Model:
    if not builtin_path().is_file():
        raise SettingError("The built-in model is missing. Name another model, or reinstall Afterword.")
    return Model(BUILTIN, builtin_path(), "built-in")


def _cached() -> Iterator[Model]:
    """The models in the Hub's cache, also incomplete ones."""
    for folder in sorted(cache_folder().glob("models--*--*")):
        repository = folder.name.removeprefix("models--").replace("--", "/", 1)
        found: dict[str, Model] = {}
        for snapshot in _snapshots(repository):
            names = _complete(snapshot)
            whole = [_hub_model(repository, snapshot, name, names) for name in names]
            for model in (*whole, *_incomplete(repository, snapshot)):
                if model.id not in found or (found[model.id].problem and not model.problem):
                    found[model.id] = model
        yield from sorted(found.values(), key=lambda model: model.problem is not None)


def _incomplete(repository: str, snapshot: Path) -> Iterator[Model]:
    """The models of one revision of which a file is missing."""
    files = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if not path.is_dir()]
    for name in model_files(files):
        missing = [part for part in part_names(name) if not (snapshot / part).is_file()]
        if missing:
            problem = f"{missing[0]} is missing. Run `afterword pull hf:{repository}:{name}`."
            yield replace(_hub_model(repository, snapshot, name, model_files(files)), problem=problem)


def _stored(store: StoreName, model: other_stores.StoredModel) -> Model:
    return Model(model.name, model.path, store, model.problem)


def _in_cache(spec: HubFile) -> Model:
    for snapshot in _snapshots(spec.repository):
        names = _complete(snapshot)
        if matching_models(names, spec.wanted):
            return _hub_model(spec.repository, snapshot, choose_file(names, spec), names)
    raise SettingError(f"{spec} is not on this machine. Run `afterword pull {spec}` first{_or(_similar(str(spec)))}.")


def _in_store(spec: StoreModel) -> Model:
    models = {model.id: model for model in present() if model.source == spec.store}
    if spec.store == "ollama":
        found = [name for name in (spec.name, f"{spec.name}:latest") if name in models][:1]
    else:
        name = spec.name.removesuffix(".gguf")
        within = [each for each in models if each.startswith(f"{name}/") and not models[each].problem]
        found = [name] if name in models else matching_models(within, "")
    if len(found) > 1:
        names = ", ".join(models[name].spec for name in found)
        raise SettingError(f"{spec} has several matching files. Write one of: {names}.")
    if not found:
        available = ", ".join(model.spec for model in models.values()) or "none"
        hint = _did_you_mean(_similar(str(spec)))
        raise SettingError(f"{spec} is not on this machine{hint}. Models in the store of {spec.store}: {available}.")
    model = models[found[0]]
    if model.problem:
        raise SettingError(f"{model.spec} cannot be used: {model.problem}")
    return model


def _similar(name: str) -> list[str]:
    return similar_names(name, [model.spec for model in installed()])


def _or(names: Sequence[str]) -> str:
    return f", or use a model on this machine: {' or '.join(names)}" if names else ""


def _did_you_mean(names: Sequence[str]) -> str:
    return f"; did you mean {' or '.join(names)}?" if names else ""


def _snapshots(repository: str) -> Iterator[Path]:
    """The folders of the repository's cached revisions: first the current one, then the others, newest first."""
    folder = cache_folder() / f"models--{repository.replace('/', '--')}"
    main = folder / "refs" / "main"
    current = main.read_text().strip() if main.is_file() else ""
    snapshots = [path for path in folder.glob("snapshots/*") if path.is_dir()]
    yield from sorted(snapshots, key=lambda path: (path.name != current, -path.stat().st_mtime))


def _complete(snapshot: Path) -> list[str]:
    """The models of one revision that have all their parts."""
    names = (str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file())
    return [name for name in model_files(names) if all((snapshot / part).is_file() for part in part_names(name))]


def _missing(path: Path) -> str:
    if os.path.isdir(path):
        models = ", ".join(_models_in(path))
        return f"{path} is a folder" + (f". Name a file in it: {models}." if models else " without a GGUF model.")
    if os.path.exists(path):
        return f"{path} is not a regular file."
    if problem := describe_broken_link(path):
        return f"{path} {problem}."
    if close := difflib.get_close_matches(path.name, _models_in(path.parent), n=3, cutoff=0.5):
        return f"{path} does not exist; did you mean {' or '.join(close)}?"
    if path.suffix.lower() != ".gguf" and (close := _similar(path.as_posix())):
        return f"{path} does not exist; did you mean {' or '.join(close)}?"
    repository = str(path).partition(":")[0]
    if REPOSITORY.fullmatch(repository) and not repository.lower().endswith(".gguf"):
        return f"{path} does not exist. For a model from the Hub, write hf:{path}."
    if path.parent == Path() and path.suffix.lower() != ".gguf":
        return (
            f"{path} does not exist. afterword models lists the models on this machine; afterword pull {path} looks "
            "for one on the Hub."
        )
    return f"{path} does not exist."


def _models_in(folder: Path) -> list[str]:
    try:
        return [printable(name) for name in model_files(os.listdir(folder))]
    except (OSError, ValueError):  # ValueError: a path with a NUL in it
        return []
