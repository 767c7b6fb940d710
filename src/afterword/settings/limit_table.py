"""Tables of limits: how a package declares its limits, and how all of them are read, listed and set by name.

A limit is a field of a frozen dataclass with a default value and a description. The limits of requests are in
`completion/request_limits.py`, those of connections in `transport/transport_limits.py`.
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
    """One limit: its name, its value (None: no limit) and its description."""

    name: str
    value: float | None
    meaning: str


def limit(default: Any, meaning: str) -> Any:
    """A field of a table with its default value. `meaning` completes the phrase "the number of …"."""
    return field(default=default, metadata={"meaning": meaning})


def limit_entries(*tables: DataclassInstance) -> Iterator[LimitEntry]:
    """Every limit of `tables`, in the order of the fields."""
    for table in tables:
        for each in fields(table):
            if "meaning" in each.metadata:
                yield LimitEntry(each.name, getattr(table, each.name), each.metadata["meaning"])


def limits_as_text(*tables: DataclassInstance) -> str:
    """The limits as lines for people: name, value, description. `-` means no limit."""
    lines = [(row.name, _as_text(row.value), row.meaning) for row in limit_entries(*tables)]
    return "\n".join(f"{name:<22} {value:>10}  {meaning}" for name, value, meaning in lines)


def _as_text(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:g}"


def limits_as_json(*tables: DataclassInstance) -> str:
    """The limits as a JSON object for programs. The value `null` means no limit."""
    return json.dumps(
        {row.name: {"value": row.value, "meaning": row.meaning} for row in limit_entries(*tables)}, indent=2
    )


def parse_limits(settings: tuple[str, ...]) -> dict[str, float]:
    """The numbers of arguments `NAME=NUMBER` by name. Raises `SettingError`."""
    parsed = {}
    for setting in settings:
        name, _, number = setting.partition("=")
        try:
            parsed[name] = int(number) if number.isdigit() else float(number)
        except ValueError:
            raise SettingError(f"--limit {setting}: write NAME=NUMBER, such as max_n=16.") from None
        if not 0 <= parsed[name] < 2**53:  # this comparison rejects NaN too
            raise SettingError(f"--limit {setting}: the number must be at least 0 and less than 2**53.")
    return parsed


def with_limits(table: LimitTable, given: dict[str, float]) -> LimitTable:
    """A copy of `table` with those limits of `given` that belong to it; they are removed from `given`.

    Counts must be whole numbers, times need not be. Raises `SettingError`.
    """
    own = {row.name: given.pop(row.name) for row in limit_entries(table) if row.name in given}
    for name, number in own.items():
        if not isinstance(getattr(table, name), float) and not isinstance(number, int):
            raise SettingError(f"--limit {name}={number}: the number must be a whole number.")
    return replace(table, **own)


def check_all_used(given: dict[str, float]) -> None:
    """Check that tables have taken all limits of `given`. Raises `SettingError` with the name of an unknown limit."""
    for name in given:
        raise SettingError(f"--limit {name}: there is no such limit; --print-limits lists all limits.")
