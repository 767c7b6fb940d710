"""Download a model from the Hub into the Hub's own cache, and check it before anyone loads it.

The only file that reaches the network. What is already there costs no connection; every trouble ends in a
SettingError that says what the operator can do.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from afterword.errors import SettingError
from afterword.models.arrival import Listed, arriving, difference
from afterword.models.gguf import part_names, read_facts
from afterword.models.registry import HubFile, Model, Spec, cache_folder, choose_file, locate

RESERVE = 256 << 20  # bytes of disk that a download leaves free


def pull(spec: Spec) -> Model:
    """Make the model present and sound, downloading it if need be; SettingError if that cannot be done."""
    if not isinstance(spec, HubFile):
        return _checked(locate(spec))
    with contextlib.suppress(SettingError):  # absent, ambiguous here, or damaged: the Hub knows better
        return _checked(locate(spec))
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise SettingError(f"{spec} is not on this machine, and HF_HUB_OFFLINE forbids fetching it.")
    with _told_plainly(spec):
        files = _list_files(spec.repository)
    names = part_names(choose_file(files, spec))
    if missing := [name for name in names if name not in files]:
        raise SettingError(f"{spec.repository} lacks {missing[0]}, a part of the model; choose another file.")
    _check_disk(sum(files[name].size for name in names), spec)
    with _told_plainly(spec), arriving(cache_folder(), spec.repository) as folder:
        for name in names:
            _fetch(spec.repository, name, files[name], folder)
    return _checked(locate(HubFile(spec.repository, names[0])))


def _checked(model: Model) -> Model:
    read_facts(model.path)
    return model


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None  # read here, as the library reads it once, at import


def _list_files(repository: str) -> dict[str, Listed]:
    """Every file of a repository on the Hub."""
    from huggingface_hub import HfApi

    files = HfApi(endpoint=_endpoint()).model_info(repository, files_metadata=True).siblings or []
    return {file.rfilename: Listed(file.size or 0, file.lfs.sha256 if file.lfs else None) for file in files}


def _fetch(repository: str, name: str, listed: Listed, folder: Path) -> None:
    """Download one file; one that is not as it was listed is downloaded once more."""
    from huggingface_hub import hf_hub_download

    for force in (False, True):
        path = hf_hub_download(repository, name, cache_dir=folder, endpoint=_endpoint(), force_download=force)
        wrong = difference(Path(path), listed)
        if wrong is None:
            return
    Path(path).resolve().unlink()
    raise SettingError(f"{name} {wrong}; pull it again later.")


def _check_disk(needed: int, spec: HubFile) -> None:
    folder = cache_folder()
    place = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if needed + RESERVE > free:
        raise SettingError(
            f"{spec} takes {needed / 2**30:.2f} GiB and {place} has {free / 2**30:.2f} GiB free; "
            "make room, or set HF_HOME to a folder on a larger disk."
        )


@contextlib.contextmanager
def _told_plainly(spec: HubFile) -> Iterator[None]:
    """Turn what the Hub's library raises into a sentence."""
    try:
        yield
    except SettingError:
        raise
    except Exception as error:  # the library's errors have no common base short of this
        raise SettingError(_sentence(spec, error)) from error


def _sentence(spec: HubFile, error: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return f"{spec.repository} is open only to those whom its owner admits; ask there, then set HF_TOKEN."
    if isinstance(error, errors.RepositoryNotFoundError):
        hint = f"check the spelling{_suggestion(spec.repository)}, or set HF_TOKEN if it is private"
        return f"The Hub shows no repository {spec.repository}; {hint}."
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        return f"The Hub refused {spec} with status {status}; check HF_TOKEN, or try again later."
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"The disk is full; make room or set HF_HOME to a folder on a larger one, and pull {spec} again."
    reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return f"{spec} could not be fetched; check the connection and try again ({reason})."


def _suggestion(repository: str) -> str:
    """Repositories on the Hub with a similar name, as a parenthesis, or nothing."""
    from huggingface_hub import HfApi

    with contextlib.suppress(Exception):  # a courtesy, not worth a second error
        name = repository.partition("/")[2]
        known = [model.id for model in HfApi(endpoint=_endpoint()).list_models(search=name, limit=50)]
        if close := difflib.get_close_matches(repository, known, n=3):
            return f" (did you mean {' or '.join(close)}?)"
    return ""
