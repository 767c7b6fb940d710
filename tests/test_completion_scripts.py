"""Shell completion: the protocol between script and program, and the scripts in real shells."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from afterword.cli import main

SHELLS = ("bash", "zsh", "fish")
BIN = Path(sys.executable).parent


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A Hub cache with one model. The current folder is another one, which is empty."""
    snapshot = tmp_path / "hub" / "models--owner--repo" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "repo-Q8_0.gguf").write_bytes(b"GGUF")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return here


def completed(line: str) -> list[str]:
    """The completions of a line with the cursor at its end, as bash receives them: kind and value."""
    result = CliRunner().invoke(
        main, [], prog_name="afterword", env={"_AFTERWORD_COMPLETE": "bash_complete", "COMP_WORDS": line}
    )
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("afterword se", ["plain,serve"]),
        ("afterword keys cr", ["plain,create"]),
        ("afterword serve --kv", ["plain,--kv-type"]),
        ("afterword serve --kv-type e", ["plain,exact"]),
        ("afterword serve --kv-type=f", ["plain,f16", "plain,f32"]),
        ("afterword serve --config ", ["file,"]),
        ("afterword completion ", ["plain,bash", "plain,zsh", "plain,fish"]),
        ("afterword serve --port 9000 afterword-", ["plain,afterword-tiny"]),
        ("afterword serve ", ["plain,afterword-tiny", "plain,hf:owner/repo:Q8_0"]),
        ("afterword serve hf:own", ["plain,hf:owner/repo:Q8_0"]),
        ("afterword complete --model hf:owner/repo:", ["plain,hf:owner/repo:Q8_0"]),
        ("afterword complete 'an open quote --", [""]),
    ],
)
def test_completions_of_a_line(line, expected, cache):
    assert completed(line) == expected


def test_gguf_files_are_completed_and_other_files_left_to_the_shell(cache):
    (cache / "folder").mkdir()
    for name in ("mine.gguf", "notes.txt", "folder/Other.GGUF"):
        (cache / name).touch()
    assert completed("afterword serve m") == ["plain,mine.gguf"]
    assert completed("afterword serve folder/") == ["plain,folder/Other.GGUF"]
    assert completed("afterword serve n") == ["file,n"]
    assert completed("afterword serve nowhere/") == ["file,nowhere/"]


def test_an_unreadable_cache_is_ignored(cache, monkeypatch):
    def broken() -> None:
        raise OSError

    monkeypatch.setattr("afterword.models.registry.installed", broken)
    assert completed("afterword serve x") == ["file,x"]


def test_completion_does_not_import_heavy_modules(cache):
    heavy = {"asyncio", "huggingface_hub", "llama_cpp", "msgspec", "numpy", "psutil", "sqlite3", "starlette"}
    code = "import sys\nfrom afterword.cli import main\ntry: main([], 'afterword')\nfinally: print(*sys.modules)"
    environment = os.environ | {"_AFTERWORD_COMPLETE": "bash_complete", "COMP_WORDS": "afterword serve "}
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    *completions, modules = output.splitlines()
    assert completions[0] == "plain,afterword-tiny"
    assert not heavy & set(modules.split())


# ---- real shells


@pytest.fixture(params=SHELLS)
def shell(request, tmp_path):
    """A shell and the completion script for it."""
    path = shutil.which(request.param)
    if path is None:
        pytest.skip(f"{request.param} is not installed")
    script = tmp_path / f"completion.{request.param}"
    script.write_text(CliRunner().invoke(main, ["completion", request.param]).stdout, encoding="utf-8")
    return path, script


def run(*words: str, **environment: str) -> list[str]:
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"} | environment
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_scripts_have_valid_syntax(shell):
    path, script = shell
    assert run(path, "-n", str(script)) == []


def in_bash(script: Path, line: str) -> list[str]:
    """The texts with which bash would replace the last word of a line, by its own rules for words."""
    code = '. "$1"; COMP_LINE=$2 COMP_POINT=${#2}; _afterword_completion afterword; printf "%s\\n" "${COMPREPLY[@]}"'
    return run("bash", "--norc", "-c", code, "bash", str(script), line, COMP_WORDBREAKS=" \t\n\"'@><=;|&(:")


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_after_colons_and_equals_signs(cache, tmp_path):
    script = tmp_path / "script"
    script.write_text(CliRunner().invoke(main, ["completion", "bash"]).stdout, encoding="utf-8")
    assert in_bash(script, "afterword serve --kv-type=e") == ["exact"]
    assert in_bash(script, "afterword serve hf:owner/repo:") == ["Q8_0"]
    assert in_bash(script, "afterword complete --model hf:") == ["owner/repo:Q8_0"]
    assert in_bash(script, "afterword complete --model=hf:o") == ["owner/repo:Q8_0"]
    (cache / "a b.gguf").touch()
    assert in_bash(script, "afterword serve a") == ["afterword-tiny", "a\\ b.gguf"]


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_shows_whole_descriptions(cache, tmp_path):
    script = tmp_path / "script"
    script.write_text(CliRunner().invoke(main, ["completion", "fish"]).stdout, encoding="utf-8")
    shown = run("fish", "--no-config", "-c", f"source {script}; complete -C 'afterword serve --gpu'")
    assert shown == ["--gpu-layers\tLayers computed by a GPU; -1 for all of them."]
    shown = run("fish", "--no-config", "-c", f"source {script}; complete -C 'afterword serve hf:own'")
    assert shown == ["hf:owner/repo:Q8_0"]
