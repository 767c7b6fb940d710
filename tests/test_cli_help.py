"""`--help` of every command: complete, with valid examples, in 80 columns. Exit statuses, and docs/cli.md."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from typing import IO

import click
import httpx
import pytest
from click.testing import CliRunner

from afterword.cli import main
from afterword.cli.options import GroupedCommand, GroupedOption, leaves
from afterword.cli.settings import variables
from afterword.errors import WorkerDied
from cli_page import COMMAND, PAGE, rendered

AFTERWORD = [sys.executable, "-m", "afterword"]
WITHOUT_KERNELS = b"Afterword's kernels are not used"  # begins the line of an installation without the kernels


def commands(group: click.Group = main, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], click.Command]]:
    """All groups and commands, with their words on the command line."""
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
    """The command lines in the block of examples, without indentation."""
    block = re.search(r"^  Examples:\n((?:    .*\n)+)", text, re.MULTILINE)
    return [line.strip() for line in block[1].splitlines()] if block else []


@pytest.mark.parametrize(("path", "command"), EVERY)
def test_help_fits_into_eighty_columns_without_truncation(path, command):
    lines = help_of(path).splitlines()
    assert max(map(len, lines)) <= 80
    assert not [line for line in lines if line.endswith("...") and "[ARGS]" not in line and "Usage" not in line]


@pytest.mark.parametrize(("path", "command"), EVERY)
def test_every_command_has_examples_that_it_accepts(path, command):
    shown = examples(help_of(path))
    assert shown, "a block of examples: see afterword/cli/options.py"
    for line in shown:
        words = shlex.split(line.rpartition(" | ")[2], comments=True)
        words = words[: words.index(">")] if ">" in words else words
        assert words[: 1 + len(path)] == ["afterword", *path], line
        parse_words(words[1:])


def parse_words(words: list[str]) -> None:
    """Parse a command line without running it. Raises click's errors."""
    context: click.Context = click.Context(main, info_name="afterword")
    command: click.Command = main
    while isinstance(command, click.Group):
        name, *words = words
        command = command.commands[name]
        if isinstance(command, click.Group):
            context = click.Context(command, context, info_name=name)
    command.make_context(command.name, words, parent=context)


def test_an_invalid_command_line_is_refused():
    with pytest.raises(click.UsageError):
        parse_words(["serve", "--prot", "1"])


@pytest.mark.parametrize(("path", "command"), EVERY)
def test_every_option_has_a_help_text(path, command):
    shown = help_of(path)
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help, option.name
            assert re.search(rf"^  .*{max(option.opts, key=len)}\b", shown, re.MULTILINE)


@pytest.mark.parametrize(("path", "command"), EVERY)
def test_commands_with_many_options_group_them(path, command):
    own = [each for each in command.params if isinstance(each, click.Option) and each.name not in ("config", "help")]
    grouped = [each for each in own if isinstance(each, GroupedOption)]
    if len(own) > 12 or grouped:
        assert isinstance(command, GroupedCommand)
        assert grouped == own, "give each a group: see option() in afterword/cli/options.py"
        headings = re.findall(r"^(\w[\w ]*):$", help_of(path), re.MULTILINE)
        assert headings == [*dict.fromkeys(each.group for each in grouped), "Other options"]


def test_help_does_not_import_heavy_modules():
    heavy = {"asyncio", "httptools", "httpx", "huggingface_hub", "llama_cpp", "msgspec", "numpy", "psutil", "rich"}
    heavy |= {"sqlite3", "starlette", "uvicorn", "uvloop"}
    code = "import sys\nfrom afterword.cli import main\ntry: main(['serve', '--help'])\nfinally: print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = set(output.splitlines()[-1].split())
    assert "click" in loaded
    assert not heavy & loaded


# ---- as JSON


def test_limits_as_json_match_the_table():
    shown = CliRunner().invoke(main, ["serve", "--print-limits", "--json", "--limit", "max_n=7"]).stdout
    table = CliRunner().invoke(main, ["serve", "--print-limits", "--limit", "max_n=7"]).stdout
    listed = json.loads(shown)
    assert listed["max_n"] == {"value": 7, "meaning": "choices for each prompt"}
    rows = [line.split()[:2] for line in table.splitlines()]
    values = {name: row["value"] for name, row in listed.items()}
    assert rows == [[name, "-" if value is None else str(value).removesuffix(".0")] for name, value in values.items()]


def test_complete_json_prints_the_response_of_the_api():
    words = ["complete", "Once upon a time", "--max-tokens", "5", "--temperature", "0"]
    text = CliRunner().invoke(main, words).stdout
    answer = json.loads(CliRunner().invoke(main, [*words, "--json"]).stdout)
    assert answer["object"] == "text_completion"
    assert answer["model"] == "afterword-tiny"
    assert answer["choices"][0]["text"] + "\n" == text
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 5


# ---- exit statuses


def test_exit_status_separates_failures_at_run_time_from_invalid_settings(monkeypatch):
    def dies(*_: object) -> None:
        raise WorkerDied

    monkeypatch.setattr("afterword.cli.run.complete", dies)
    failed = CliRunner().invoke(main, ["complete", "a"])
    assert (failed.exit_code, failed.stdout) == (1, "")
    assert failed.stderr.startswith("afterword: The worker process stopped")
    assert CliRunner().invoke(main, ["complete"]).exit_code == 2
    assert CliRunner().invoke(main, ["nothing"]).exit_code == 2


def test_a_closed_standard_output_ends_the_command_silently():
    """As in `afterword complete … | head -c 1`."""
    words = [*AFTERWORD, "complete", "Once upon a time", "--max-tokens", "100", "--seed", "1"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        process.stdout.close()
        assert _printed(process.stderr) == []
        assert process.wait() == 141


def test_ctrl_c_ends_it_with_130_and_no_traceback():
    words = [*AFTERWORD, "complete", "Once upon a time", "--max-tokens", "1800", "--json"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as process:
        assert process.stderr is not None
        _wait_for_child(process.pid)
        os.killpg(process.pid, signal.SIGINT)  # to the worker too, as a terminal does
        assert b"Traceback" not in process.stderr.read()
        assert process.wait() == 130


def test_ctrl_c_during_the_imports_ends_it_silently(tmp_path):
    (tmp_path / "click.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    ended = subprocess.run(AFTERWORD, env=os.environ | {"PYTHONPATH": path}, capture_output=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, b"", b"")


def test_ctrl_c_says_which_requests_a_server_waits_for_and_a_second_one_ends_it():
    words = [*AFTERWORD, "serve", "--port", "0", "--parallel", "1", "--grace", "300"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        url = next(line.strip() for line in process.stdout if b"http://" in line).decode()
        body = {"prompt": "Once", "max_tokens": 2000, "ignore_eos": True, "stream": True, "logprobs": 20}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            os.killpg(process.pid, signal.SIGINT)
            said = (line for line in iter(process.stderr.readline, b"") if line.strip() and WITHOUT_KERNELS not in line)
            assert b"Waiting up to 5 minutes for 1 running request. Ctrl+C again" in next(said)
            os.killpg(process.pid, signal.SIGINT)
            assert b"Traceback" not in process.stderr.read()
            process.wait(30)


@pytest.mark.parametrize("words", [("-h",), ("serve", "-h"), ("keys", "list", "-h")])
def test_the_short_form_of_help(words):
    short, long = (CliRunner().invoke(main, [*words[:-1], form]) for form in ("-h", "--help"))
    assert (short.exit_code, short.output) == (0, long.output)


def _printed(stderr: IO[bytes]) -> list[bytes]:
    """The lines on standard error but the one of an installation without the compiled kernels."""
    return [line for line in stderr if WITHOUT_KERNELS not in line]


def _wait_for_child(pid: int) -> None:
    psutil = pytest.importorskip("psutil")
    while not psutil.Process(pid).children():
        pass


def test_leaves_are_all_commands():
    assert [*leaves(main)] == [(path, command) for path, command in commands() if not isinstance(command, click.Group)]


# ---- docs/cli.md


def test_the_generated_part_of_the_page_is_current():
    page = PAGE.read_text(encoding="utf-8")
    assert page == rendered(page), f"run {COMMAND}"


def test_the_page_has_every_option_and_variable():
    page = PAGE.read_text(encoding="utf-8")
    for path, command in leaves(main):
        section = page.partition(f"\n## afterword {' '.join(path)}\n")[2].partition("\n## ")[0]
        for option in command.params:
            if isinstance(option, click.Option):
                assert f"{max(option.opts, key=len)}" in section
                assert all(f"`{name}`" in section for name in variables(option))
