"""`afterword config`: every setting as commands would see it, and where it comes from."""

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
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_context
def config(ctx: click.Context, command: tuple[str, ...], as_json: bool) -> None:
    """Show every setting and where it comes from.

    COMMAND is a command with its options, which is not run; without it all commands are shown. A setting comes from
    the command line, else from the environment, else from the file, else it has its default. What is printed
    can be used as a settings file.

    \b
    Examples:
      afterword config serve --port 9000         # what that would run with
      afterword config > config.toml             # a file to start from
      afterword config --json keys create
    """
    asked = settings.contexts(ctx.find_root(), list(command), settings.file_of(ctx))
    found = {" ".join(settings.words_of(each)): _settings(each) for each in asked}
    click.echo(json.dumps(found, indent=2, default=str) if as_json else _as_file(found))


def _settings(ctx: click.Context) -> dict[str, dict[str, Any]]:
    """A command's settings by name."""
    found = {}
    for name, option in settings.settable(ctx.command).items():
        value = ctx.params[option.name or ""]
        source, place = settings.origin(option, ctx)
        if settings.is_secret(option) and value:
            value = _HIDDEN
        found[name] = {"value": value, "source": source, "place": place}
    return found


def _as_file(commands: dict[str, dict[str, dict[str, Any]]]) -> str:
    """As a settings file. What nobody has set is a comment, so that the file does not fix today's defaults."""
    lines: list[str] = []
    for command, known in commands.items():
        if not known:
            continue
        lines += ["", f"[{command.replace(' ', '.')}]"]
        for name, setting in known.items():
            kept = setting["source"] == "default" or setting["value"] == _HIDDEN
            place = f"  # {setting['place']}" if setting["place"] else ""
            lines.append(f"{'# ' * kept}{name} = {_toml(setting['value'])}{place}".rstrip())
    return "\n".join(lines[1:])


def _toml(value: Any) -> str:
    """A value as TOML, which writes these as JSON does but for what is none."""
    if value is None:
        return ""
    return json.dumps(value, default=str, ensure_ascii=False).replace("\x7f", "\\u007f")
