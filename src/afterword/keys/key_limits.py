"""Limits on wrong keys, and on how long the server trusts keys that it cannot read again."""

from __future__ import annotations

from dataclasses import dataclass

from afterword.settings.limit_table import limit


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """Times are in seconds. `wrong_keys`, set by `--wrong-keys`: per minute and address; 0 means no limit."""

    wrong_keys: int = 0
    keys_seconds: float = limit(600.0, "seconds that keys of the key file stay valid after it was last readable")
