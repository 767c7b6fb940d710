"""Models are removed from the Hub's cache: all of their files, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from gguf_writer import cache, gguf, write

from afterword.cli import main
from afterword.errors import SettingError
from afterword.models.registry import installed, parse_spec
from afterword.models.remove import remove


@pytest.fixture
def home(empty_cache: Path) -> Path:
    return empty_cache


def hub_models() -> list[str]:
    return [model.spec for model in installed() if model.source == "hub"]


def test_a_model_is_removed_with_its_data_in_all_revisions(home: Path) -> None:
    names = ["a-Q4_0.gguf", "b-Q8_0.gguf", "config.json"]
    for revision in ("one", "two"):
        snapshot = cache(home, "owner/repo", revision, names, current=revision == "two")
    blobs = snapshot.parent.parent / "blobs"
    size = len(gguf())
    removed, freed = remove(parse_spec("hf:owner/repo:Q4_0"))
    assert (sorted(path.name for path in removed), freed) == (["a-Q4_0.gguf"] * 2, 2 * size)
    assert hub_models() == ["hf:owner/repo:Q8_0"]
    assert sorted(path.name for path in blobs.iterdir()) == ["one1", "one2", "two1", "two2"]
    with pytest.raises(SettingError, match="not on this machine"):
        remove(parse_spec("hf:owner/repo:Q4_0"))


def test_all_parts_of_a_split_model_are_removed(home: Path) -> None:
    names = [f"big-Q8_0-0000{part}-of-00002.gguf" for part in (1, 2)]
    snapshot = cache(home, "owner/repo", "one", names)
    removed, _ = remove(parse_spec("hf:owner/repo"))
    assert sorted(path.name for path in removed) == names
    assert not [*(snapshot.parent.parent / "blobs").iterdir()]
    assert not snapshot.exists()


def test_data_that_another_file_uses_stay(home: Path) -> None:
    snapshot = cache(home, "owner/repo", "one", ["a-Q4_0.gguf"])
    blob = (snapshot / "a-Q4_0.gguf").resolve()
    (snapshot / "copy-Q8_0.gguf").symlink_to(blob)
    _, freed = remove(parse_spec("hf:owner/repo:Q4_0"))
    assert (freed, blob.exists()) == (0, True)


def test_a_link_of_another_revision_may_be_broken(home: Path) -> None:
    other = cache(home, "owner/repo", "old", ["a-Q4_0.gguf"], current=False)
    cache(home, "owner/repo", "new", ["a-Q4_0.gguf"], current=True)
    (other / "a-Q4_0.gguf").resolve().unlink()
    _, freed = remove(parse_spec("hf:owner/repo:Q4_0"))
    assert (freed, hub_models()) == (len(gguf()), [])


def test_a_target_outside_the_cache_and_unfinished_downloads_stay(home: Path) -> None:
    snapshot = cache(home, "owner/repo", "one", ["a-Q4_0.gguf"])
    unfinished = write(snapshot.parent.parent / "blobs" / "abc.incomplete", b"part")
    outside = write(home / "elsewhere.gguf", gguf())
    (snapshot / "a-Q4_0.gguf").unlink()
    (snapshot / "a-Q4_0.gguf").symlink_to(outside)
    removed, freed = remove(parse_spec("hf:owner/repo:Q4_0"))
    assert (len(removed), freed, outside.exists(), unfinished.exists()) == (1, 0, True, True)


def test_a_spec_of_several_models_and_models_from_elsewhere_are_refused(home: Path) -> None:
    cache(home, "owner/repo", "one", ["a-Q4_0.gguf", "b-Q8_0.gguf"])
    with pytest.raises(SettingError, match=r"Write one of: hf:owner/repo:Q4_0, hf:owner/repo:Q8_0"):
        remove(parse_spec("hf:owner/repo"))
    path = write(home / "mine.gguf", gguf())
    for text in (str(path), "afterword-tiny", "ollama:llama"):
        with pytest.raises(SettingError, match="removes models that afterword pull downloaded"):
            remove(parse_spec(text))
    assert path.exists()
    assert len(hub_models()) == 2


def test_the_command_says_what_it_removed(home: Path) -> None:
    cache(home, "owner/repo", "one", ["a-Q4_0.gguf"])
    result = CliRunner().invoke(main, ["rm", "hf:owner/repo:Q4_0"])
    assert (result.exit_code, result.stdout) == (0, "Removed a-Q4_0.gguf: 0.0 MiB are free.\n")
    assert CliRunner().invoke(main, ["rm", "hf:owner/repo:Q4_0"]).exit_code == 2
