"""The option `--lora NAME=FILE[@SCALE]`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from afterword.cli.adapters import with_adapters
from afterword.cli.model_setup import WantedModels, fit_models, make_model_manager
from afterword.cli.vllm_setup import folders_of
from afterword.config import Config, EngineSettings
from afterword.engine.parent.job_queue import QueuePolicy
from afterword.errors import SettingError
from afterword.keys.key import Key
from afterword.models.gguf_facts import read_facts
from afterword.models.registry import Adapter, Model, locate, parse_spec
from oracle.adapters import write_adapter

BASE = Model("file", Path("base.gguf"), "file")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.gguf", "b@2", "c@home.gguf"):
        (tmp_path / name).touch()
    return tmp_path


def adapters(folder: Path, *options: str) -> list[tuple[str, Adapter | None]]:
    models = with_adapters([BASE], ["base"], [option.replace("FOLDER", str(folder)) for option in options])
    return [(model.id, model.adapter) for model in models]


def test_adapters_follow_the_model_under_their_names(folder: Path) -> None:
    assert adapters(folder, "poems=FOLDER/a.gguf", "half=FOLDER/a.gguf@0.5") == [
        ("base", None),
        ("poems", Adapter(folder / "a.gguf", 1.0, "base")),
        ("half", Adapter(folder / "a.gguf", 0.5, "base")),
    ]


@pytest.mark.parametrize(
    ("file", "path", "scale"),
    [
        ("b@2", "b@2", 1.0),
        ("b@2@-3", "b@2", -3.0),
        ("c@home.gguf", "c@home.gguf", 1.0),
        ("c@home.gguf@1e-1", "c@home.gguf", 0.1),
    ],
)
def test_an_at_sign_belongs_to_the_name_of_a_file_that_exists(folder: Path, file: str, path: str, scale: float) -> None:
    assert adapters(folder, f"x=FOLDER/{file}")[1] == ("x", Adapter(folder / path, scale, "base"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["FOLDER/a.gguf"], "write NAME=FILE or NAME=FILE@SCALE"),
        (["=FOLDER/a.gguf"], "write NAME=FILE or NAME=FILE@SCALE"),
        (["x="], "write NAME=FILE or NAME=FILE@SCALE"),
        (["x=FOLDER/none.gguf"], "none.gguf does not exist"),
        (["x=FOLDER"], "is not a file"),
        (["x=FOLDER/a.gguf@nan"], "the scale must be a finite number"),
        (["base=FOLDER/a.gguf"], "there are two models with the name base"),
        (["x=FOLDER/a.gguf", "x=FOLDER/a.gguf@2"], "there are two models with the name x"),
    ],
)
def test_an_option_that_cannot_be_used_is_refused(folder: Path, options: list[str], expected: str) -> None:
    with pytest.raises(SettingError, match=expected):
        adapters(folder, *options)


def test_the_weights_of_the_model_are_counted_and_loaded_once(folder: Path) -> None:
    base = locate(parse_spec(None))
    facts = read_facts(base.path)
    models = with_adapters([base], ["base"], [f"x={folder}/a.gguf"])
    alone, adapted = fit_models([(model, facts) for model in models], EngineSettings(share_weights=True))
    assert not alone.load_message.pack_weights
    assert not adapted.load_message.pack_weights
    assert alone.memory_bytes - adapted.memory_bytes > facts.size_bytes


def test_adapters_belong_to_one_model(folder: Path) -> None:
    with pytest.raises(SettingError, match="adds adapters to one model, but 2 models are served"):
        with_adapters([BASE, BASE], ["a", "b"], [f"x={folder}/a.gguf"])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"lora_dir": Path()}, "--lora-dir and --lora-key belong together"),
        ({"lora_keys": ("given-1",)}, "--lora-dir and --lora-key belong together"),
        ({"lora_dir": Path(), "lora_keys": ("given-1",)}, "the server has none"),
        ({"lora_dir": Path("none"), "lora_keys": ("x",), "keys": (Key("x", b""),)}, "there is no such folder"),
    ],
)
def test_adapters_are_loaded_at_run_time_only_with_a_folder_and_a_key(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(SettingError, match=expected):
        Config(**fields)


def test_a_folder_of_adapters_belongs_to_one_model_of_the_built_in_engine(folder: Path) -> None:
    several = WantedModels((str(folder), str(folder)), further_adapters=True)
    for wanted, engine in ((several, "vllm"), (WantedModels(("m",), further_adapters=True), "http")):
        with pytest.raises(SettingError, match=f"--lora-dir cannot be used with --engine {engine}"):
            folders_of(wanted, engine)
    twice = WantedModels(("afterword-tiny", "afterword-tiny"), ("a", "b"), further_adapters=True)
    with pytest.raises(SettingError, match="adds adapters to one model, but 2 models are served"):
        make_model_manager(twice, EngineSettings(), None, QueuePolicy())


def test_a_further_adapter_has_the_context_of_its_base_and_the_memory_that_is_left(folder: Path) -> None:
    base = locate(parse_spec(None))
    adapter = write_adapter(folder / "a.gguf", {}, architecture=read_facts(base.path).architecture)
    settings = EngineSettings(context=256, parallel=4)
    models = make_model_manager(WantedModels(further_adapters=True), settings, None, QueuePolicy())
    assert models.define_adapter is not None
    defined = models.define_adapter("new", adapter, 2**40)
    (served,) = models
    assert (defined.id, defined.parent) == ("new", served.id)
    assert (defined.context, defined.sequences) == (256, 4)
    with pytest.raises(SettingError, match=r"GiB of memory, but 0.00 GiB are available"):
        models.define_adapter("new", adapter, 1000)
