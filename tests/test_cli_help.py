"""`--help` of every command: complete, with examples that are real, and fit for 80 columns. And how commands end."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from afterword.cli import main
from afterword.cli.options import GroupedCommand, GroupedOption, leaves
from afterword.cli.settings import variables
from afterword.errors import EngineDied
from cli_page import PAGE, RENEW, renewed

AFTERWORD = [sys.executable, "-m", "afterword"]


def commands(group: click.Group = main, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], click.Command]]:
    """The tree: groups and commands with the words that lead to them."""
    found: list[tuple[tuple[str, ...], click.Command]] = [(path, group)]
    for name, each in group.commands.items():
        found += commands(each, (*path, name)) if isinstance(each, click.Group) else [((*path, name), each)]
    return found


EVERY = [pytest.param(path, command, id=" ".join(path) or "afterword") for path, command in commands()]


def help_of(path: tuple[str, ...]) -> str:
    result = CliRunner().invoke(main, [*path, "--help"], terminal_width=80, prog_name="afterword")
    assert result.exit_code == 0
    return result.stdout


def examples(text: str) -> list[str]:
    """The command lines of the block of examples, without indentation."""
    block = re.search(r"^  Examples:\n((?:    .*\n)+)", text, re.MULTILINE)
    return [line.strip() for line in block[1].splitlines()] if block else []


@pytest.mark.parametrize(("path", "command"), EVERY)
def test_help_fits_eighty_columns_and_nothing_in_it_is_cut_off(path, command):
    lines = help_of(path).splitlines()
    assert max(map(len, lines)) <= 80
    assert not [line for line in lines if line.endswith("...") and "[ARGS]" not in line and "Usage" not in line]


@pytest.mark.parametrize(("path", "command"), EVERY)
def test_every_command_has_examples_that_it_understands(path, command):
    shown = examples(help_of(path))
    assert shown, "a block of examples: see afterword/cli/options.py"
    for line in shown:
        words = shlex.split(line.rpartition(" | ")[2], comments=True)
        words = words[: words.index(">")] if ">" in words else words
        assert words[: 1 + len(path)] == ["afterword", *path], line
        understood(words[1:])


def understood(words: list[str]) -> None:
    """Raises what click raises where words are no command line."""
    context: click.Context = click.Context(main, info_name="afterword")
    command: click.Command = main
    while isinstance(command, click.Group):
        name, *words = words
        command = command.commands[name]
        if isinstance(command, click.Group):
            context = click.Context(command, context, info_name=name)
    command.make_context(command.name, words, parent=context)


def test_what_is_no_command_line_is_not_understood():
    with pytest.raises(click.UsageError):
        understood(["serve", "--prot", "1"])


@pytest.mark.parametrize(("path", "command"), EVERY)
def test_every_option_says_what_it_is_for(path, command):
    shown = help_of(path)
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help, option.name
            assert re.search(rf"^  .*{max(option.opts, key=len)}\b", shown, re.MULTILINE)


@pytest.mark.parametrize(("path", "command"), EVERY)
def test_options_are_in_groups_where_there_are_many(path, command):
    own = [each for each in command.params if isinstance(each, click.Option) and each.name not in ("config", "help")]
    grouped = [each for each in own if isinstance(each, GroupedOption)]
    if len(own) > 12 or grouped:
        assert isinstance(command, GroupedCommand)
        assert grouped == own, "give each a group: see option() in afterword/cli/options.py"
        headings = re.findall(r"^(\w[\w ]*):$", help_of(path), re.MULTILINE)
        assert headings == [*dict.fromkeys(each.group for each in grouped), "Other options"]


def test_help_starts_without_what_only_running_needs():
    heavy = {"asyncio", "httptools", "httpx", "huggingface_hub", "llama_cpp", "msgspec", "numpy", "psutil", "rich"}
    heavy |= {"sqlite3", "starlette", "uvicorn", "uvloop"}
    code = "import sys\nfrom afterword.cli import main\ntry: main(['serve', '--help'])\nfinally: print(*sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = set(said.splitlines()[-1].split())
    assert "click" in loaded
    assert not heavy & loaded


# ---- as JSON


def test_limits_as_json_are_those_of_the_table():
    shown = CliRunner().invoke(main, ["serve", "--print-limits", "--json", "--limit", "max_n=7"]).stdout
    table = CliRunner().invoke(main, ["serve", "--print-limits", "--limit", "max_n=7"]).stdout
    listed = json.loads(shown)
    assert listed["max_n"] == {"value": 7, "meaning": "choices for each prompt"}
    assert list(listed) == [line.split()[0] for line in table.splitlines()]


def test_complete_prints_the_answer_of_the_api():
    words = ["complete", "Once upon a time", "--max-tokens", "5", "--temperature", "0"]
    text = CliRunner().invoke(main, words).stdout
    answer = json.loads(CliRunner().invoke(main, [*words, "--json"]).stdout)
    assert answer["object"] == "text_completion"
    assert answer["model"] == "afterword-tiny"
    assert answer["choices"][0]["text"] + "\n" == text
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 5


# ---- how it ends


def test_what_fails_while_it_runs_is_told_apart_from_a_wrong_setting(monkeypatch):
    def dies(*_: object) -> None:
        raise EngineDied

    monkeypatch.setattr("afterword.cli.run.complete", dies)
    failed = CliRunner().invoke(main, ["complete", "a"])
    assert (failed.exit_code, failed.stdout) == (1, "")
    assert failed.stderr.startswith("afterword: The engine stopped")
    assert CliRunner().invoke(main, ["complete"]).exit_code == 2
    assert CliRunner().invoke(main, ["nothing"]).exit_code == 2


def test_who_has_read_enough_is_not_told_of_it():
    """As in `afterword complete … | head -c 1`."""
    words = [*AFTERWORD, "complete", "Once upon a time", "--max-tokens", "100", "--seed", "1"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


def test_ctrl_c_ends_it_with_130_and_no_traceback():
    words = [*AFTERWORD, "complete", "Once upon a time", "--max-tokens", "1800", "--json"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as process:
        assert process.stderr is not None
        _until_it_has_a_child(process.pid)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the engine's process too
        assert b"Traceback" not in process.stderr.read()
        assert process.wait() == 130


def _until_it_has_a_child(pid: int) -> None:
    psutil = pytest.importorskip("psutil")
    while not psutil.Process(pid).children():
        pass


def test_leaves_are_all_commands():
    assert [*leaves(main)] == [(path, command) for path, command in commands() if not isinstance(command, click.Group)]


# ---- docs/cli.md


def test_the_page_of_commands_is_current():
    page = PAGE.read_text(encoding="utf-8")
    assert page == renewed(page), f"renew it: {RENEW}"


def test_the_page_says_all_that_help_says():
    page = PAGE.read_text(encoding="utf-8")
    for path, command in leaves(main):
        section = page.partition(f"\n## afterword {' '.join(path)}\n")[2].partition("\n## ")[0]
        for option in command.params:
            if isinstance(option, click.Option):
                assert f"{max(option.opts, key=len)}" in section
                assert all(f"`{name}`" in section for name in variables(option))
