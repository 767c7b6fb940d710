"""Removes a model from the Hub's cache: its files in all revisions, and the data to which no other file refers.

Only models that are in the Hub's cache are removed. The stores of other programs belong to them.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from afterword.errors import SettingError
from afterword.models.gguf_facts import part_names
from afterword.models.registry import HubFile, Spec, cache_folder, installed, locate


def remove(spec: Spec) -> tuple[list[Path], int]:
    """Remove a model. Returns the removed files of all revisions, and the bytes that became free.

    Raises `SettingError` if the model is not in the Hub's cache, or if the spec fits several of its models.
    """
    if not isinstance(spec, HubFile):
        raise SettingError(
            "afterword rm removes models that afterword pull downloaded: hf:owner/repo:FILE. Remove files with the "
            "system's rm, and other programs' models with those programs."
        )
    model = locate(spec)
    own = [each.spec for each in installed() if each.source == "hub" and each.id.startswith(f"{spec.repository}:")]
    if not spec.wanted and len(own) > 1:
        raise SettingError(f"{spec} has several models. Write one of: {', '.join(own)}.")
    repository = cache_folder() / f"models--{spec.repository.replace('/', '--')}"
    snapshots = repository / "snapshots"
    name = model.path.relative_to(snapshots / model.path.relative_to(snapshots).parts[0]).as_posix()
    links = [link for part in part_names(name) for link in snapshots.glob(f"*/{_escaped(part)}")]
    targets = {link.resolve() for link in links if link.is_symlink()}
    freed = sum(map(_unlink, links))
    used = {link.resolve() for link in snapshots.rglob("*") if link.is_symlink()}
    for blob in targets - used:
        # A link to a place outside the repository was not made by a download: what it refers to stays.
        if blob.parent == (repository / "blobs").resolve() and blob.is_file():  # a link of a revision may be broken
            freed += blob.stat().st_size
            blob.unlink()
    return links, freed


def _escaped(name: str) -> str:
    """The name as a pattern that fits only itself."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _unlink(link: Path) -> int:
    """Remove a file or link, and its folder if that is empty then. Returns the bytes of the file; 0 for a link."""
    size = link.stat().st_size if link.is_file() and not link.is_symlink() else 0
    link.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it has other files
        link.parent.rmdir()
    return size
