"""The table of limits: how a room declares its own, and how all of them are read, listed and set by name.

A limit is a field of a frozen dataclass with a default and a meaning. Requests' are in `completion/request_limits.py`,
connections' in `transport/transport_limits.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import field, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from afterword.errors import SettingError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

LimitTable = TypeVar("LimitTable", bound="DataclassInstance")


class LimitEntry(NamedTuple):
    """One limit."""

    name: str
    value: float | None
    meaning: str


def limit(default: Any, meaning: str) -> Any:
    """A field of a table. Its meaning completes the sentence "so much of …"."""
    return field(default=default, metadata={"meaning": meaning})


def limit_entries(*tables: DataclassInstance) -> Iterator[LimitEntry]:
    """Every limit of some tables, in their order."""
    for table in tables:
        for each in fields(table):
            if "meaning" in each.metadata:
                yield LimitEntry(each.name, getattr(table, each.name), each.metadata["meaning"])


def limits_as_text(*tables: DataclassInstance) -> str:
    """The limits as lines for a person."""
    lines = [(row.name, "-" if row.value is None else f"{row.value:g}", row.meaning) for row in limit_entries(*tables)]
    return "\n".join(f"{name:<22} {value:>9}  {meaning}" for name, value, meaning in lines)


def limits_as_json(*tables: DataclassInstance) -> str:
    """The limits for a program: `null` is none."""
    return json.dumps(
        {row.name: {"value": row.value, "meaning": row.meaning} for row in limit_entries(*tables)}, indent=2
    )


def parse_limits(settings: tuple[str, ...]) -> dict[str, float]:
    """`NAME=NUMBER` as it is typed. Raises `SettingError`."""
    parsed = {}
    for setting in settings:
        name, _, number = setting.partition("=")
        try:
            parsed[name] = int(number) if number.isdigit() else float(number)
        except ValueError:
            raise SettingError(f"--limit {setting}: write NAME=NUMBER.") from None
        if not 0 <= parsed[name] < 2**53:  # in this form, so that NaN cannot pass
            raise SettingError(f"--limit {setting}: a limit is not negative, and finite.")
    return parsed


def with_limits(table: LimitTable, given: dict[str, float]) -> LimitTable:
    """The table with those of the given limits that are its own; they are taken out of `given`.

    Counts are whole numbers, seconds need not be. Raises `SettingError`.
    """
    own = {row.name: given.pop(row.name) for row in limit_entries(table) if row.name in given}
    for name, number in own.items():
        if not isinstance(getattr(table, name), float) and not isinstance(number, int):
            raise SettingError(f"--limit {name}={number}: write a whole number.")
    return replace(table, **own)


def check_all_used(given: dict[str, float]) -> None:
    """What no table has taken is a mistake. Raises `SettingError`."""
    for name in given:
        raise SettingError(f"--limit {name}: there is no such limit; --print-limits lists them.")
