"""Settings from a file, and where each setting comes from: command line, then environment, then file, then default.

The file is TOML with a table for each command and options by their names in `--help`. It is checked whole before
anything of it is used; what is wrong with it is one sentence that names file, table and option.
"""

from __future__ import annotations

import copy
import difflib
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from afterword.errors import SettingError

CONFIG = "AFTERWORD_CONFIG"
"""The environment variable that says where the file is."""

_SECRETS = frozenset({"api_key"})
_FILE, _ASKED = "afterword.settings.file", "afterword.settings.asked"  # what contexts remember
_KINDS: tuple[tuple[type[click.ParamType[Any]], tuple[type, ...], str], ...] = (
    (click.types.BoolParamType, (bool,), "true or false"),
    (click.types.IntParamType, (int,), "a whole number"),
    (click.types.FloatParamType, (int, float), "a number"),
    (click.types.FuncParamType, (int, str), "a string or a whole number"),
    (click.ParamType, (str,), "a string"),
)


class _UnparsedValue(click.ParamType[str]):
    """Checks a value and leaves it as it was written."""

    name = "text"

    def __init__(self, kind: click.ParamType[Any]) -> None:
        self._kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        self._kind.convert(value, param, ctx)
        return str(value)


def default_path() -> Path:
    """The file that is read if no other is named; never one of the folder that one happens to be in."""
    home = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(os.path.expanduser(home)) / "afterword" / "config.toml"


def with_variables(command: click.Command, words: Iterable[str]) -> None:
    """Let the environment set a command's options, by the words of the command and their own names."""
    for each in settable(command).values():
        own = "_".join(["AFTERWORD", *words, name(each)]).replace("-", "_").upper()
        each.envvar = [own, *(other for other in variables(each) if other != own)]


def with_file(command: click.Command) -> None:
    """Give a command the option `--config`, if there is anything to set."""
    if settable(command):
        command.params.append(
            click.Option(
                ["--config"],
                type=click.Path(path_type=Path),
                envvar=CONFIG,
                is_eager=True,  # before the options that it sets
                expose_value=False,
                callback=_load,
                help="Settings from a file.  [default: afterword/config.toml in $XDG_CONFIG_HOME or ~/.config]",
            )
        )


def read(path: Path, commands: click.Group) -> dict[str, Any]:
    """Values by the names of commands and parameters, nested. Raises `SettingError`."""
    import tomllib  # only who has a file waits for it

    try:
        text = path.read_text(encoding="utf-8")
        others = bool(path.stat().st_mode & stat.S_IROTH)
        table = tomllib.loads(text)
    except OSError as error:
        raise SettingError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:  # of the encoding, or of TOML
        raise SettingError(f"{path} is not TOML: {error}.") from None
    values = _of_group(f"{path}: ", table, commands)
    if others and os.name == "posix" and _has_secret(values):
        raise SettingError(f"{path} has a key in it and everyone on this machine can read it; run: chmod o-r {path}")
    return values


def settable(command: click.Command) -> dict[str, click.Parameter]:
    """What a file can set, by its name there: options, and arguments that have an environment variable."""
    given = [each for each in command.params if each.name != "config"]
    return {name(each): each for each in given if isinstance(each, click.Option) or each.envvar}


def name(parameter: click.Parameter) -> str:
    """An option's long name without its dashes, or an argument's."""
    return max(parameter.opts, key=len).removeprefix("--")


def is_list(parameter: click.Parameter) -> bool:
    """Whether it takes several values."""
    return parameter.multiple or parameter.nargs == -1


def variables(parameter: click.Parameter) -> tuple[str, ...]:
    """The environment variables that set an option or argument, the first that is set first."""
    given = parameter.envvar or ()
    return (given,) if isinstance(given, str) else tuple(given)


def contexts(ctx: click.Context, words: list[str], file: Path | None = None) -> Iterator[click.Context]:
    """What commands would run with, without running them: the command of these words, or every one of a group."""
    ctx.meta[_ASKED] = True
    command = ctx.command
    if not isinstance(command, click.Group):
        named = ["--config", str(file)] if file and settable(command) else []
        relaxed = copy.copy(command)
        relaxed.params = [_optional(each) for each in command.params]
        yield relaxed.make_context(ctx.info_name, [*named, *words], parent=ctx.parent)
        return
    every = [each for each in command.commands if each != "config"]
    for each in words[:1] or every:
        child = command.get_command(ctx, each)
        if child is None:
            raise click.UsageError(f"No such command '{each}'.", ctx)
        yield from contexts(click.Context(child, ctx, info_name=each), words[1:], file)


def origin(parameter: click.Parameter, ctx: click.Context) -> tuple[str, str]:
    """Where a value comes from: the kind of place, and the place."""
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
    """The file that a command's settings come from."""
    file: Path | None = ctx.meta.get(_FILE)
    return file


def words_of(ctx: click.Context) -> list[str]:
    """The words of a command after the program's own."""
    return [*words_of(ctx.parent), ctx.info_name or ""] if ctx.parent else []


def _load(ctx: click.Context, _: click.Parameter, given: Path | None) -> None:
    """Make the file's values the defaults of the command whose context this is."""
    path = given or default_path()
    if ctx.resilient_parsing or (given is None and not os.path.isfile(path)):  # which never raises
        return
    root = ctx.find_root().command
    assert isinstance(root, click.Group)
    values = read(path, root)
    for word in words_of(ctx):
        values = values.get(word, {})
    ctx.default_map = values
    ctx.meta[_FILE] = path
    if values and not ctx.meta.get(_ASKED):
        click.echo(f"Settings from {path}.", err=True)


def _of_group(place: str, table: dict[str, Any], group: click.Group) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in table.items():
        command = group.commands.get(key)
        if command is None:
            raise SettingError(f"{place}[{key}]: there is no such command{_hint(key, group.commands)}.")
        if not isinstance(value, dict):
            raise SettingError(f"{place}{key}: a command's settings are a table, such as [serve].")
        if isinstance(command, click.Group):
            values[key] = _of_group(f"{place}[{key}] ", value, command)
        else:
            values[key] = _of_command(f"{place}[{key}] ", value, command)
    return values


def _of_command(place: str, table: dict[str, Any], command: click.Command) -> dict[str, Any]:
    known = settable(command)
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in known:
            raise SettingError(f"{place}{key}: there is no such setting{_hint(key, known)}.")
        parameter = known[key]
        several = is_list(parameter)
        if several and not isinstance(value, list):
            raise SettingError(f"{place}{key}: expected a list, not {_shown(value)}.")
        checked = [_checked(f"{place}{key}", each, parameter) for each in (value if several else [value])]
        values[parameter.name or key] = checked if several else checked[0]
    return values


def _checked(place: str, value: Any, parameter: click.Parameter) -> Any:
    kinds, expected = next((kinds, words) for kind, kinds, words in _KINDS if isinstance(parameter.type, kind))
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise SettingError(f"{place}: expected {expected}, not {_shown(value)}.")
    if isinstance(parameter.type, click.Path):
        value = os.path.expanduser(str(value))  # as a shell does before a command line gets here
    if isinstance(parameter.type, click.types.FuncParamType):
        value = str(value)  # these read what people write
    try:
        parameter.type.convert(value, parameter, None)
    except (click.BadParameter, SettingError) as error:
        raise SettingError(f"{place}: {error.message}") from None
    return value


def _has_secret(values: dict[str, Any]) -> bool:
    return any(_has_secret(value) if isinstance(value, dict) else key in _SECRETS for key, value in values.items())


def _optional(parameter: click.Parameter) -> click.Parameter:
    relaxed = copy.copy(parameter)
    relaxed.required = False
    if isinstance(relaxed.type, click.types.FuncParamType):
        relaxed.type = _UnparsedValue(relaxed.type)
    return relaxed


def _hint(wrong: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(wrong.replace("_", "-"), known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _shown(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
