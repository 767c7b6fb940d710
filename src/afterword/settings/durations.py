"""Durations as users write them: `300`, `90s`, `5m`, `1h30m`, `forever`."""

from __future__ import annotations

import re

from afterword.errors import SettingError

_UNITS = {"h": 3600, "m": 60, "s": 1}
_PATTERN = re.compile(r"(?=.)" + "".join(rf"(?:(\d+(?:\.\d+)?){unit})?" for unit in _UNITS))
_NAMES = {3600: "hour", 60: "minute", 1: "second"}


def parse_duration(text: str) -> float | None:
    """Seconds; None for `forever` and `-1`. Raises `SettingError`."""
    text = text.strip().lower()
    if text in ("forever", "-1"):
        return None
    found = _PATTERN.fullmatch(text if text[-1:] in _UNITS else f"{text}s")
    if not found:
        raise SettingError(f"{text!r} is not a duration; write seconds, such as 300, or 90s, 5m, 1h30m or forever.")
    return sum(float(number or 0) * size for number, size in zip(found.groups(), _UNITS.values(), strict=True))


def format_duration(seconds: float) -> str:
    """The duration in words, in the largest unit of which it is a whole multiple, such as "5 minutes"."""
    size = next((size for size in _NAMES if seconds and seconds % size == 0), 1)
    count = f"{seconds / size:g}"
    return f"{count} {_NAMES[size]}" + ("" if count == "1" else "s")
