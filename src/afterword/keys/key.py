"""What a key is: a text that is shown once, what is kept of it, and what it may use. Pure but for randomness."""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

from afterword.errors import SettingError

KeyState = Literal["active", "expired", "revoked"]
_SPAN = re.compile(r"([0-9]{1,6})([hdw])")
_UNITS = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a key may use; None is any amount. `requests` and `tokens` are a minute's, `quota` is tokens in all."""

    requests: int | None = None
    tokens: int | None = None
    concurrent: int | None = None
    quota: int | None = None


@dataclass(frozen=True, slots=True)
class Key:
    """A key without its text. Times are Unix seconds; `spent` are the tokens that count against the quota."""

    id: str
    digest: bytes
    name: str = ""
    created: int = 0
    expires: int | None = None
    revoked: int | None = None
    allowance: Allowance = Allowance()
    spent: int = 0

    def state(self, now: float) -> KeyState:
        """Whether it opens the server."""
        if self.revoked is not None:
            return "revoked"
        return "active" if self.expires is None or now < self.expires else "expired"


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """Tokens that a request has used. `prompt` counts those that were in the cache too, `completion` all that were
    generated, in the answer's text or not."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0

    @property
    def total(self) -> int:
        """What counts against limits."""
        return self.prompt + self.completion


def digest(text: str) -> bytes:
    """What is kept of a key's text. A fast hash is enough for 256 random bits."""
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()


def generate_key() -> tuple[str, str]:
    """A fresh key's id and its text, which contains the id."""
    name = secrets.token_hex(4)
    return name, f"aw_{name}_{secrets.token_urlsafe(32)}"


def static_keys(texts: tuple[str, ...], file: Path | None) -> tuple[Key, ...]:
    """Keys given one by one and one a line in a file (not blank lines and those with #), without limits.

    They are named by their place, since even a digest would tell something of a key that a person thought up.
    """
    lines: list[str] = []
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise SettingError(f"--api-key-file {file}: it cannot be read ({error}).") from None
    listed = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if file is not None and not listed:
        raise SettingError(f"--api-key-file {file}: it has no keys.")
    if not all(text.isascii() and text.isprintable() and text.strip() for text in (*texts, *listed)):
        raise SettingError("An API key must be printable ASCII and not empty.")
    return tuple(Key(f"given-{place}", digest(text)) for place, text in enumerate((*texts, *listed), 1))


def parse_duration(text: str) -> timedelta:
    """12h, 30d or 52w. Raises `SettingError`."""
    found = _SPAN.fullmatch(text)
    if found is None or int(found[1]) == 0:
        raise SettingError(f"--expires {text}: write how long from now, such as 12h, 30d or 52w.")
    return int(found[1]) * _UNITS[found[2]]
