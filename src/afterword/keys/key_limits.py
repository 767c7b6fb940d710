"""How many wrong keys may be tried, and how long keys are trusted that cannot be read again."""

from __future__ import annotations

from dataclasses import dataclass

from afterword.settings.limit_table import limit


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """Times in seconds. `wrong_keys`, which has an option of its own: so many a minute from one address, 0: any."""

    wrong_keys: int = 0
    keys_seconds: float = limit(600.0, "seconds that keys of the key file open the server after it was last readable")
