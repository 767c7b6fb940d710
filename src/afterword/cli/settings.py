"""Settings from environment variables and a settings file, and the source of each setting.

The command line takes precedence over the environment, the environment over the file, the file over the default. The
file is TOML with a table for each command and options by their names in `--help`. The whole file is checked before a
setting is used. An error message names file, table and option. This module must not import the implementation of
commands.
"""

from __future__ import annotations

import copy
import difflib
import math
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from afterword.errors import SettingError

CONFIG = "AFTERWORD_CONFIG"
"""The environment variable with the path of the settings file."""

_SECRETS = frozenset({"api_key"})
_FILE, _QUIET = "afterword.settings.file", "afterword.settings.quiet"  # keys in `Context.meta`
_KINDS: tuple[tuple[type[click.ParamType[Any]], tuple[type, ...], str], ...] = (
    (click.types.BoolParamType, (bool,), "true or false"),
    (click.types.IntParamType, (int,), "a whole number"),
    (click.types.FloatParamType, (int, float), "a number"),
    (click.types.FuncParamType, (int, str), "a string or a whole number"),
    (click.ParamType, (str,), "a string"),
)


class _UnparsedValue(click.ParamType[str]):
    """Checks a value and returns it as text, unconverted."""

    name = "text"

    def __init__(self, kind: click.ParamType[Any]) -> None:
        self._kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        self._kind.convert(value, param, ctx)
        return str(value)


def default_path() -> Path:
    """Return the path of the user's settings file. A file in the current folder is never read by default."""
    home = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(os.path.expanduser(home)) / "afterword" / "config.toml"


def with_variables(command: click.Command, words: Iterable[str]) -> None:
    """Give each option of a command an environment variable, named by the words of the command and the option."""
    for each in settable(command).values():
        own = "_".join(["AFTERWORD", *words, name(each)]).replace("-", "_").upper()
        each.envvar = [own, *(other for other in variables(each) if other != own)]


def with_file(command: click.Command) -> None:
    """Add the option `--config` to a command that has settings."""
    if settable(command):
        command.params.append(
            click.Option(
                ["--config"],
                type=click.Path(path_type=Path),
                envvar=CONFIG,
                is_eager=True,  # processed before the options that it sets
                expose_value=False,
                callback=_load,
                help="Settings file.  [default: afterword/config.toml in $XDG_CONFIG_HOME or ~/.config]",
            )
        )


def read(path: Path, commands: click.Group) -> dict[str, Any]:
    """Read a settings file: values by command and parameter name, nested. Raises `SettingError`."""
    import tomllib  # imported late: most commands run without a file

    try:
        text = path.read_text(encoding="utf-8")
        others = bool(path.stat().st_mode & stat.S_IROTH)
        table = tomllib.loads(text)
    except OSError as error:
        raise SettingError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:  # not UTF-8, or not TOML
        raise SettingError(f"{path} is not valid TOML: {error}.") from None
    values = _read_group(f"{path}: ", table, commands)
    if others and os.name == "posix" and has_secret(values):
        raise SettingError(
            f"{path} contains an API key and every user of this machine can read it. Run: chmod o-r {path}"
        )
    return values


def settable(command: click.Command) -> dict[str, click.Parameter]:
    """Return the parameters that a file can set, by name: options, and arguments with an environment variable."""
    parameters = [each for each in command.params if each.name != "config"]
    return {name(each): each for each in parameters if isinstance(each, click.Option) or each.envvar}


def name(parameter: click.Parameter) -> str:
    """Return the long name of an option without dashes, or the name of an argument."""
    return max(parameter.opts, key=len).removeprefix("--")


def is_list(parameter: click.Parameter) -> bool:
    """Whether the parameter takes several values."""
    return parameter.multiple or parameter.nargs == -1


def variables(parameter: click.Parameter) -> tuple[str, ...]:
    """Return the environment variables of an option or argument. The first one that is set is used."""
    names = parameter.envvar or ()
    return (names,) if isinstance(names, str) else tuple(names)


def contexts(ctx: click.Context, words: list[str], file: Path | None = None) -> Iterator[click.Context]:
    """Yield the contexts with which commands would run: of the command named by `words`, or of all in a group."""
    ctx.meta[_QUIET] = True
    command = ctx.command
    if not isinstance(command, click.Group):
        config = ["--config", str(file)] if file and settable(command) else []
        relaxed = copy.copy(command)
        relaxed.params = [_optional(each) for each in command.params]
        yield relaxed.make_context(ctx.info_name, [*config, *words], parent=ctx.parent)
        return
    names = [each for each in command.commands if each != "config"]
    for each in words[:1] or names:
        child = command.get_command(ctx, each)
        if child is None:
            raise click.UsageError(f"No such command '{each}'.", ctx)
        yield from contexts(click.Context(child, ctx, info_name=each), words[1:], file)


def origin(parameter: click.Parameter, ctx: click.Context) -> tuple[str, str]:
    """Return the source of a value, and the option, variable or file there."""
    match ctx.get_parameter_source(parameter.name or ""):
        case ParameterSource.COMMANDLINE:
            return "command line", max(parameter.opts, key=len)
        case ParameterSource.ENVIRONMENT:
            return "environment", next(each for each in variables(parameter) if os.environ.get(each))
        case ParameterSource.DEFAULT_MAP:
            return "file", str(ctx.meta[_FILE])
        case _:
            return "default", ""


def is_secret(parameter: click.Parameter) -> bool:
    """Whether a value must not be shown."""
    return parameter.name in _SECRETS


def file_of(ctx: click.Context) -> Path | None:
    """Return the settings file of a command, or None."""
    file: Path | None = ctx.meta.get(_FILE)
    return file


def words_of(ctx: click.Context) -> list[str]:
    """Return the words of a command without the program's name."""
    return [*words_of(ctx.parent), ctx.info_name or ""] if ctx.parent else []


def _load(ctx: click.Context, _: click.Parameter, given: Path | None) -> None:
    """Read the file and make its values the defaults of the context's command."""
    path = given or default_path()
    if ctx.resilient_parsing or (given is None and not os.path.isfile(path)):  # `Path.is_file` can raise
        return
    root = ctx.find_root().command
    assert isinstance(root, click.Group)
    values = read(path, root)
    for word in words_of(ctx):
        values = values.get(word, {})
    ctx.default_map = values
    ctx.meta[_FILE] = path
    if values and not ctx.meta.get(_QUIET):
        click.echo(f"Settings from {path}.", err=True)


def _read_group(where: str, table: dict[str, Any], group: click.Group) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in table.items():
        command = group.commands.get(key)
        if command is None:
            raise SettingError(f"{where}[{key}]: there is no such command{_hint(key, group.commands)}.")
        if not isinstance(value, dict):
            raise SettingError(f"{where}{key}: expected a table with the settings of a command, such as [serve].")
        if isinstance(command, click.Group):
            values[key] = _read_group(f"{where}[{key}] ", value, command)
        else:
            values[key] = read_command(f"{where}[{key}] ", value, command)
    return values


def read_command(where: str, table: Mapping[str, Any], command: click.Command) -> dict[str, Any]:
    """Check the settings of one command in a table of a file, and return them by parameter name.

    `where` is the beginning of an error message. Raises `SettingError`.
    """
    known = settable(command)
    values: dict[str, Any] = {}
    for key, value in table.items():
        if not isinstance(key, str):  # YAML reads on, no and 1 as other values
            raise SettingError(f"{where}{_format_value(key)}: expected the name of a setting; names are strings.")
        if key not in known:
            raise SettingError(f"{where}{key}: there is no such setting{_hint(key, known)}.")
        parameter = known[key]
        many = is_list(parameter)
        if many and not isinstance(value, list):
            raise SettingError(f"{where}{key}: expected a list, not {_format_value(value)}.")
        checked = [_check_value(f"{where}{key}", each, parameter) for each in (value if many else [value])]
        values[parameter.name or key] = checked if many else checked[0]
    return values


def _check_value(where: str, value: Any, parameter: click.Parameter) -> Any:
    kinds, expected = next((kinds, words) for kind, kinds, words in _KINDS if isinstance(parameter.type, kind))
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise SettingError(f"{where}: expected {expected}, not {_format_value(value)}.")
    if isinstance(value, float) and not math.isfinite(value):  # comparisons with NaN would accept it in every range
        raise SettingError(f"{where}: expected a finite number, not {_format_value(value)}.")
    if isinstance(parameter.type, click.Path):
        value = os.path.expanduser(str(value))  # on the command line the shell does this
    if isinstance(parameter.type, click.types.FuncParamType):
        value = str(value)  # these types parse text
    try:
        parameter.type.convert(value, parameter, None)
    except (click.BadParameter, SettingError) as error:
        raise SettingError(f"{where}: {error.message}") from None
    return value


def has_secret(values: dict[str, Any]) -> bool:
    """Whether one of the values, nested by command, is a secret."""
    return any(has_secret(value) if isinstance(value, dict) else key in _SECRETS for key, value in values.items())


def _optional(parameter: click.Parameter) -> click.Parameter:
    relaxed = copy.copy(parameter)
    relaxed.required = False
    if isinstance(relaxed.type, click.types.FuncParamType):
        relaxed.type = _UnparsedValue(relaxed.type)
    return relaxed


def _hint(wrong: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(wrong.replace("_", "-"), known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _format_value(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
