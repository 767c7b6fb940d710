"""Which versions of vLLM are new enough. Pure."""

from __future__ import annotations

import re

OLDEST = (0, 32)
OLDEST_TEXT = ".".join(map(str, OLDEST))


def is_too_old(version: str) -> bool:
    """Whether a version of vLLM is older than `OLDEST`."""
    found = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if ".dev" in version and found < (0, 2):  # built from source without tags, so the number says nothing
        return False
    return found < OLDEST
