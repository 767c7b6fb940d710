"""Patterns that stand for formats of JSON Schema, where llguidance allows more than the standard of the format.

It accepts 2021-02-29, leap seconds at any minute and host names of any length. These patterns accept only texts that
are valid everywhere: no leap seconds, which few parsers read, no year 0, and no labels with hyphens in the third and
fourth place (`xn--…`), whose validity no regular expression can say.
"""

from __future__ import annotations

from typing import Any

_YEAR = "([1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_LEAP_YEAR = "([0-9]{2}(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)"
_MONTHS_OF_31, _MONTHS_OF_30 = "(0[13578]|1[02])", "(0[469]|11)"
_DAY_OF_31, _DAY_OF_30, _DAY_OF_28 = (
    f"(0[1-9]|{days})" for days in ("[12][0-9]|3[01]", "[12][0-9]|30", "1[0-9]|2[0-8]")
)
_DAY_OF_YEAR = f"({_MONTHS_OF_31}-{_DAY_OF_31}|{_MONTHS_OF_30}-{_DAY_OF_30}|02-{_DAY_OF_28})"
_DATE = f"({_YEAR}-{_DAY_OF_YEAR}|{_LEAP_YEAR}-02-29)"
_MINUTE = "([01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_MINUTE}:[0-5][0-9](\.[0-9]{{1,9}})?([Zz]|[+-]{_MINUTE})"
_ANY, _END = "[A-Za-z0-9-]", "[A-Za-z0-9]"
_LONG_LABEL = f"{_END}{_ANY}({_END}{_ANY}|-{_END}){_ANY}{{0,58}}{_END}"  # 5 to 63 characters
_LABEL = f"({_END}({_ANY}{{0,2}}{_END})?|{_LONG_LABEL})"

FORMATS: dict[str, dict[str, Any]] = {
    "date": {"pattern": f"^{_DATE}$"},
    "time": {"pattern": f"^{_TIME}$"},
    "date-time": {"pattern": f"^{_DATE}[Tt]{_TIME}$"},
    "hostname": {"pattern": rf"^{_LABEL}(\.{_LABEL})*$", "maxLength": 253},
}
"""The schema that stands for a format."""
