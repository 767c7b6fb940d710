"""Generates the second part of docs/cli.md, after `MARK`, from the commands. The first part is written by hand.

`python -m tests.cli_page --write` writes the page; without `--write` the exit status is 1 if the page is not current.
`tests/test_cli_help.py` fails in that case.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from afterword.cli import main, settings
from afterword.cli.options import GroupedOption

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
COMMAND = "python -m tests.cli_page --write"
MARK = f"<!-- The rest of this page is generated: {COMMAND} -->"


def rendered(page: str) -> str:
    """Return the page with its generated part made anew."""
    head, mark, _ = page.partition(MARK)
    assert mark, f"{PAGE} does not contain {MARK}"
    root = click.Context(main, info_name="afterword", show_default=True)
    return head + "\n\n".join([MARK, *_group(root)]) + "\n"


def _group(ctx: click.Context) -> Iterator[str]:
    assert isinstance(ctx.command, click.Group)
    for name, command in sorted(ctx.command.commands.items()):
        inner = click.Context(command, ctx, info_name=name)
        yield from _command(inner)
        if isinstance(command, click.Group):
            yield from _group(inner)


def _command(ctx: click.Context) -> Iterator[str]:
    command = ctx.command
    yield f"## {ctx.command_path}"
    yield f"`{' '.join([ctx.command_path, *command.collect_usage_pieces(ctx)])}`"
    text, _, examples = inspect.cleandoc(command.help or "").partition("\n\n\b\nExamples:\n")
    yield text.replace("\b\n", "")
    yield "\n".join("    " + line.removeprefix("  ") for line in examples.splitlines())
    options = [each for each in command.params if isinstance(each, click.Option)]
    if options:
        yield "\n".join(_table(options, ctx, [each for each in command.params if each.envvar and each not in options]))


def _table(options: list[click.Option], ctx: click.Context, arguments: list[click.Parameter]) -> Iterator[str]:
    yield "| option | environment | |\n|---|---|---|"
    for argument in arguments:
        variables = ", ".join(f"`{name}`" for name in settings.variables(argument))
        yield f"| `{argument.make_metavar(ctx)}` | {variables} | In a file `{settings.name(argument)}`, a list. |"
    options = sorted(options, key=lambda each: not isinstance(each, GroupedOption))  # options without a group come last
    group = ""
    for option in options:
        if isinstance(option, GroupedOption) and option.group != group:
            group = option.group
            yield f"| **{group}** | | |"
        elif not isinstance(option, GroupedOption) and group:
            group = ""
            yield "| **Other options** | | |"
        record = option.get_help_record(ctx)
        assert record is not None
        names, meaning = (re.sub(r"\s+", " ", text).replace("|", r"\|") for text in record)
        variables = ", ".join(f"`{name}`" for name in settings.variables(option))
        yield f"| `{names}` | {variables} | {meaning} |"


if __name__ == "__main__":
    before = PAGE.read_text(encoding="utf-8")
    after = rendered(before)
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(after, encoding="utf-8")
    elif before != after:
        sys.exit(f"{PAGE} is not current; run {COMMAND}")
