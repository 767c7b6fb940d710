"""`afterword keys` and `afterword usage`: manage the API keys of a server, and show their usage."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from afterword.errors import SettingError

if TYPE_CHECKING:  # at run time they are imported where they are used, so that --help starts fast
    from afterword.keys.key import Key
    from afterword.keys.key_store import KeyStore, UsageGrouping

F = TypeVar("F", bound=Callable[..., Any])
KEYS_FILE = "AFTERWORD_KEYS_FILE"
"""The environment variable with the path of the key database, for every command."""


def keys_file_option(command: F) -> F:
    """Add the option `--keys-file` to a command."""
    kind = click.Path(path_type=Path)
    text = "File of the API keys.  [default: afterword/keys.db in $XDG_DATA_HOME or ~/.local/share]"
    return click.option("--keys-file", type=kind, envvar=KEYS_FILE, help=text)(command)


@click.group()
def keys() -> None:
    """Create, list and revoke API keys of a server.

    `afterword serve --keys` accepts these keys. A running server applies changes within a second.

    \b
    Examples:
      afterword keys create --name Ann --expires 30d
      afterword keys list
    """


@keys.command()
@click.option("--name", default="", help="Name of the person or program that uses the key.")
@click.option("--expires", help="Time until it expires: 12h, 30d, 52w.  [default: unlimited]")
@click.option("--rpm", type=click.IntRange(1, 10**9), help="Most requests per minute.")
@click.option("--tpm", type=click.IntRange(1, 10**12), help="Most tokens per minute, prompts and completions together.")
@click.option("--concurrent", type=click.IntRange(1, 10**9), help="Most requests at the same time.")
@click.option("--quota", type=click.IntRange(1, 10**15), help="Most tokens in total.")
@keys_file_option
def create(  # noqa: PLR0913, PLR0917 (as many as options)
    name: str,
    expires: str | None,
    rpm: int | None,
    tpm: int | None,
    concurrent: int | None,
    quota: int | None,
    keys_file: Path | None,
) -> None:
    """Create an API key and print it. It cannot be shown again.

    \b
    Examples:
      afterword keys create --name Ann
      afterword keys create --name course --rpm 60 --quota 1000000
    """
    if not name.isprintable() or len(name) > 64:
        raise SettingError("--name must have at most 64 characters, all printable.")
    from afterword.keys.key import Allowance, parse_duration

    end = None if expires is None else int(time.time() + parse_duration(expires).total_seconds())
    store = _open_store(keys_file, create=True)
    key, text = store.create(name, end, Allowance(rpm, tpm, concurrent, quota))
    click.echo(text)
    click.echo(
        f"The ID of this key is {key.id}. Store the key: it is not shown again. afterword serve --keys accepts it.",
        err=True,
    )


@keys.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with all fields.")
@keys_file_option
def list_(as_json: bool, keys_file: Path | None) -> None:
    """List all API keys, expired and revoked ones too.

    \b
    Examples:
      afterword keys list
      afterword keys list --json
    """
    known = _open_store(keys_file).all()
    if as_json:
        click.echo(json.dumps([_as_json_fields(key) for key in known], indent=2))
        return
    head = ("ID", "state", "created", "expires", "requests/min", "tokens/min", "concurrent", "tokens spent", "name")
    lines = _table(head, [_table_row(key) for key in known])
    if not sys.stdout.isatty() or max(map(len, lines)) <= shutil.get_terminal_size().columns:
        click.echo("\n".join(lines))
        return
    for key in known:
        click.echo(_paragraph(key, head, shutil.get_terminal_size().columns))


@keys.command()
@click.argument("key")
@keys_file_option
def revoke(key: str, keys_file: Path | None) -> None:
    """Revoke the API key with this ID. This cannot be undone.

    \b
    Examples:
      afterword keys revoke key_1a2b3c           # IDs are in keys list
    """
    _open_store(keys_file).revoke(key)
    click.echo(f"{key} is revoked.")


@click.command()
@click.option("--by", type=click.Choice(["key", "user", "day"]), default="key", help="Group usage by this.")
@click.option(
    "--user", help="Only requests with this value in the field user. Without this option users are shown as pseudonyms."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@keys_file_option
def usage(by: UsageGrouping, user: str | None, as_json: bool, keys_file: Path | None) -> None:
    """Show usage by API key, user or day.

    Shows requests, prompt tokens, how many of these were cached, and completion tokens. Completion tokens include
    generated tokens that are not in a response. Days are UTC.

    \b
    Examples:
      afterword usage                            # by key
      afterword usage --by day --json
      afterword usage --user ann@example.org
    """
    store = _open_store(keys_file)
    sums = store.usage(by, user)
    if as_json:
        click.echo(json.dumps([{by: name or None, **asdict(each)} for name, each in sums], indent=2))
        return
    names = {key.id: key.name for key in store.all()} if by == "key" else {}
    head = (by, "requests", "prompt", "cached", "completion", *(("name",) if names else ()))
    rows = [
        (name or "-", each.requests, each.prompt, each.cached, each.completion, names.get(name)) for name, each in sums
    ]
    click.echo("\n".join(_table(head, [row[: len(head)] for row in rows])))


def _open_store(keys_file: Path | None, *, create: bool = False) -> KeyStore:
    from afterword.keys.key_store import KeyStore, default_path

    return KeyStore(keys_file or default_path(), create=create)


def _as_json_fields(key: Key) -> dict[str, Any]:
    facts = asdict(key) | asdict(key.allowance) | {"state": key.state(time.time())}
    return {name: value for name, value in facts.items() if name not in ("digest", "allowance")}


def _table_row(key: Key) -> tuple[object, ...]:
    limits = key.allowance
    spent = f"{key.spent:,}" if limits.quota is None else f"{key.spent:,} of {limits.quota:,}"
    rates = (limits.requests, limits.tokens, limits.concurrent)
    return (key.id, key.state(time.time()), _format_day(key.created), _format_day(key.expires), *rates, spent, key.name)


def _paragraph(key: Key, head: Sequence[str], columns: int) -> str:
    """A key as some lines, for a terminal that is too narrow for the table. Missing values are left out."""
    named = dict(zip(head, map(_format_value, _table_row(key)), strict=True))
    first = f"{named.pop('ID')}  {named.pop('state')}  {named.pop('name').removeprefix('-')}".rstrip()
    facts = ", ".join(f"{name} {value}" for name, value in named.items() if value != "-")
    return f"{first}\n" + textwrap.fill(facts, columns, initial_indent="  ", subsequent_indent="  ")


def _format_day(seconds: int | None) -> str | None:
    return None if seconds is None else time.strftime("%Y-%m-%d", time.gmtime(seconds))


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """The lines of a table. Columns are as wide as their longest entry; an empty entry is `-`."""
    shown = [head, *([_format_value(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in shown]


def _format_value(value: object) -> str:
    return "-" if value is None or value == "" else f"{value:,}" if isinstance(value, int) else str(value)
