"""The commands serve, complete, models and pull: output, one-line errors, and the setup of models."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import re
import shlex
import socket
from itertools import cycle
from string import ascii_letters
from typing import Any
from unittest.mock import Mock

import msgspec
import pytest
from click.testing import CliRunner, Result
from rich.console import Console
from rich.progress import Progress

from afterword import __version__
from afterword.cli import main
from afterword.cli.load_progress import show_loading
from afterword.cli.model_setup import fit_models, load_message, refreshed_load_message
from afterword.cli.models import ProgressBars, ProgressLines
from afterword.cli.startup_message import startup_message
from afterword.completion.request import parse
from afterword.completion.request_limits import RequestLimits
from afterword.config import ONE_SEQUENCE, Config, EngineSettings, WeightTypes, advice
from afterword.engine.parent.model_manager import ModelDefinition, ModelManager
from afterword.errors import SettingError
from afterword.keys.key import static_keys
from afterword.models.gguf_facts import Facts, read_facts
from afterword.models.registry import Model
from afterword.settings.durations import format_duration, parse_duration
from oracle.tiny import write_tiny
from scripted_engine import MODEL_INFO
from sim import virtual


def afterword(*words: str, stdin: str | None = None, **environment: str) -> Result:
    return CliRunner().invoke(main, words, input=stdin, env=environment, prog_name="afterword")


def refusal(*words: str, **environment: str) -> str:
    result = afterword(*words, **environment)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, "one line"
    return result.stderr


def test_version_and_help():
    assert __version__ in afterword("--version").output
    for command in ("serve", "complete", "models", "pull"):
        assert command in afterword("--help").output
        assert "Usage" in afterword(command, "--help").output


def test_complete_writes_the_continuation_and_a_seed_repeats_it():
    def written(seed: int) -> str:
        result = afterword("complete", "Once upon a time", "--max-tokens", "12", "--seed", str(seed))
        assert result.exit_code == 0, result.output
        return result.stdout

    first = written(7)
    assert len(first) > 12
    assert written(7) == first
    assert written(8) != first


def test_complete_reads_standard_input_echoes_and_fills_gaps():
    result = afterword("complete", "-", "--echo", "--suffix", " The end.", "--max-tokens", "4", stdin="One day")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("One day")
    assert "The end." not in result.stdout


def test_complete_runs_another_model(tmp_path):
    path = write_tiny(tmp_path / "other.gguf", infill=False)
    assert afterword("complete", "a", "--model", str(path), "--max-tokens", "3").exit_code == 0
    assert "suffix is not supported" in refusal("complete", "a", "--model", str(path), "--suffix", "b")


def test_models_lists_installed_models(tmp_path):
    folders = {"HF_HUB_CACHE": str(tmp_path), "HOME": str(tmp_path), "OLLAMA_MODELS": str(tmp_path)}
    studio = tmp_path / ".lmstudio" / "models" / "owner" / "repo"
    studio.mkdir(parents=True)
    write_tiny(studio / "other.gguf")
    (studio / "bad.gguf").write_bytes(b"<html>")
    heading, builtin, other, _, reason, bad = afterword("models", **folders).stdout.splitlines()
    assert heading.split() == ["NAME", "SIZE", "TYPE", "CONTEXT", "FROM"]
    assert builtin.split() == ["afterword-tiny", "6.4", "MiB", "Q8_0", "2048", "built-in"]
    assert other.split()[0] == "lmstudio:owner/repo/other"
    assert reason == "These cannot be used:"
    assert bad.startswith("lmstudio:owner/repo/bad: ")
    listed = {model["spec"]: model for model in json.loads(afterword("models", "--json", **folders).stdout)}
    assert listed["lmstudio:owner/repo/other"]["path"] == str(studio / "other.gguf")
    assert "web page" in listed["lmstudio:owner/repo/bad"]["problem"]
    result = afterword("complete", "a", "--model", "lmstudio:owner/repo/other", "--max-tokens", "2", **folders)
    assert result.exit_code == 0, result.output


def test_models_lists_unusable_files_with_the_reason(tmp_path):
    folders = {"HF_HUB_CACHE": str(tmp_path), "HOME": str(tmp_path), "OLLAMA_MODELS": str(tmp_path)}
    studio = tmp_path / ".lmstudio" / "models" / "owner" / "repo"
    studio.mkdir(parents=True)
    data = write_tiny(studio / "m\udcff.gguf").read_bytes()
    (studio / "tokens.gguf").write_bytes(data.replace(b"gpt2", b"none", 1))
    (studio / "link.gguf").symlink_to("gone.gguf")
    (studio / "cut.gguf").write_bytes(data[:-1])
    broken = afterword("models", **folders).stdout.split("These cannot be used:\n")[1]
    listed = {model["spec"]: model for model in json.loads(afterword("models", "--json", **folders).stdout)}
    for name, reason in {
        r"m\xff": "is not valid UTF-8",
        "tokens": "has no vocabulary",
        "link": "is a link to gone.gguf, which cannot be found",
        "cut": "is damaged or cut short",
    }.items():
        assert reason in listed[f"lmstudio:owner/repo/{name}"]["problem"]
        assert f"lmstudio:owner/repo/{name}: {listed[f'lmstudio:owner/repo/{name}']['problem']}" in broken


def test_a_model_of_ollama_runs(tmp_path):
    data = write_tiny(tmp_path / "tiny.gguf").read_bytes()
    digest = "a" * 64
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}"}
    manifest = tmp_path / "manifests" / "registry.ollama.ai" / "library" / "tiny" / "latest"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"layers": [layer]}))
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / f"sha256-{digest}").write_bytes(data)
    result = afterword("complete", "a", "--model", "ollama:tiny", "--max-tokens", "2", OLLAMA_MODELS=str(tmp_path))
    assert result.exit_code == 0, result.output


def test_pull_prints_the_path_of_the_model(tmp_path):
    folder = tmp_path / "models--owner--repo" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    path = write_tiny(folder / "m-Q8_0.gguf")
    printed = afterword("pull", "hf:owner/repo", HF_HUB_CACHE=str(tmp_path)).stdout
    assert printed == f"owner/repo:Q8_0 is at {path}. Serve it with: afterword serve hf:owner/repo:Q8_0\n"
    printed = afterword("pull", "owner/repo", "--json", HF_HUB_CACHE=str(tmp_path)).stdout
    assert json.loads(printed) == {
        "spec": "hf:owner/repo:Q8_0",
        "id": "owner/repo:Q8_0",
        "path": str(path),
        "size_bytes": path.stat().st_size,
    }


def test_download_progress_without_a_terminal_is_printed_as_lines(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    lines = ProgressLines()
    lines.selected("m-Q8_0.gguf", ["m-Q4_0.gguf"])
    lines.started("m-Q8_0.gguf", 100 * 2**20, 10 * 2**20)
    for now in range(1, 31):  # noqa: B007 - the clock
        lines.received(2**20)
    lines.checking("m-Q8_0.gguf")
    assert capsys.readouterr().err.splitlines() == [
        "Selected m-Q8_0.gguf, the best of 2 files; the others are m-Q4_0.gguf.",
        "m-Q8_0.gguf: 100.0 MiB, 10.0 MiB already downloaded",
        "m-Q8_0.gguf: 20.0 MiB, 1.0 MiB/s, 80 s left",
        "m-Q8_0.gguf: 30.0 MiB, 1.0 MiB/s, 70 s left",
        "m-Q8_0.gguf: 40.0 MiB, 1.0 MiB/s, 60 s left",
        "m-Q8_0.gguf: checking",
    ]


def test_download_progress_on_a_terminal_is_a_bar():
    screen = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Progress(console=screen, auto_refresh=False) as progress:
        bars = ProgressBars(progress)
        bars.checking("m.gguf")  # it was downloaded before
        bars.started("folder/m.gguf", 100, 10)
        bars.received(40)
        (task,) = progress.tasks
        assert (task.description, task.completed, task.total) == ("m.gguf", 50, 100)
        bars.selected("a", ["b [c]"])
        bars.checking("folder/m.gguf")
        assert task.description == "m.gguf, checking"
    assert "the others are b [c]." in screen.file.getvalue()


def test_load_progress_is_shown_on_a_terminal_after_a_delay(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    async def load(screen, seconds):
        monkeypatch.setattr("sys.stderr", screen)
        share = 0.0
        async with show_loading({"large": lambda: share}):
            await asyncio.sleep(seconds)
            share = 0.5
            await asyncio.sleep(seconds)

    quick, slow, file = Terminal(), Terminal(), io.StringIO()
    virtual.run(load(quick, 0.4))
    virtual.run(load(slow, 10))
    virtual.run(load(file, 10))
    assert "Loading large" in slow.getvalue()
    assert "50%" in slow.getvalue()
    assert quick.getvalue() == file.getvalue() == ""


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("300", 300),
        ("0", 0),
        ("1.5", 1.5),
        ("90s", 90),
        ("5m", 300),
        ("1h30m", 5400),
        (" 1H ", 3600),
        ("forever", None),
        ("-1", None),
    ],
)
def test_durations_are_parsed(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "5x", "five", "-5", "1m1h", "inf", "nan", "1e3"])
def test_invalid_durations_are_refused(text):
    assert "is not a duration" in refusal("serve", "--keep-alive", text)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 seconds"), (1, "1 second"), (90, "90 seconds"), (60, "1 minute"), (300, "5 minutes"), (7200, "2 hours")],
)
def test_durations_are_formatted(seconds, words):
    assert format_duration(seconds) == words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["serve", "nothing-here.gguf"], "does not exist"),
        (["serve", "m\udcff.gguf"], r"m\xff.gguf is not valid UTF-8"),
        (["serve", "--alias", "m\udcff"], r"m\xff is not valid UTF-8"),
        (["complete", "a", "--model", "m\udcff.gguf"], r"m\xff.gguf is not valid UTF-8"),
        (["serve", "--parallel", "0"], "parallel"),
        (["serve", "--parallel", "257"], "parallel"),
        (["serve", "--context", "1000000"], "trained on"),
        (["serve", "--context", "1"], "too short"),
        (["serve", "--threads", "0"], "cores"),
        (["serve", "--threads", "100000"], "cores"),
        (["serve", "--batch", "1"], "from 64"),
        (["serve", "--gpu-layers", "-2"], "gpu-layers"),
        (["serve", "--reproducible"], "requires --gpu-layers -1"),
        (["serve", "--reproducible", "--gpu-layers", "-1", "--kv-type", "f32"], "requires --kv-type f16"),
        (["serve", "--host", "0.0.0.0"], "no API keys"),
        (["serve", "--host", "::"], "no API keys"),
        (["serve", "--api-key", ""], "empty"),
        (["serve", "--api-key-file", "nowhere.txt"], "cannot be read"),
        (["serve", "hf:not a name"], "does not name a model"),
        (["serve", "hf:owner/repo"], "afterword pull"),
        (["complete", "a", "--max-tokens", "-1"], "max_tokens"),
        (["complete", "a", "--temperature", "3"], "temperature"),
        (["pull", "model.gguf"], "not on the Hub"),
        (["serve", "afterword-tiny", "afterword-tiny"], "2 models would be called afterword-tiny"),
        (["serve", "afterword-tiny", "--alias", "a", "--alias", "b"], "2 aliases and 1 models"),
        (["serve", "afterword-tiny", "nothing-here.gguf"], "nothing-here.gguf does not exist"),
        (["serve", "ollama:nothing"], "is not on this machine"),
    ],
)
def test_invalid_settings_are_one_line_errors(words, message, tmp_path):
    assert message in refusal(*words, HF_HUB_CACHE=str(tmp_path))


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
def test_the_default_kv_type_is_exact_on_a_cpu(file_type, settings, kv_type, tmp_path):
    path = write_tiny(tmp_path / "tiny.gguf", file_type=file_type)
    opened = load_message(Model("tiny", path, "file"), read_facts(path), EngineSettings(**settings))
    assert (opened.kv_type, opened.threads) == (kv_type, 1)


def test_a_model_on_a_gpu_is_fitted_to_the_gpu_memory(tmp_path, monkeypatch):
    path = write_tiny(tmp_path / "tiny.gguf", file_type="Q8_0")
    model = Model("tiny", path, "file")
    monkeypatch.setattr("afterword.cli.model_setup.available_memory", lambda: 2**31)
    monkeypatch.setattr("afterword.cli.model_setup.gpu_memory", lambda: 2**20)
    for settings in ({}, {"gpu_layers": 1}):
        assert load_message(model, read_facts(path), EngineSettings(**settings)).sequences == 16
    with pytest.raises(SettingError, match=r"0\.00 GiB are available"):
        load_message(model, read_facts(path), EngineSettings(gpu_layers=-1))
    monkeypatch.setattr("afterword.cli.model_setup.gpu_memory", lambda: None)
    assert load_message(model, read_facts(path), EngineSettings(gpu_layers=-1)).sequences == 16


def test_reproducible_on_a_gpu_uses_forward_passes_of_one_shape(tmp_path):
    path = write_tiny(tmp_path / "tiny.gguf", file_type="Q8_0")
    settings = EngineSettings(gpu_layers=-1, reproducible=True)
    opened = load_message(Model("tiny", path, "file"), read_facts(path), settings)
    assert (opened.fixed_shape, opened.sequences, opened.promise) == (True, 15, "reproducible")
    assert opened.grid == opened.chunk == 256


def test_a_file_that_is_not_a_model_is_a_one_line_error(tmp_path):
    path = tmp_path / "page.gguf"
    path.write_text("<!DOCTYPE html><html>", encoding="utf-8")
    assert "page.gguf" in refusal("serve", str(path))


@pytest.mark.parametrize(
    ("count", "unload_unused", "threads"),
    [(1, False, 8), (1, True, 8), (2, False, 4), (3, False, 2), (9, False, 1), (9, True, 4)],
)
def test_models_share_the_cores(tmp_path, monkeypatch, count, unload_unused, threads):
    monkeypatch.setattr("afterword.cli.model_setup.cores", lambda: 8)
    path = write_tiny(tmp_path / "tiny.gguf")
    large = dataclasses.replace(read_facts(path), size_bytes=2**27)
    fitted = fit_models([(Model("tiny", path, "file"), large)] * count, EngineSettings(parallel=1), unload_unused)
    assert [each.load_message.threads for each in fitted] == [threads] * count
    explicit = fit_models(
        [(Model("tiny", path, "file"), large)] * count, EngineSettings(parallel=1, threads=3), unload_unused
    )
    assert {each.load_message.threads for each in explicit} == {3}


def test_a_replaced_file_gets_a_new_load_message(tmp_path):
    path, settings = tmp_path / "tiny.gguf", EngineSettings(threads=2)

    def write(**changes: Any) -> Facts:
        return read_facts(write_tiny(path, **{"file_type": "Q8_0"} | changes))

    (fitted,) = fit_models([(Model("tiny", path, "file"), write())], settings)
    write(seed=1)
    assert refreshed_load_message(fitted, settings) == fitted.load_message, "only the weights differ"
    write(context=1024, vocabulary="spm")
    other = refreshed_load_message(fitted, settings)
    assert (other.context, other.sequences, other.threads) == (512, 16, 2), "clients know the context"
    write(context=256)
    with pytest.raises(SettingError, match="more than the 256"):
        refreshed_load_message(fitted, settings)
    path.write_bytes(b"<html>")
    with pytest.raises(SettingError, match="web page"):
        refreshed_load_message(fitted, settings)


def test_models_that_do_not_fit_together_may_take_turns(tmp_path, monkeypatch):
    paths = [write_tiny(tmp_path / name) for name in ("a.gguf", "b.gguf")]
    found = [(Model(path.stem, path, "file"), read_facts(path)) for path in paths]
    need = fit_models(found[:1], EngineSettings(context=64, parallel=1))[0].memory_bytes
    monkeypatch.setattr("afterword.cli.model_setup.available_memory", lambda: need * 3 // 2)
    small = EngineSettings(context=64, parallel=1)
    with pytest.raises(SettingError, match="take turns with --keep-alive"):
        fit_models(found, small)
    assert [fitted.memory_bytes for fitted in fit_models(found, small, unload_unused=True)] == [need, need]


def test_too_little_memory_is_an_error_with_sizes(monkeypatch):
    monkeypatch.setattr("afterword.cli.model_setup.available_memory", lambda: 2**20)
    assert "GiB" in refusal("complete", "a")


def test_a_port_in_use_is_a_one_line_error():
    with socket.create_server(("127.0.0.1", 0)) as occupied:
        port = occupied.getsockname()[1]
        message = refusal("serve", "--port", str(port))
    other = f"--port {port + 1 if port < 65535 else 8000}"
    assert message == (
        f"afterword: Cannot listen on 127.0.0.1 port {port}: Address already in use. "
        f'Name another port: {other}, or make serve ARGS="{other}".\n'
    )


def test_the_environment_sets_options():
    assert "from 64" in refusal("serve", AFTERWORD_SERVE_BATCH="1")
    assert "from 64" in refusal("complete", "a", AFTERWORD_COMPLETE_BATCH="1")


@pytest.mark.parametrize(
    ("architecture", "types", "experts", "kv_type", "expected"),
    [
        ("llama", "Q8_0", 0, "exact", ("exact", "exact")),
        ("qwen3", "Q4_K Q6_K", 0, "f16", ("reproducible", "reproducible")),
        ("llama", "Q4_K Q6_K Q4_1", 0, "exact", ("exact", "exact")),
        ("llama", "F16", 0, "exact", ("exact", "none")),
        ("llama", "Q8_0 F32", 0, "exact", ("exact", "none")),
        ("llama", "IQ4_NL Q6_K", 0, "exact", ("exact", "exact")),
        ("llama", "Q4_K Q6_K IQ4_NL", 0, "exact", ("exact", "none")),
        ("llama", "MXFP4 F16", 0, "exact", ("exact", "none")),
        ("llama", "IQ4_XS Q5_K Q6_K", 0, "exact", ("exact", "none")),
        # types that are not in the name of the file
        ("llama", "Q4_K Q6_K IQ3_S", 0, "exact", ("none", "none")),
        ("llama", "", 0, "exact", ("none", "none")),
        # mixtures of experts, with the kernels' products only
        ("llama", "Q8_0", 8, "exact", ("exact", "none")),
        ("qwen3moe", "F32 Q4_K Q6_K", 128, "exact", ("exact", "none")),
        ("qwen3moe", "F32 Q8_0", 128, "f16", ("reproducible", "none")),
        ("qwen3moe", "F32 IQ3_S", 128, "exact", ("none", "none")),
        # no test shows that they are reproducible
        ("qwen35", "F32 Q8_0", 32, "exact", ("none", "none")),
        ("qwen3", "Q8_0", 8, "exact", ("none", "none")),
        ("deepseek2", "Q8_0", 0, "f16", ("none", "none")),
        ("deepseek2", "Q8_0 IQ3_S", 64, "exact", ("none", "none")),
        # only the kernels' products were tested
        ("deepseek2", "Q8_0", 64, "exact", ("exact", "none")),
        ("gemma3n", "Q8_0", 0, "exact", ("exact", "none")),
        ("qwen35moe", "Q8_0 F32", 64, "exact", ("exact", "none")),
        ("mamba", "Q8_0", 0, "exact", ("exact", "none")),
        ("jamba", "Q8_0 Q2_K", 0, "exact", ("exact", "none")),
        ("jamba", "Q8_0 IQ3_S", 0, "exact", ("none", "none")),
        ("lfm2", "Q8_0", 0, "f16", ("none", "none")),
        ("plamo2", "Q8_0", 0, "exact", ("none", "none")),
        ("qwen35", "Q4_K Q6_K F32", 0, "exact", ("exact", "none")),
        ("one of tomorrow", "Q8_0", 0, "exact", ("none", "none")),
    ],
)
def test_promises_hold_only_for_tested_models(architecture, types, experts, kv_type, expected):
    """`expected`: the promises with Afterword's kernels, and without them."""
    weights = WeightTypes(architecture, frozenset(types.split()), experts)
    assert tuple(weights.promise(kv_type, with_kernels=own) for own in (True, False)) == expected


@pytest.mark.parametrize(
    ("architecture", "types", "kv_type", "layers", "expected"),
    [
        ("llama", "Q8_0", "f16", -1, "reproducible"),
        ("qwen2", "BF16", "f16", -1, "reproducible"),
        ("llama", "Q4_K Q6_K", "f16", -1, "reproducible"),
        ("llama", "Q5_K Q6_K", "f16", -1, "none"),
        ("gemma2", "Q8_0", "f16", -1, "none"),
        ("llama", "Q8_0", "f32", -1, "none"),
        ("llama", "Q8_0", "f16", 12, "none"),
    ],
)
def test_promises_on_a_gpu_need_forward_passes_of_one_shape(architecture, types, kv_type, layers, expected):
    weights = WeightTypes(architecture, frozenset(types.split()))
    assert weights.promise_on_gpu(kv_type, layers, fixed_shape=True) == expected
    assert weights.promise_on_gpu(kv_type, layers, fixed_shape=False) == "none"
    assert dataclasses.replace(weights, experts=8).promise_on_gpu(kv_type, layers, fixed_shape=True) == "none"


def test_the_promise_depends_on_the_weight_types_in_the_file(tmp_path):
    opened = [
        load_message(Model("tiny", path, "file"), facts, EngineSettings())
        for path in [write_tiny(tmp_path / "tiny.gguf", file_type="F16")]
        for facts in (read_facts(path), dataclasses.replace(read_facts(path), matrix_types=frozenset({"F16", "IQ3_S"})))
    ]
    assert [(each.promise, each.promise_without_kernels) for each in opened] == [("exact", "none"), ("none", "none")]
    assert [(each.kv_type, each.grid) for each in opened] == [("exact", 64)] * 2
    assert [each.use_kernels for each in opened] == [True, False]


@pytest.mark.parametrize("architecture", sorted(ONE_SEQUENCE))
def test_architectures_that_llama_cpp_batches_wrongly_get_one_sequence(tmp_path, architecture):
    path = write_tiny(tmp_path / "tiny.gguf")
    facts = dataclasses.replace(read_facts(path), architecture=architecture)
    assert load_message(Model("tiny", path, "file"), facts, EngineSettings(parallel=4)).sequences == 1
    assert "One sequence" in str(advice("Q8_0", architecture))


@pytest.mark.parametrize(
    ("file_type", "suggestion"),
    [("F16", "Q8_0"), ("BF16", "Q8_0"), ("Q4_K_M", "Q4_0"), ("Q6_K", "Q4_0"), ("Q8_0", None), ("Q4_0", None)],
)
def test_advice_names_a_faster_file_type(file_type, suggestion):
    text = advice(file_type)
    assert (text is None) if suggestion is None else suggestion in str(text)


def test_the_curl_command_of_the_startup_message_is_a_valid_request():
    name = 'it\'s "mine"'
    models = ModelManager([ModelDefinition(name, 0, Mock())])
    message = startup_message(models, Config(host="::1"), 8000)
    words = shlex.split(message[message.index("  curl") :].split("\n\n")[0].replace("\\\n", " "))
    assert words[:2] == ["curl", "http://[::1]:8000/v1/completions"]
    request = parse(words[words.index("-d") + 1].encode(), RequestLimits())
    assert (request.model, request.temperature) == (name, 0.7)


@pytest.mark.parametrize("keep_alive", [None, 300.0])
@pytest.mark.parametrize("keys", [(), static_keys(("secret",), None)])
@pytest.mark.parametrize(
    "names", [("tiny",), ("a", "b"), ("SmolLM2-135M-Instruct.Q4_K_M", "Qwen2.5-Coder-1.5B.Q8_0"), tuple(ascii_letters)]
)
def test_the_startup_message_fits_80_columns_and_begins_with_the_address(names, keys, keep_alive):
    models = ModelManager(
        [
            ModelDefinition(name, 0, Mock(), 4096, 16, 65536, 131072, promise, advice=advice(file_type))
            for name, promise, file_type in zip(names, cycle(("exact", "none")), cycle(("Q4_K_M", "F16")), strict=False)
        ],
        keep_alive=keep_alive,
    )
    message = startup_message(models, Config(host="255.255.255.255", keys=keys, allow_open=True), 65535)
    lines = message.splitlines()
    assert max(map(len, lines)) <= 80
    assert re.match(rf"Afterword \S+ serves {re.escape(names[0])} .*at$", lines[0])
    assert lines[2].strip() == "http://255.255.255.255:65535"
    assert message.index("browser") < message.index("curl") < message.index("sequences")
    assert ("Bearer YOUR_KEY" in message) == bool(keys)
    assert (f"unloaded {format_duration(300)} after" in " ".join(message.split())) == (keep_alive is not None)


@pytest.mark.parametrize(("trained", "named"), [(131072, True), (4097, True), (4096, False), (512, False), (0, False)])
def test_the_startup_message_names_the_context_only_if_the_model_was_trained_on_more(trained, named):
    models = ModelManager([ModelDefinition("tiny", 0, Mock(), context=4096, sequences=16, trained_context=trained)])
    words = startup_message(models, Config(), 8000).split()
    assert ("--context" in words) == named
    assert not named or words[words.index("--context") + 1] == str(trained)


@pytest.mark.parametrize("verifies", [True, False])
def test_the_startup_message_says_where_predictions_have_no_effect(verifies):
    models = ModelManager([ModelDefinition("tiny", 0, Mock())])
    (managed,) = models
    managed.engine = Mock(state="ready", model_info=msgspec.structs.replace(MODEL_INFO, verifies_drafts=verifies))
    message = " ".join(startup_message(models, Config(), 8000).split())
    assert ("Predictions, --speculate and --draft-model have no effect." in message) == (not verifies)
