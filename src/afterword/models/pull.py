"""Downloads a model from the Hub into the Hub's own cache, and checks its header before it is loaded.

Only this module and `fetch` use the network. A model that is already on this machine needs no connection. Every problem
raises a `SettingError` that says what the operator can do.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import re
import shutil
from collections.abc import Iterator

from afterword.errors import SettingError
from afterword.models.download_staging import ListedFile, partial_bytes, staging_folder
from afterword.models.fetch import NO_OBSERVER, DownloadObserver, download_file, endpoint
from afterword.models.file_names import model_files
from afterword.models.gguf_facts import part_names, read_facts
from afterword.models.registry import (
    HubFile,
    LocalFile,
    Model,
    Spec,
    cache_folder,
    choose_file,
    locate,
    parse_spec,
)

RESERVED_BYTES = 256 << 20  # bytes of disk that a download leaves free
SEARCH_SECONDS = 10  # in which the Hub must answer a search


def parse_hub_spec(text: str) -> HubFile:
    """Parse the spec of a file on the Hub, in which `hf:` may be omitted. Raises `SettingError`."""
    spec = parse_spec(text)
    if isinstance(spec, HubFile):
        return spec
    if isinstance(spec, LocalFile) and not spec.path.exists():
        bare = text.removesuffix(".gguf") == text and not text.startswith((".", "/", "~"))
        if bare and "/" in text:
            return parse_hub_spec(f"hf:{text}")
        if bare and _offline():
            raise SettingError(
                f"{text} lacks the owner, and HF_HUB_OFFLINE forbids searching the Hub for it. Write hf:owner/repo."
            )
        if bare:
            with _translated_errors(text):
                found = _found_repositories(text.partition(":")[0], gguf=True)
            if found:
                raise SettingError(f"{text} lacks the owner. Repositories on the Hub: {', '.join(found[:5])}.")
    raise SettingError(f"{text} is not on the Hub. Write hf:owner/repo.")


def pull(spec: Spec, observer: DownloadObserver = NO_OBSERVER) -> Model:
    """Find a model on this machine, or download it, and check its header. Raises `SettingError`."""
    if not isinstance(spec, HubFile):
        return _checked(locate(spec))
    with contextlib.suppress(SettingError):  # missing, ambiguous or damaged: look on the Hub
        return _checked(locate(spec))
    if _offline():
        raise SettingError(f"{spec} is not on this machine, and HF_HUB_OFFLINE forbids downloading it.")
    with _translated_errors(spec):
        files = _list_files(spec.repository)
    if not model_files(files):
        raise SettingError(f"{spec.repository} contains no GGUF model.{_others(spec.repository)}")
    names = part_names(choose_file(files, spec))
    if not spec.wanted and len(model_files(files)) > 1:
        observer.selected(names[0], [name for name in model_files(files) if name != names[0]])
    if missing := [name for name in names if name not in files]:
        raise SettingError(f"{spec.repository} lacks {missing[0]}, a part of the model. Choose another file.")
    _check_disk(sum(files[name].size for name in names) - partial_bytes(cache_folder(), spec.repository), spec)
    with _translated_errors(spec), staging_folder(cache_folder(), spec.repository) as folder:
        for name in names:
            download_file(spec.repository, name, files[name], folder, observer)
    return _checked(locate(HubFile(spec.repository, names[0])))


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _checked(model: Model) -> Model:
    read_facts(model.path)
    return model


def _list_files(repository: str) -> dict[str, ListedFile]:
    """All files of a repository on the Hub, by name."""
    from huggingface_hub import HfApi

    files = HfApi(endpoint=endpoint()).model_info(repository, files_metadata=True).siblings or []
    return {file.rfilename: ListedFile(file.size or 0, file.lfs.sha256 if file.lfs else None) for file in files}


def _check_disk(needed: int, spec: HubFile) -> None:
    folder = cache_folder()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed + RESERVED_BYTES > free:
        raise SettingError(
            f"{spec} needs {needed / 2**30:.2f} GiB, but {existing} has {free / 2**30:.2f} GiB free. "
            "Free disk space, or set HF_HOME to a folder on a larger disk."
        )


@contextlib.contextmanager
def _translated_errors(spec: HubFile | str) -> Iterator[None]:
    """Replace an exception of the Hub's library by a `SettingError` with advice."""
    try:
        yield
    except SettingError:
        raise
    except Exception as error:  # the library's exceptions have no more specific common base class
        raise SettingError(_sentence(spec, error)) from error


def _sentence(spec: HubFile | str, error: Exception) -> str:
    """`spec`: a file on the Hub, or a name that was searched there."""
    from huggingface_hub import errors

    if isinstance(spec, str):
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        return (
            f"{spec} lacks the owner, and the Hub could not be searched for it ({reason}). Check the connection, or "
            "write hf:owner/repo."
        )
    if isinstance(error, errors.GatedRepoError):
        page = f"{endpoint() or 'https://huggingface.co'}/{spec.repository}"
        return f"{spec.repository} is gated. Request access at {page}, then set HF_TOKEN."
    if isinstance(error, errors.RepositoryNotFoundError):
        hint = f"Check the spelling{_suggestion(spec.repository)}, or set HF_TOKEN if it is private"
        return f"The Hub has no visible repository {spec.repository}. {hint}."
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        return f"The Hub refused {spec} with status {status}. Check HF_TOKEN, or try again later."
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"The disk is full. Free disk space or set HF_HOME to a folder on a larger disk, and pull {spec} again."
    reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return f"{spec} could not be downloaded. Check the connection and try again ({reason})."


def _suggestion(repository: str) -> str:
    """Repositories on the Hub with a similar name, in parentheses; empty if there are none."""
    close = difflib.get_close_matches(repository, _search(repository.partition("/")[2]), n=3)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def _others(repository: str) -> str:
    """A sentence that names repositories with GGUF files of the same model; empty if there are none."""
    name = re.sub(r"-gguf$", "", repository.partition("/")[2], flags=re.IGNORECASE)
    found = [each for each in _search(name, gguf=True) if each != repository][:5]
    return f" Repositories with GGUF files of this model: {', '.join(found)}." if found else ""


def _search(name: str, gguf: bool = False) -> list[str]:
    """Like `_found_repositories`; empty if the Hub cannot be reached."""
    with contextlib.suppress(Exception):  # only for a hint in an error message, so a failure is ignored
        return _found_repositories(name, gguf)
    return []


def _found_repositories(name: str, gguf: bool = False) -> list[str]:
    """Repositories with a word in their names, the most downloaded first. Raises what the Hub's library raises."""
    # `HfApi.list_models` repeats a request that fails for 23 seconds, and prints each attempt.
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

    url = f"{endpoint() or constants.ENDPOINT}/api/models"
    asked = {"search": name, "sort": "downloads", "limit": "50", **({"filter": "gguf"} if gguf else {})}
    answer = get_session().get(url, params=asked, headers=build_hf_headers(), timeout=SEARCH_SECONDS)
    hf_raise_for_status(answer)
    return [each["id"] for each in answer.json()]
