"""The command line as a person meets it: what it prints, and one plain sentence for every bad setting."""

from __future__ import annotations

import shlex
import socket

import pytest
from click.testing import CliRunner, Result

from afterword import __version__
from afterword.cli import greeting, main, open_frame
from afterword.completion.limits import Limits
from afterword.completion.request import parse
from afterword.config import Config, EngineSettings, advice, promise
from afterword.engine.protocol import Card
from afterword.models.gguf import read_facts
from afterword.models.registry import Model
from oracle.tiny import write_tiny


def afterword(*words: str, stdin: str | None = None, **environment: str) -> Result:
    return CliRunner().invoke(main, words, input=stdin, env=environment, prog_name="afterword")


def refusal(*words: str, **environment: str) -> str:
    result = afterword(*words, **environment)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, "one sentence"
    return result.stderr


def test_version_and_help():
    assert __version__ in afterword("--version").output
    for command in ("serve", "complete", "models", "pull"):
        assert command in afterword("--help").output
        assert "Usage" in afterword(command, "--help").output


def test_complete_writes_the_continuation_and_a_seed_repeats_it():
    first = afterword("complete", "Once upon a time", "--max-tokens", "12", "--seed", "7")
    assert first.exit_code == 0, first.output
    assert len(first.stdout) > 12
    assert afterword("complete", "Once upon a time", "--max-tokens", "12", "--seed", "7").stdout == first.stdout
    assert afterword("complete", "Once upon a time", "--max-tokens", "12", "--seed", "8").stdout != first.stdout


def test_complete_reads_standard_input_echoes_and_fills_gaps():
    result = afterword("complete", "-", "--echo", "--suffix", " The end.", "--max-tokens", "4", stdin="One day")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("One day")
    assert "The end." not in result.stdout


def test_complete_runs_another_model(tmp_path):
    path = write_tiny(tmp_path / "other.gguf", infill=False)
    assert afterword("complete", "a", "--model", str(path), "--max-tokens", "3").exit_code == 0
    assert "suffix is not supported" in refusal("complete", "a", "--model", str(path), "--suffix", "b")


def test_models_lists_the_built_in_one(tmp_path):
    result = afterword("models", HF_HUB_CACHE=str(tmp_path))
    assert result.stdout.split()[0] == "afterword-tiny"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["serve", "nothing-here.gguf"], "does not exist"),
        (["serve", "--parallel", "0"], "parallel"),
        (["serve", "--parallel", "257"], "parallel"),
        (["serve", "--context", "1000000"], "trained on"),
        (["serve", "--context", "1"], "too short"),
        (["serve", "--threads", "0"], "cores"),
        (["serve", "--threads", "100000"], "cores"),
        (["serve", "--batch", "1"], "from 64"),
        (["serve", "--gpu-layers", "-2"], "gpu-layers"),
        (["serve", "--host", "0.0.0.0"], "no API keys"),
        (["serve", "--host", "::"], "no API keys"),
        (["serve", "--api-key", ""], "empty"),
        (["serve", "--api-key-file", "nowhere.txt"], "cannot be read"),
        (["serve", "hf:not a name"], "does not name a model"),
        (["serve", "hf:owner/repo"], "afterword pull"),
        (["complete", "a", "--max-tokens", "-1"], "max_tokens"),
        (["complete", "a", "--temperature", "3"], "temperature"),
        (["pull", "model.gguf"], "not on the Hub"),
    ],
)
def test_bad_settings_are_one_sentence(words, said, tmp_path):
    assert said in refusal(*words, HF_HUB_CACHE=str(tmp_path))


@pytest.mark.parametrize(
    ("file_type", "settings", "kv_type"),
    [
        ("Q8_0", {}, "exact"),
        ("Q4_0", {}, "exact"),
        ("F16", {}, "exact"),
        ("Q8_0", {"kv_type": "f32"}, "f32"),
        ("Q8_0", {"gpu_layers": -1}, "f16"),
    ],
)
def test_numbers_are_exact_by_default_where_that_holds(file_type, settings, kv_type, tmp_path):
    path = write_tiny(tmp_path / "tiny.gguf", file_type=file_type)
    opened = open_frame(Model("tiny", path, "file"), read_facts(path), EngineSettings(**settings))
    assert (opened.kv_type, opened.threads) == (kv_type, 1)


def test_a_file_that_is_no_model_is_one_sentence(tmp_path):
    path = tmp_path / "page.gguf"
    path.write_text("<!DOCTYPE html><html>", encoding="utf-8")
    assert "page.gguf" in refusal("serve", str(path))


def test_too_little_memory_says_how_much_is_missing(monkeypatch):
    monkeypatch.setattr("afterword.cli.available_memory", lambda: 2**20)
    assert "GiB" in refusal("complete", "a")


def test_a_port_that_is_taken_is_one_sentence():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"port {port}" in refusal("serve", "--port", port)


def test_the_environment_sets_what_the_command_line_does_not():
    assert "from 64" in refusal("serve", AFTERWORD_SERVE_BATCH="1")
    assert "from 64" in refusal("complete", "a", AFTERWORD_COMPLETE_BATCH="1")


@pytest.mark.parametrize(
    ("file_type", "experts", "kv_type", "layers", "expected"),
    [
        ("Q8_0", 0, "exact", 0, "exact"),
        ("Q4_K_M", 0, "f16", 0, "reproducible"),
        ("F16", 0, "exact", 0, "exact"),
        ("F16", 0, "f16", 0, "none"),
        ("Q8_0", 8, "exact", 0, "none"),
        ("Q8_0", 0, "f16", -1, "none"),
    ],
)
def test_only_what_was_measured_is_promised(file_type, experts, kv_type, layers, expected):
    assert promise(file_type, experts, kv_type, layers) == expected


@pytest.mark.parametrize(
    ("file_type", "said"),
    [("F16", "Q8_0"), ("BF16", "Q8_0"), ("Q4_K_M", "Q4_0"), ("Q6_K", "Q4_0"), ("Q8_0", None), ("Q4_0", None)],
)
def test_a_better_type_for_this_machine_is_named(file_type, said):
    tip = advice(file_type)
    assert (tip is None) if said is None else said in str(tip)


def test_the_curl_line_of_the_greeting_is_a_valid_request():
    name = 'it\'s "mine"'
    card = Card(5_000_000, 2048, 16, (), (), None, None, False, False, 0, None, "fp")
    words = shlex.split(greeting(name, card, Config(host="::1"), 8000).split("Try it:")[1].replace("\\\n", " "))
    assert words[:2] == ["curl", "http://[::1]:8000/v1/completions"]
    assert parse(words[words.index("-d") + 1].encode(), Limits()).model == name
