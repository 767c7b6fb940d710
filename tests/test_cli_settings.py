"""Settings files and environment variables: precedence for every option, one-line errors, `afterword config`."""

from __future__ import annotations

import json
import os
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from afterword.cli import main, settings
from afterword.cli.options import leaves

OPTIONS = [
    pytest.param(path, command, option, id=f"{'-'.join(path)}--{name}")
    for path, command in leaves(main)
    for name, option in settings.settable(command).items()
]


def afterword(*words: str, file: str | None = None, **environment: str) -> Result:
    """Run a command with a settings file of this text."""
    with tempfile.TemporaryDirectory() as folder:
        if file is not None:
            path = Path(folder) / "settings.toml"
            path.write_text(file, encoding="utf-8")
            path.chmod(0o600)
            environment["AFTERWORD_CONFIG"] = str(path)
        return CliRunner().invoke(main, words, env=environment, prog_name="afterword")


def refusal(*words: str, **options: Any) -> str:
    result = afterword(*words, **options)
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1, "one line"
    return result.stderr


def two_values(option: click.Option) -> tuple[Any, Any]:
    """Two valid values of an option, as they are written in a settings file."""
    kind = option.type
    match kind:
        case click.types.BoolParamType():
            return True, False
        case click.Choice():
            return str(kind.choices[0]), str(kind.choices[-1])
        case click.types.IntParamType() | click.types.FloatParamType():
            low = getattr(kind, "min", None) or 0
            return low + 1, low + 2
        case click.types.FuncParamType():
            return "1h", "2h"
        case _:
            return "one", "two"


def received(
    path: tuple[str, ...],
    command: click.Command,
    option: click.Option,
    *words: str,
    file: str = "",
    **environment: str,
) -> Any:
    """Run a command and return the value that it receives for an option."""
    seen: dict[str, Any] = {}
    before, command.callback = command.callback, lambda **values: seen.update(values)
    try:
        required = ["x" for each in command.params if isinstance(each, click.Argument) and each.required]
        result = afterword(*path, *required, *words, file=file, **environment)
    finally:
        command.callback = before
    assert result.exit_code == 0, result.output
    value = seen[option.name or ""]
    return [str(each) for each in value] if settings.is_list(option) else str(value)


@pytest.mark.parametrize(("path", "command", "option"), OPTIONS)
def test_precedence_is_command_line_environment_file_default(path, command, option):
    first, second = two_values(option)
    name = settings.name(option)
    variable = f"afterword_{'_'.join(path)}_{name}".replace("-", "_").upper()

    def typed(value: Any) -> list[str]:
        if isinstance(option, click.Argument):
            return [str(value)]
        return [f"--{name}"] if option.is_flag else [f"--{name}", str(value)]

    def in_file(value: Any) -> str:
        return f"[{'.'.join(path)}]\n{name} = {json.dumps([value] if settings.is_list(option) else value)}\n"

    def expected(value: Any) -> Any:
        return [str(value)] if settings.is_list(option) else str(option.type.convert(value, option, None))

    assert received(path, command, option, file=in_file(first)) == expected(first)
    assert received(path, command, option, file=in_file(first), **{variable: str(second)}) == expected(second)
    environment = {variable: str(second)}
    assert received(path, command, option, *typed(first), file=in_file(second), **environment) == expected(first)
    assert received(path, command, option, **{variable: ""}) == received(
        path, command, option
    )  # an empty variable is ignored


def test_the_options_of_every_command_are_tested():
    names = {" ".join(each.values[0]) for each in OPTIONS}
    assert {"serve", "complete", "keys create", "usage"} <= names
    assert len(OPTIONS) > 50


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[serv]\n", "[serv]: there is no such command; did you mean serve?"),
        ("[serve]\nprot = 1\n", "[serve] prot: there is no such setting; did you mean port?"),
        ("[serve]\nmax_queue = 1\n", "did you mean max-queue?"),
        ("[serve]\nconfig = 'x'\n", "[serve] config: there is no such setting"),
        ("[serve]\nport = '9000'\n", "[serve] port: expected a whole number, not '9000'."),
        ("[serve]\nport = true\n", "expected a whole number, not true."),
        ("[serve]\nport = 9000.5\n", "expected a whole number, not 9000.5."),
        ("[serve]\nport = 70000\n", "[serve] port: 70000 is not in the range"),
        ("[serve]\nstrict = 1\n", "expected true or false, not 1."),
        ("[serve]\ngrace = '1'\n", "expected a number, not '1'."),
        ("[serve]\nhost = 1\n", "expected a string, not 1."),
        ("[serve]\ncors-origin = 'http://a'\n", "expected a list, not 'http://a'."),
        ("[serve]\ncors-origin = [1]\n", "[serve] cors-origin: expected a string, not 1."),
        ("[serve]\nkv-type = 'f64'\n", "[serve] kv-type: 'f64' is not one of"),
        ("[serve.more]\nport = 1\n", "[serve] more: there is no such setting"),
        ("port = 1\n", "[port]: there is no such command"),
        ("serve = 1\n", "serve: expected a table with the settings of a command"),
        ("[keys]\nname = 'x'\n", "[keys] [name]: there is no such command"),
        ("[keys.create]\nname = 1\n", "[keys] [create] name: expected a string"),
        ("[serve\n", "is not valid TOML"),
    ],
)
def test_errors_in_a_settings_file_name_file_table_and_option(text, message):
    for command in (["serve", "--print-limits"], ["usage"]):
        printed = refusal(*command, file=text)
        assert message in printed
        assert "settings.toml" in printed


def test_a_named_settings_file_must_exist(tmp_path):
    missing = tmp_path / "none.toml"
    assert f"{missing} cannot be read: No such file" in refusal("serve", "--config", str(missing), "--print-limits")
    assert "is not valid TOML" in refusal("serve", "--config", str(_bytes(tmp_path, b"\xff")), "--print-limits")


def _bytes(folder: Path, data: bytes) -> Path:
    path = folder / "bytes.toml"
    path.write_bytes(data)
    return path


def test_only_the_users_settings_file_is_read_by_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("afterword.toml", "config.toml"):
        (tmp_path / name).write_text("[serve]\nmax-stop = 7\n", encoding="utf-8")
    runner = CliRunner()
    words = ["serve", "--print-limits", "--json"]
    unset = runner.invoke(main, words, env={"XDG_CONFIG_HOME": str(tmp_path / "home")})
    assert json.loads(unset.stdout)["max_stop"]["value"] == 16
    assert unset.stderr == ""

    own = tmp_path / "home" / "afterword" / "config.toml"
    own.parent.mkdir(parents=True)
    own.write_text("[serve]\nmax-stop = 7\n", encoding="utf-8")
    found = runner.invoke(main, words, env={"XDG_CONFIG_HOME": str(tmp_path / "home")})
    assert json.loads(found.stdout)["max_stop"]["value"] == 7
    assert found.stderr == f"Settings from {own}.\n"

    other = runner.invoke(main, ["models"], env={"XDG_CONFIG_HOME": str(tmp_path / "home")})
    assert "Settings" not in other.stderr, "the file has no table for this command"


def test_an_unreadable_settings_folder_is_ignored():
    assert afterword("serve", "--print-limits", XDG_CONFIG_HOME="x" * 5000).exit_code == 0


def test_an_api_key_in_a_world_readable_settings_file_is_refused(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("[serve]\napi-key = ['secret-0123456789']\n", encoding="utf-8")
    path.chmod(0o644)
    printed = refusal("serve", "--config", str(path), "--print-limits")
    assert f"chmod o-r {path}" in printed
    assert "secret" not in printed
    path.chmod(0o640)
    assert afterword("serve", "--config", str(path), "--print-limits").exit_code == 0


def test_a_tilde_in_a_path_is_expanded():
    shown = afterword("config", "serve", file="[serve]\nlog = '~/lines'\n").stdout
    assert tomllib.loads(shown)["serve"]["log"] == os.path.expanduser("~/lines")


# ---- afterword config


def config(*words: str, **options: Any) -> dict[str, Any]:
    result = afterword("config", "--json", *words, **options)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_config_shows_the_source_of_each_setting():
    settings = config(
        *("serve", "--port", "9000"), file="[serve]\nport = 1\nhost = '::1'\ngrace = 3\n", AFTERWORD_SERVE_GRACE="4"
    )["serve"]
    assert settings["port"] == {"value": 9000, "source": "command line", "place": "--port"}
    assert settings["grace"] == {"value": 4.0, "source": "environment", "place": "AFTERWORD_SERVE_GRACE"}
    assert (settings["host"]["value"], settings["host"]["source"]) == ("::1", "file")
    assert settings["host"]["place"].endswith("/settings.toml")
    assert settings["max-queue"] == {"value": 4096, "source": "default", "place": ""}


@pytest.mark.parametrize(("path", "command", "option"), OPTIONS)
def test_config_shows_every_setting(path, command, option):
    assert settings.name(option) in config(*path)[" ".join(path)]


def test_config_runs_no_command_and_needs_no_arguments(monkeypatch):
    for path, command in leaves(main):
        if path != ("config",):
            monkeypatch.setattr(command, "callback", lambda **_: pytest.fail("it ran"))
    everything = config()
    assert {"serve", "complete", "keys create"} <= set(everything)
    assert config("keys") == {name: settings for name, settings in everything.items() if name.startswith("keys ")}


def test_the_output_of_config_is_an_equivalent_settings_file():
    file = """
        [serve]
        host = "::1"
        port = 9000
        cors-origin = ["http://a", "http://b"]
        strict = true
        log = "/tmp/l\\"o g\\u007f.jsonl"
        [keys.create]
        name = "Ä"
    """
    printed = afterword("config", file=file).stdout
    assert without_empty(tomllib.loads(printed)) == tomllib.loads(file), "defaults are comments"
    assert values(config(file=printed)) == values(config(file=file))
    assert "# max-queue = 4096" in printed


def without_empty(table: dict[str, Any]) -> dict[str, Any]:
    cleaned = {name: without_empty(each) if isinstance(each, dict) else each for name, each in table.items()}
    return {name: each for name, each in cleaned.items() if each != {}}


def values(commands: dict[str, Any]) -> dict[str, Any]:
    return {command: {name: each["value"] for name, each in found.items()} for command, found in commands.items()}


def test_config_accepts_its_own_settings_file(tmp_path):
    path = tmp_path / "one.toml"
    path.write_text("[serve]\nport = 9000\n", encoding="utf-8")
    assert config("--config", str(path), "serve")["serve"]["port"]["place"] == str(path)
    other = tmp_path / "other.toml"
    other.write_text("[serve]\nport = 9001\n", encoding="utf-8")
    assert config("--config", str(path), "serve", "--config", str(other))["serve"]["port"]["value"] == 9001


def test_config_shows_no_key():
    result = afterword("config", "serve", "--api-key", "secret-0123456789", AFTERWORD_API_KEY="secret-1")
    assert "secret" not in result.output
    assert "# api-key = " in result.stdout


def test_config_of_an_invalid_command_line_is_an_error():
    assert "No such command 'serv'" in afterword("config", "serv").stderr
    assert "No such option" in afterword("config", "serve", "--prot", "1").stderr
    assert afterword("config", "serve", "--port", "x").exit_code == 2
    assert afterword("config", "serve", AFTERWORD_SERVE_PORT="tcp://10.0.0.1:80").exit_code == 2
