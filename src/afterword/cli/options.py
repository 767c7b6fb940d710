"""Option groups and their display in `--help`, and the options of all commands that run a model.

This module imports only click and the standard library, so that `--help` starts fast. The examples of a command are a
block of its docstring. The block begins with a backspace, so that click keeps its line breaks:

    \\b
    Examples:
      afterword serve                        # the built-in model
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import click
from click.core import ParameterSource

F = TypeVar("F", bound=Callable[..., Any])
_VALUES = (
    (click.types.IntParamType, "N"),
    (click.types.FloatParamType, "X"),
    (click.Path, "FILE"),
    (click.types.StringParamType, "TEXT"),
)


class GroupedOption(click.Option):
    """An option that `--help` shows under the heading `group`."""

    def __init__(self, *args: Any, group: str, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.group = group


class GroupedCommand(click.Command):
    """A command with the options in its help in groups, in the order in which the groups are first used."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options under the headings of their groups. Options without a group come last."""
        groups: dict[str, list[tuple[str, str]]] = {}
        rest: list[tuple[str, str]] = []
        for each in self.get_params(ctx):
            record = each.get_help_record(ctx) if isinstance(each, click.Option) else None
            if record:
                (groups.setdefault(each.group, []) if isinstance(each, GroupedOption) else rest).append(record)
        for heading, records in [*groups.items(), ("Other options", rest)]:
            with formatter.section(heading if groups else "Options"):
                formatter.write_dl(records)


class ServeCommand(GroupedCommand):
    """`afterword serve`: words after `--` that begin with a dash are flags for vLLM."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the words after the command's name."""
        at = args.index("--") if "--" in args else len(args)
        flags = args[at + 1 :]
        if not flags or not flags[0].startswith("-"):
            return super().parse_args(ctx, args)
        rest = super().parse_args(ctx, args[:at])
        name, typed = "vllm_flags", ParameterSource.COMMANDLINE
        before = ctx.params[name] if ctx.get_parameter_source(name) is typed else ""
        ctx.params[name] = f"{before} {shlex.join(flags)}".lstrip()
        ctx.set_parameter_source(name, typed)
        return rest


def short_values(command: click.Command) -> None:
    """Name the values of options with one short word, so that the help texts fit into 80 columns."""
    for each in command.params:
        if isinstance(each, click.Option) and not each.is_flag and each.metavar is None:
            each.metavar = next((word for kind, word in _VALUES if isinstance(each.type, kind)), None)


def leaves(command: click.Command, *words: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Yield a command, or all commands in a group, each with its words on the command line."""
    if isinstance(command, click.Group):
        for name, each in command.commands.items():
            yield from leaves(each, *words, name)
    else:
        yield words, command


def option(group: str, *names: str, **settings: Any) -> Callable[[F], F]:
    """Like `click.option`, in a group of options."""
    return click.option(*names, cls=GroupedOption, group=group, **settings)


def typed(group: str) -> list[str]:
    """Return the options of a group that were given on the command line of the running command."""
    ctx = click.get_current_context()
    options = [each for each in ctx.command.params if isinstance(each, GroupedOption) and each.group == group]
    return [
        each.opts[0] for each in options if ctx.get_parameter_source(each.name or "") is ParameterSource.COMMANDLINE
    ]


def engine_options(command: F) -> F:
    """Add the options of the group Engine to a command that runs a model."""
    options = [
        option("Engine", "--context", type=int, help="Tokens per sequence.  [default: from the model and the memory]"),
        option("Engine", "--parallel", type=int, help="Sequences computed together.  [default: 16, or as many as fit]"),
        option(
            "Engine",
            "--threads",
            type=int,
            help="Threads per model.  [default: its share of the cores; 1 for small models]",
        ),
        option("Engine", "--batch", type=int, default=256, help="Most prompt tokens in one forward pass."),
        option(
            "Engine",
            "--kv-type",
            type=click.Choice(["exact", "f16", "f32"]),
            help="Type of keys and values; see docs/reproducibility.md.  [default: exact; with --gpu-layers f16]",
        ),
        option("Engine", "--gpu-layers", type=int, default=0, help="Layers computed by a GPU; -1 for all of them."),
        option(
            "Engine",
            "--reproducible",
            is_flag=True,
            help="With --gpu-layers -1: the same request gives the same bytes; slower with few clients.",
        ),
        option(
            "Engine",
            "--infill-template",
            default="",
            help="Layout of prompts with suffix, with {prefix} and {suffix}.  [default: the model family's]",
        ),
        option(
            "Engine",
            "--speculate",
            type=click.Choice(["off", "ngram"]),
            help="ngram: draft tokens from each text itself and verify them together; changes no token. "
            "off: draft nothing from it.  [default: ngram with the built-in engine]",
        ),
        option(
            "Engine",
            "--draft-model",
            default="",
            metavar="MODEL",
            help="A small model with the same vocabulary that drafts tokens too; changes no token.",
        ),
        option("Engine", "--verbose", is_flag=True, help="Show the log of llama.cpp."),
    ]
    for each in reversed(options):
        command = each(command)
    return command
