"""`afterword config`: prints every setting with the value that a command would use, and its source."""

from __future__ import annotations

import json
from typing import Any

import click

from afterword.cli import settings

_HIDDEN = "***"


@click.command(
    name="config",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    options_metavar="[--config FILE] [--json]",
)
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def config(ctx: click.Context, command: tuple[str, ...], as_json: bool) -> None:
    """Show every setting and where it comes from.

    COMMAND is a command with its options; it is not run. Without COMMAND all commands are shown. A setting comes from
    the command line, else from the environment, else from the file, else it has its default. The output can be used
    as a settings file.

    \b
    Examples:
      afterword config serve --port 9000         # settings of this command
      afterword config > config.toml             # a new settings file
      afterword config --json keys create
    """
    contexts = settings.contexts(ctx.find_root(), list(command), settings.file_of(ctx))
    commands = {" ".join(settings.words_of(each)): _settings(each) for each in contexts}
    click.echo(json.dumps(commands, indent=2, default=str) if as_json else _format_file(commands))


def _settings(ctx: click.Context) -> dict[str, dict[str, Any]]:
    """Return value, source and place of each setting of a command, by the setting's name."""
    found = {}
    for name, option in settings.settable(ctx.command).items():
        value = ctx.params[option.name or ""]
        source, place = settings.origin(option, ctx)
        if settings.is_secret(option) and value:
            value = _HIDDEN
        found[name] = {"value": value, "source": source, "place": place}
    return found


def _format_file(commands: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Format the settings as a settings file. Defaults are comments, so that the file does not fix them."""
    lines: list[str] = []
    for command, known in commands.items():
        if not known:
            continue
        lines += ["", f"[{command.replace(' ', '.')}]"]
        for name, setting in known.items():
            is_comment = setting["source"] == "default" or setting["value"] == _HIDDEN
            place = f"  # {setting['place']}" if setting["place"] else ""
            lines.append(f"{'# ' * is_comment}{name} = {_format_toml(setting['value'])}{place}".rstrip())
    return "\n".join(lines[1:])


def _format_toml(value: Any) -> str:
    """Format a value as TOML; None becomes an empty text. TOML writes these values like JSON, except DEL in strings."""
    if value is None:
        return ""
    return json.dumps(value, default=str, ensure_ascii=False).replace("\x7f", "\\u007f")
