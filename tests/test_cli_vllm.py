"""Tests of the command line of `--engine vllm`: flags, settings that have no meaning for it, and the model's folder."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from afterword.cli import main, vllm_setup
from afterword.cli.model_setup import WantedModels
from afterword.cli.run import engine_settings
from afterword.cli.startup_message import startup_message
from afterword.config import Config, EngineSettings
from afterword.engine.parent.job_queue import QueuePolicy
from afterword.engine.parent.model_manager import ManagedModel
from afterword.engine.vllm.model_folder import read_folder
from afterword.errors import SettingError


def serve_options(*words: str) -> dict[str, Any]:
    """The values that `afterword serve` gets from these words."""
    return main.commands["serve"].make_context("serve", list(words)).params


def test_words_after_two_dashes_are_flags_for_vllm():
    options = serve_options("folder", "--engine", "vllm", "--", "--dtype", "float32", "--x", "a b")
    assert options["models"] == ("folder",)
    assert vllm_setup.vllm_flags(EngineSettings(), options["vllm_flags"]) == ("--dtype", "float32", "--x", "a b")


def test_a_model_after_two_dashes_is_still_a_model():
    assert serve_options("--", "model.gguf")["models"] == ("model.gguf",)


def test_context_and_parallel_are_flags_for_vllm():
    flags = vllm_setup.vllm_flags(EngineSettings(context=1000, parallel=4), "--dtype float32")
    assert flags == ("--dtype", "float32", "--max-model-len=1001", "--max-num-seqs=4")


@pytest.mark.parametrize(
    "flag",
    [
        *("--model", "--skip-tokenizer-init", "--max_logprobs=5", "--logits-processors", "--config x.yaml"),
        *("--speculative-config {}", "--speculative_config.method=ngram", "--speculative-config.method ngram"),
        *("-sc {}", "-sc={}", "-sc.method=ngram", "-s {}", "-s.method ngram"),
        *("--spec-method ngram", "--spec_model=x", "--spec-tokens=2", "--generation-config.x=1"),
    ],
)
def test_flags_that_would_change_what_is_promised_are_refused(flag):
    with pytest.raises(SettingError, match="cannot be given to vLLM"):
        vllm_setup.vllm_flags(EngineSettings(), f"--dtype float32 {flag}")


BACKEND = "--distributed-executor-backend"


@pytest.mark.parametrize(
    "flag", [f"{BACKEND}=ray", f"{BACKEND} ray", BACKEND, "--data_parallel_backend ray", "-dpb=ray"]
)
def test_processes_that_vllm_does_not_start_itself_are_refused(flag):
    with pytest.raises(SettingError, match="must be mp or uni"):
        vllm_setup.vllm_flags(EngineSettings(), f"{flag} --dtype float32")


def test_flags_that_look_like_refused_ones_are_accepted():
    text = f"{BACKEND}=mp -dpb mp --config-format auto --specialize-active-lora --scheduling-policy fcfs"
    assert vllm_setup.vllm_flags(EngineSettings(), text) == tuple(text.split())


def test_flags_after_two_dashes_follow_those_of_the_option():
    options = serve_options("folder", "--vllm-flags", "--seed 3", "--", "--dtype", "float32")
    assert options["vllm_flags"] == "--seed 3 --dtype float32"


def test_flags_after_two_dashes_take_precedence_over_the_environment(monkeypatch):
    monkeypatch.setenv("AFTERWORD_SERVE_VLLM_FLAGS", "--seed 3")
    assert serve_options("folder", "--vllm-flags", "--x")["vllm_flags"] == "--x"
    assert serve_options("folder", "--", "--dtype", "float32")["vllm_flags"] == "--dtype float32"
    assert serve_options("folder")["vllm_flags"] == "--seed 3"


def test_a_file_whose_name_begins_with_a_dash_can_be_named(capsys):
    with pytest.raises(SystemExit):
        main(["serve", "--", "-m.gguf"])
    assert "./-m.gguf" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "value"), [("context", 15), ("context", 0), ("context", -2), ("parallel", 0)])
def test_sizes_that_no_engine_can_have_are_refused(name, value):
    with pytest.raises(SettingError, match=f"--{name} {value}"):
        EngineSettings(**{name: value})


def test_flags_with_an_open_quote_are_refused():
    with pytest.raises(SettingError, match="--vllm-flags"):
        vllm_setup.vllm_flags(EngineSettings(), "--dtype 'float32")


@pytest.mark.parametrize(
    ("settings", "option"),
    [
        ({"kv_type": "f16"}, "--kv-type"),
        ({"threads": 1}, "--threads"),
        ({"speculate": "ngram"}, "--speculate"),
        ({"gpu_layers": -1}, "--gpu-layers"),
        ({"cache_dir": Path("cache")}, "--cache-dir"),
        ({"cache_bytes": 10**6}, "--cache-size"),
    ],
)
def test_settings_of_the_built_in_engine_are_refused(settings, option):
    with pytest.raises(SettingError, match=f"{option} cannot be used with --engine vllm"):
        vllm_setup.check_settings(EngineSettings(**settings))


def test_adapters_are_refused(tmp_path):
    wanted = WantedModels([str(tmp_path)], (), ("style=style.gguf",))
    with pytest.raises(SettingError, match="--lora cannot be used with --engine vllm"):
        vllm_setup.make_vllm_manager(wanted, EngineSettings(), {}, QueuePolicy())


def test_settings_for_both_engines_are_accepted():
    vllm_setup.check_settings(EngineSettings(context=512, parallel=2, verbose=True, infill_template="{prefix}{suffix}"))


@pytest.mark.parametrize("engine", ["vllm", "http"])
def test_only_drafts_that_are_asked_for_are_refused(engine):
    vllm_setup.check_settings(engine_settings(serve_options()), engine)
    vllm_setup.check_settings(engine_settings(serve_options("--speculate", "off")), engine)
    with pytest.raises(SettingError, match=f"--speculate cannot be used with --engine {engine}: drafts are verified"):
        vllm_setup.check_settings(engine_settings(serve_options("--speculate", "ngram")), engine)


def test_the_interpreter_must_exist():
    assert vllm_setup.find_python(sys.executable) == sys.executable
    with pytest.raises(SettingError, match="no such program"):
        vllm_setup.find_python("/nowhere/python")
    with pytest.raises(SettingError, match="--vllm-python PATH"):
        vllm_setup.find_python(None)


# ---- models that are not loaded yet


def planned(folder: Path, settings: EngineSettings, flags: str = "") -> ManagedModel:
    """The only model of a server that loads it on demand."""
    options = {"vllm_python": sys.executable, "vllm_flags": flags, "keep_alive": 60.0}
    (model,) = vllm_setup.make_vllm_manager(WantedModels([str(folder)], (), ()), settings, options, QueuePolicy())
    return model


@pytest.mark.parametrize(
    ("settings", "flags", "context"),
    [({"context": 50}, "", 50), ({"context": 50}, "--max-model-len 9", 50), ({}, "", 76), ({}, "--max_model_len=9", 0)],
)
def test_the_context_is_known_before_the_first_load(tmp_path, settings, flags, context):
    folder = folder_with(tmp_path, config={"max_position_embeddings": 77})
    model = planned(folder, EngineSettings(**settings), flags)
    assert model.shape.context == context
    assert model.state == "unloaded"


def test_the_startup_message_names_no_size_that_is_unknown(tmp_path):
    model = planned(folder_with(tmp_path), EngineSettings(parallel=3))
    assert model.shape.sequences == 3
    manager = vllm_setup.ModelManager([model.definition], keep_alive=60.0)
    assert "sequences of" not in startup_message(manager, Config(), 8000)
    manager = vllm_setup.ModelManager([replace(model.definition, context=76)], keep_alive=60.0)
    assert "3 sequences of 76 tokens" in " ".join(startup_message(manager, Config(), 8000).split())


# ---- the folder


def folder_with(path: Path, **files: Any) -> Path:
    for name, content in {"config": {}, "tokenizer": {}, **files}.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(SettingError, match=r"no config\.json"):
        read_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SettingError, match=r"no tokenizer\.json"):
        read_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(SettingError, match="no JSON object"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({"config": {"eos_token_id": 2}}, (2,)),
        ({"config": {"eos_token_id": 2}, "generation_config": {"eos_token_id": [5, 6]}}, (5, 6)),
        ({}, ()),
    ],
)
def test_the_generation_settings_name_the_end_tokens(tmp_path, files, ends):
    assert read_folder(folder_with(tmp_path, **files)).end_tokens == ends


def write_safetensors(path: Path, shapes: dict[str, list[int]]) -> None:
    """Write the header of a file with tensors of these shapes."""
    header = json.dumps({"__metadata__": {}, **{name: {"shape": shape} for name, shape in shapes.items()}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def test_parameters_are_counted_in_the_headers(tmp_path):
    folder = folder_with(tmp_path, config={"max_position_embeddings": 77})
    write_safetensors(folder / "a.safetensors", {"x": [3, 4], "y": [5]})
    write_safetensors(folder / "b.safetensors", {"z": [2]})
    found = read_folder(folder)
    assert (found.count_parameters(), found.trained_context) == (19, 77)
    assert [Path(name).name for name in found.files] == [
        "config.json",
        "tokenizer.json",
        "a.safetensors",
        "b.safetensors",
    ]
    (folder / "b.safetensors").write_bytes(b"no")
    with pytest.raises(SettingError, match="no valid safetensors"):
        read_folder(folder).count_parameters()
