"""Tests of the models in the stores of Ollama and LM Studio."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from gguf_writer import cache, gguf, write

from afterword.errors import SettingError
from afterword.models import other_stores, registry
from afterword.models.catalogue import entries
from afterword.models.registry import Model, installed, locate, parse_spec

WEIGHTS = "application/vnd.ollama.image.model"
OTHER = "application/vnd.ollama.image.template"
ADAPTER = "application/vnd.ollama.image.adapter"
SPLIT = {"split.count": 2, "split.no": 0}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder, and no built-in model."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "OLLAMA_MODELS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(other_stores, "_SERVICE", tmp_path / "service")
    monkeypatch.setattr(registry, "builtin_path", lambda: tmp_path / "none.gguf")
    return tmp_path


@pytest.fixture
def ollama(home: Path) -> Path:
    return home / ".ollama" / "models"


def blob(folder: Path, data: bytes) -> str:
    """Write content into a store. Returns its digest."""
    digest = hashlib.sha256(data).hexdigest()
    write(folder / "blobs" / f"sha256-{digest}", data)
    return f"sha256:{digest}"


def manifest(*layers: tuple[str, Any]) -> bytes:
    return json.dumps({"layers": [{"mediaType": kind, "digest": digest} for kind, digest in layers]}).encode()


def write_manifest(folder: Path, path: str, *layers: tuple[str, Any]) -> None:
    write(folder / "manifests" / path, manifest(*layers))


def error_message(text: str) -> str:
    with pytest.raises(SettingError) as caught:
        locate(parse_spec(text))
    return caught.value.message


def listed() -> dict[str, str | None]:
    return {entry.model.spec: entry.problem for entry in entries()}


def test_models_of_ollama_are_found_by_name_and_tag(ollama: Path) -> None:
    digest = blob(ollama, gguf())
    for path in (
        "registry.ollama.ai/library/llama3.2/1b",
        "registry.ollama.ai/library/llama3.2/latest",
        "registry.ollama.ai/someone/tuned/q8",
        "hf.co/owner/repo/Q4_K_M",
    ):
        write_manifest(ollama, path, (OTHER, blob(ollama, b"text")), (WEIGHTS, digest))
    path = ollama / "blobs" / digest.replace(":", "-")
    names = ["hf.co/owner/repo:Q4_K_M", "llama3.2:1b", "llama3.2:latest", "someone/tuned:q8"]
    assert sorted(model.id for model in installed()) == names
    for name in names:
        assert locate(parse_spec(f"ollama:{name}")) == Model(name, path, "ollama")
    assert locate(parse_spec("ollama:llama3.2")).id == "llama3.2:latest"


def test_newer_manifests_of_ollama_take_precedence(ollama: Path) -> None:
    old, new = blob(ollama, gguf()), blob(ollama, gguf({"general.name": "New"}))
    write_manifest(ollama, "registry.ollama.ai/library/a/1b", (WEIGHTS, old))
    child = blob(ollama, manifest((WEIGHTS, new)))
    choices = [
        {"runner": "mlx", "layers": [{"mediaType": "application/vnd.ollama.image.tensor", "digest": old}]},
        {"runner": "llamacpp", "format": "gguf", "digest": child},
    ]
    named = blob(ollama, json.dumps({"manifests": choices}).encode())
    link = ollama / "manifests-v2" / "ollama.com" / "library" / "a" / "1b"
    link.parent.mkdir(parents=True)
    link.symlink_to(ollama / "blobs" / named.replace(":", "-"))
    assert locate(parse_spec("ollama:a:1b")).path == ollama / "blobs" / new.replace(":", "-")
    assert listed() == {"ollama:a:1b": None}


def test_ollama_models_names_the_store(home: Path, ollama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service, other = home / "service", home / "other"
    write_manifest(service, "registry.ollama.ai/library/a/1b", (WEIGHTS, blob(service, gguf())))
    write_manifest(ollama, "registry.ollama.ai/library/a/1b", (WEIGHTS, blob(ollama, gguf())))
    write_manifest(other, "registry.ollama.ai/library/b/1b", (WEIGHTS, blob(other, gguf())))
    (found,) = installed()
    assert found.path.is_relative_to(ollama), "one's own come before the system's"
    monkeypatch.setenv("OLLAMA_MODELS", str(other))
    assert [model.spec for model in installed()] == ["ollama:b:1b"]


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ([(WEIGHTS, "sha256:" + "a" * 64)], "is missing; run `ollama pull a:1b`"),
        ([(WEIGHTS, "sha256:../../../etc/passwd")], "names no GGUF file"),
        ([(WEIGHTS, 7)], "names no GGUF file"),
        ([(OTHER, "sha256:" + "a" * 64)], "names no GGUF file"),
        ([(WEIGHTS, "sha256:" + "a" * 64), (ADAPTER, "sha256:" + "b" * 64)], "has a LoRA adapter"),
    ],
)
def test_unusable_models_of_ollama_are_listed_with_the_reason(
    ollama: Path, layers: list[tuple[str, Any]], said: str
) -> None:
    write_manifest(ollama, "registry.ollama.ai/library/a/1b", *layers)
    assert said in str(listed()["ollama:a:1b"])
    assert said in error_message("ollama:a:1b")
    assert installed() == []


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"7", b'{"layers": 7}', b'{"layers": [7]}', b"\xff", b"[" * 10**5, b" " * 2**21]
)
def test_a_damaged_manifest_is_ignored(ollama: Path, data: bytes) -> None:
    write(ollama / "manifests" / "registry.ollama.ai" / "library" / "a" / "1b", data)
    write(ollama / "manifests" / "registry.ollama.ai" / "stray", manifest())
    assert "names no GGUF file" in str(listed()["ollama:a:1b"])


def test_damaged_weights_are_listed_with_the_reason(ollama: Path) -> None:
    write_manifest(ollama, "registry.ollama.ai/library/a/1b", (WEIGHTS, blob(ollama, gguf()[:-1])))
    assert "cut short" in str(listed()["ollama:a:1b"])


def test_other_models_than_language_models_are_not_listed(ollama: Path, home: Path) -> None:
    studio = home / ".lmstudio" / "models" / "owner" / "repo"
    write(studio / "model.gguf", gguf())
    write(studio / "mmproj-model.gguf", gguf({"general.architecture": "clip"}))
    write(studio / "vision.gguf", gguf({"general.architecture": "clip"}))
    write(studio / "lora.gguf", gguf({"general.type": "adapter"}))
    write(studio / "vocabulary.gguf", gguf(tensors={}))
    assert listed() == {"lmstudio:owner/repo/model": None}


def test_models_of_lm_studio_are_found_in_both_folders(home: Path) -> None:
    new, old = home / ".lmstudio" / "models", home / ".cache" / "lm-studio" / "models"
    both = [write(folder / "owner" / "repo" / "m-Q8_0.gguf", gguf()) for folder in (new, old)]
    write(new / "owner" / "repo" / "m-Q4_0.gguf", gguf())
    first = write(old / "other" / "big" / "b-00001-of-00002.gguf", gguf(SPLIT, tensors={}))
    write(old / "other" / "big" / "b-00002-of-00002.gguf", gguf({**SPLIT, "split.no": 1}))
    write(new / "stray.gguf", gguf())
    assert listed() == {
        "lmstudio:owner/repo/m-Q4_0": None,
        "lmstudio:owner/repo/m-Q8_0": None,
        "lmstudio:other/big/b": None,
    }
    best = Model("owner/repo/m-Q8_0", both[0], "lmstudio")
    for text in ("lmstudio:owner/repo/m-Q8_0", "lmstudio:owner/repo/m-Q8_0.gguf", "lmstudio:owner/repo"):
        assert locate(parse_spec(text)) == best
    assert locate(parse_spec("lmstudio:other/big")).path == first


def test_a_split_model_without_a_part_is_listed_with_the_reason(home: Path) -> None:
    folder = home / ".lmstudio" / "models" / "owner" / "repo"
    write(folder / "b-00001-of-00002.gguf", gguf(SPLIT, tensors={}))
    (folder / "c.gguf").symlink_to("gone.gguf")
    assert "c.gguf is a link to gone.gguf, which cannot be found" in str(listed()["lmstudio:owner/repo/c"])
    assert "b-00002-of-00002.gguf is missing" in str(listed()["lmstudio:owner/repo/b"])
    assert "b-00002-of-00002.gguf is missing" in error_message("lmstudio:owner/repo/b")


def test_incomplete_models_in_the_hubs_cache_are_listed_with_the_reason(home: Path) -> None:
    snapshot = cache(home, "owner/repo", "abc", ["m-Q8_0.gguf", "m-Q4_0.gguf", "b-00001-of-00002.gguf"])
    (snapshot / "m-Q8_0.gguf").resolve().unlink()
    cache(home, "owner/repo", "old", ["m-Q8_0.gguf"], current=False)
    found = listed()
    assert found["hf:owner/repo:Q4_0"] is None
    assert found["hf:owner/repo:Q8_0"] is None, "an older revision has it"
    assert "b-00002-of-00002.gguf is missing. Run `afterword pull" in str(found["hf:owner/repo:b-00001-of-00002.gguf"])


def test_the_message_for_a_wrong_name_lists_similar_and_available_models(home: Path, ollama: Path) -> None:
    write_manifest(ollama, "registry.ollama.ai/library/llama3.2/1b", (WEIGHTS, blob(ollama, gguf())))
    write(home / ".lmstudio" / "models" / "owner" / "mistral-7b" / "m-Q8_0.gguf", gguf())
    cache(home, "owner/qwen-GGUF", "abc", ["m-Q8_0.gguf"])
    message = error_message("ollama:lama3.2")
    assert "did you mean ollama:llama3.2:1b?" in message
    assert message.endswith("Models in the store of ollama: ollama:llama3.2:1b.")
    assert error_message("lmstudio:zzz").endswith("Models in the store of lmstudio: lmstudio:owner/mistral-7b/m-Q8_0.")
    assert error_message("llama3.2:1b").endswith("does not exist; did you mean ollama:llama3.2:1b?")
    assert error_message("mistral-7b").endswith("did you mean lmstudio:owner/mistral-7b/m-Q8_0?")
    assert "or use a model on this machine: hf:owner/qwen-GGUF:Q8_0" in error_message("hf:owner/qwen-GGUF:Q4_0")
    for nothing in ("ollama:", "lmstudio:", "ollama:../../etc/passwd"):
        assert "is not on this machine" in error_message(nothing)


def test_several_matching_files_are_refused(home: Path) -> None:
    for name in ("one-Q8_0.gguf", "two-Q8_0.gguf"):
        write(home / ".lmstudio" / "models" / "owner" / "repo" / name, gguf())
    assert error_message("lmstudio:owner/repo").endswith(
        "Write one of: lmstudio:owner/repo/one-Q8_0, lmstudio:owner/repo/two-Q8_0."
    )
