"""Tests of parsing specs and finding models on the disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from gguf_writer import cache, gguf, write

from afterword.errors import SettingError
from afterword.models import registry
from afterword.models.registry import (
    BuiltIn,
    HubFile,
    LocalFile,
    Model,
    cache_folder,
    choose_file,
    installed,
    locate,
    parse_spec,
    present,
)

real_builtin = registry.builtin_path()  # read before the fixture replaces the function


@pytest.fixture(autouse=True)
def home(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hub cache, a built-in model, and no other models."""
    builtin = write(empty_cache / "builtin" / "afterword-tiny.gguf", gguf())
    monkeypatch.setattr(registry, "builtin_path", lambda: builtin)
    return empty_cache


def error_message(text: str) -> str:
    with pytest.raises(SettingError) as caught:
        locate(parse_spec(text))
    return caught.value.message


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        (None, BuiltIn()),
        ("afterword-tiny", BuiltIn()),
        ("hf:owner/repo-GGUF", HubFile("owner/repo-GGUF")),
        ("hf:owner/repo:Q4_K_M", HubFile("owner/repo", "Q4_K_M")),
        ("hf:owner/repo:sub/a b.gguf", HubFile("owner/repo", "sub/a b.gguf")),
        ("models/some.gguf", LocalFile(Path("models/some.gguf"))),
        ("~/some.gguf", LocalFile(Path.home() / "some.gguf")),
    ],
)
def test_specs_are_parsed(text: str | None, spec: registry.Spec) -> None:
    assert parse_spec(text) == spec
    if isinstance(spec, HubFile):
        assert str(spec) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hf:",
        "hf:repo",
        "hf:owner/repo:",
        "hf:../repo",
        "hf:owner/..",
        "hf:o/r:../x.gguf",
        "hf:o/r:/x.gguf",
    ],
)
def test_invalid_specs_are_refused(text: str) -> None:
    with pytest.raises(SettingError):
        parse_spec(text)


def test_the_built_in_model(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate(BuiltIn()) == Model("afterword-tiny", home / "builtin" / "afterword-tiny.gguf", "built-in")
    monkeypatch.setattr(registry, "builtin_path", lambda: home / "absent.gguf")
    assert error_message("afterword-tiny").startswith("The built-in model is missing")
    assert installed() == []


def test_the_built_in_model_is_in_the_package() -> None:
    assert real_builtin == Path(registry.__file__).parent / "builtin" / "afterword-tiny.gguf"


def test_a_local_file(tmp_path: Path) -> None:
    path = write(tmp_path / "my-model.Q8_0.gguf", gguf())
    assert locate(parse_spec(str(path))) == Model("my-model.Q8_0", path, "file")
    first = write(tmp_path / "big-00001-of-00002.gguf", gguf())
    assert locate(parse_spec(str(first))).id == "big"


def test_a_missing_path(tmp_path: Path) -> None:
    write(tmp_path / "my-model.Q8_0.gguf", gguf())
    assert error_message(f"{tmp_path}/my-modle.gguf").endswith("does not exist; did you mean my-model.Q8_0.gguf?")
    assert error_message(f"{tmp_path}/zzz").endswith("zzz does not exist.")
    assert error_message("zzz.gguf").endswith("zzz.gguf does not exist.")
    hint = error_message("llama-nothing")
    assert "afterword models" in hint
    assert "afterword pull llama-nothing" in hint
    assert error_message(str(tmp_path)).endswith("is a folder. Name a file in it: my-model.Q8_0.gguf.")
    assert error_message(f"{tmp_path}/builtin/..").endswith("Name a file in it: my-model.Q8_0.gguf.")
    assert "For a model from the Hub, write hf:owner/repo-GGUF:Q8_0." in error_message("owner/repo-GGUF:Q8_0")
    assert error_message("a\0b/c").endswith("does not exist.")


def test_a_model_from_the_cache(home: Path) -> None:
    names = ["m-Q4_K_M.gguf", "m-Q8_0.gguf", "mmproj-m-F16.gguf", "README.md"]
    snapshot = cache(home, "owner/repo", "abc", names)
    best = Model("owner/repo:Q8_0", snapshot / "m-Q8_0.gguf", "hub")
    small = Model("owner/repo:Q4_K_M", snapshot / "m-Q4_K_M.gguf", "hub")
    assert locate(parse_spec("hf:owner/repo")) == best
    assert locate(parse_spec("hf:owner/repo:q4_k_m")) == small
    assert locate(parse_spec("hf:owner/repo:m-Q4_K_M.gguf")) == small
    assert error_message("hf:owner/repo:Q5_K_M") == (
        "hf:owner/repo:Q5_K_M is not on this machine. Run `afterword pull hf:owner/repo:Q5_K_M` first, "
        "or use a model on this machine: hf:owner/repo:Q4_K_M or hf:owner/repo:Q8_0."
    )
    assert "`afterword pull hf:owner/other`" in error_message("hf:owner/other")


def test_the_current_revision_comes_first(home: Path) -> None:
    current = cache(home, "owner/repo", "bbb", ["m-Q8_0.gguf"])
    older = cache(home, "owner/repo", "aaa", ["m-Q8_0.gguf", "m-F16.gguf"], current=False)
    assert locate(parse_spec("hf:owner/repo")).path == current / "m-Q8_0.gguf"
    assert locate(parse_spec("hf:owner/repo:F16")).path == older / "m-F16.gguf"


def test_a_split_model_is_listed_only_with_all_parts(home: Path) -> None:
    snapshot = cache(home, "owner/repo", "abc", ["Q8_0/m-Q8_0-00001-of-00002.gguf"])
    assert "afterword pull" in error_message("hf:owner/repo")
    (snapshot / "Q8_0" / "m-Q8_0-00002-of-00002.gguf").write_bytes(gguf())
    assert locate(parse_spec("hf:owner/repo")).path.name == "m-Q8_0-00001-of-00002.gguf"
    assert [model.id for model in installed()] == ["afterword-tiny", "owner/repo:Q8_0"]


def test_installed_ids_find_their_model(home: Path) -> None:
    cache(home, "owner/one", "abc", ["m-Q8_0.gguf", "m-iq4_xs.gguf", "mmproj-F16.gguf", "imatrix.gguf"])
    cache(home, "owner/two", "abc", ["small-Q8_0.gguf", "large-Q8_0.gguf", "plain.gguf"])
    cache(home, "owner/two", "old", ["small-Q8_0.gguf"], current=False)
    models = installed()
    assert [model.id for model in models] == [
        "afterword-tiny",
        "owner/one:Q8_0",
        "owner/one:IQ4_XS",
        "owner/two:large-Q8_0.gguf",
        "owner/two:plain.gguf",
        "owner/two:small-Q8_0.gguf",
        "owner/two:Q8_0",
    ]
    for model in models[1:-1]:
        assert locate(parse_spec(f"hf:{model.id}")) == model


def test_a_broken_link_is_not_listed(home: Path) -> None:
    snapshot = cache(home, "owner/repo", "abc", ["m-Q8_0.gguf"])
    (snapshot / "m-Q8_0.gguf").resolve().unlink()
    assert [model.id for model in installed()] == ["afterword-tiny"]


def test_the_environment_sets_the_cache_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == home / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", "~/elsewhere")
    assert cache_folder() == Path.home() / "elsewhere"
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.delenv("HF_HOME")
    assert cache_folder() == Path.home() / ".cache" / "huggingface" / "hub"
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_folder() == Path("/caches/huggingface/hub")


REPOSITORY = [
    "README.md",
    "m-Q4_K_M.gguf",
    "m-Q4_K_S.gguf",
    "m-UD-Q2_K_XL.gguf",
    "m-fp16.gguf",
    "mmproj.gguf",
]


@pytest.mark.parametrize(
    ("names", "wanted", "chosen"),
    [
        (REPOSITORY, "", "m-Q4_K_M.gguf"),
        (REPOSITORY, "q4_k_s", "m-Q4_K_S.gguf"),
        (REPOSITORY, "Q2_K_XL", "m-UD-Q2_K_XL.gguf"),
        (REPOSITORY, "F16", "m-fp16.gguf"),
        ([*REPOSITORY, "m-Q6_K.gguf", "m-Q5_K_M.gguf"], "", "m-Q6_K.gguf"),
        (["only.gguf", "config.json"], "", "only.gguf"),
        (
            ["a/m-BF16-00001-of-00002.gguf", "a/m-BF16-00002-of-00002.gguf"],
            "",
            "a/m-BF16-00001-of-00002.gguf",
        ),
    ],
)
def test_the_matching_file_is_chosen(names: list[str], wanted: str, chosen: str) -> None:
    assert choose_file(names, HubFile("owner/repo", wanted)) == chosen


@pytest.mark.parametrize(
    ("names", "wanted", "message"),
    [
        (
            REPOSITORY,
            "Q4_K",
            "several matching files. Write hf:owner/repo:FILE with one of: m-Q4_K_M.gguf, m-Q4_K_S.gguf.",
        ),
        (REPOSITORY, "Q8_0", "no file that matches 'Q8_0'"),
        (["a-Q8_0.gguf", "b-Q8_0.gguf", "c-Q4_0.gguf"], "", "one of: a-Q8_0.gguf, b-Q8_0.gguf."),
        (["model.safetensors"], "", "contains no GGUF model"),
        (["../../m-Q8_0.gguf", "/m-Q8_0.gguf"], "", "contains no GGUF model"),
    ],
)
def test_no_or_several_matching_files_are_refused(names: list[str], wanted: str, message: str) -> None:
    with pytest.raises(SettingError, match="owner/repo") as caught:
        choose_file(names, HubFile("owner/repo", wanted))
    assert message in caught.value.message


# ---- names that are not UTF-8

STRANGE = os.fsdecode(b"mod\xffel")


@pytest.mark.parametrize("text", [f"{STRANGE}.gguf", f"{STRANGE}/model.gguf", f"hf:owner/{STRANGE}"])
def test_a_path_that_is_not_utf8_is_refused(text: str) -> None:
    message = error_message(text)
    assert r"mod\xffel" in message
    assert "is not valid UTF-8. Rename it" in message
    assert message.encode()


def test_a_folder_that_is_not_utf8_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(home / STRANGE))
    cache(home / STRANGE, "owner/repo", "a" * 40, ["model.gguf"])
    assert "is not valid UTF-8" in error_message("hf:owner/repo")
    assert [(model.id, model.problem is None) for model in present()] == [
        ("afterword-tiny", True),
        ("owner/repo:model.gguf", False),
    ]


def test_a_name_that_is_not_utf8_can_be_listed(home: Path) -> None:
    cache(home, "owner/repo", "a" * 40, [f"{STRANGE}.gguf", "good.gguf"])
    listed = {model.id: model.problem for model in present()}
    assert listed["owner/repo:good.gguf"] is None
    assert "is not valid UTF-8" in str(listed[r"owner/repo:mod\xffel.gguf"])
    assert locate(parse_spec("hf:owner/repo:good.gguf")).path.name == "good.gguf"
    assert r"with one of: good.gguf, mod\xffel.gguf." in error_message("hf:owner/repo")


def test_the_message_can_list_names_that_are_not_utf8(home: Path) -> None:
    write(home / "models" / f"{STRANGE}.gguf", gguf())
    assert r"Name a file in it: mod\xffel.gguf." in error_message(str(home / "models"))
    assert r"did you mean mod\xffel.gguf?" in error_message(str(home / "models" / "model.gguf"))


# ---- paths that are not regular files


def test_the_message_for_special_files_names_their_kind(home: Path) -> None:
    link, pipe = home / "link.gguf", home / "pipe.gguf"
    link.symlink_to("gone.gguf")
    os.mkfifo(pipe)
    assert error_message(str(link)) == f"{link} is a link to gone.gguf, which cannot be found."
    assert error_message(str(pipe)) == f"{pipe} is not a regular file."
