"""API keys: their text, the digest that is stored of it, and their limits. Pure, except for random numbers."""

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
_DURATION = re.compile(r"([0-9]{1,6})([hdw])")
_UNITS = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}


@dataclass(frozen=True, slots=True)
class Allowance:
    """The limits of a key; None means no limit.

    `requests` and `tokens` are per minute, `concurrent` is at the same time, `quota` is tokens in total.
    """

    requests: int | None = None
    tokens: int | None = None
    concurrent: int | None = None
    quota: int | None = None


@dataclass(frozen=True, slots=True)
class Key:
    """A key without its text. Times are Unix seconds. `spent`: tokens that count against the quota."""

    id: str
    digest: bytes
    name: str = ""
    created: int = 0
    expires: int | None = None
    revoked: int | None = None
    allowance: Allowance = Allowance()
    spent: int = 0

    @property
    def cache_name(self) -> str:
        """A name for the prefixes of its requests, which no other key ever has. The text cannot be computed from it.

        Ids do not suffice: keys of the command line are numbered, so another key can have the same id after a restart.
        """
        return hashlib.sha256(b"prefixes\n" + self.id.encode() + b"\n" + self.digest).hexdigest()

    def state(self, now: float) -> KeyState:
        """Whether the key is valid at the time `now`, in Unix seconds."""
        if self.revoked is not None:
            return "revoked"
        return "active" if self.expires is None or now < self.expires else "expired"


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """Tokens that a request has used.

    `prompt` includes the tokens that were in the prefix cache, which `cached` counts. `completion` counts all generated
    tokens, whether or not they are in the text.
    """

    prompt: int = 0
    completion: int = 0
    cached: int = 0

    @property
    def total(self) -> int:
        """The tokens that count against limits."""
        return self.prompt + self.completion


def digest(text: str) -> bytes:
    """The digest of a key's text, which is stored in its place. SHA-256 is enough, since a key has 256 random bits."""
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()


def generate_key() -> tuple[str, str]:
    """A new key's id, and its text, which contains the id."""
    name = secrets.token_hex(4)
    return name, f"aw_{name}_{secrets.token_urlsafe(32)}"


def static_keys(texts: tuple[str, ...], file: Path | None) -> tuple[Key, ...]:
    """Keys without limits: `texts` from the command line, and those in `file`, one per line.

    Blank lines and lines that begin with # are skipped. The keys are named by their position: a part of their digest
    would help to guess a key that a person has chosen. Raises `SettingError`.
    """
    lines: list[str] = []
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise SettingError(f"--api-key-file {file}: the file cannot be read ({error}).") from None
    listed = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if file is not None and not listed:
        raise SettingError(f"--api-key-file {file}: the file contains no keys.")
    if not all(text.isascii() and text.isprintable() and text.strip() for text in (*texts, *listed)):
        raise SettingError("An API key must consist of printable ASCII characters and must not be empty.")
    return tuple(Key(f"given-{position}", digest(text)) for position, text in enumerate((*texts, *listed), 1))


def parse_duration(text: str) -> timedelta:
    """The duration of texts such as 12h, 30d or 52w. Raises `SettingError`."""
    found = _DURATION.fullmatch(text)
    if found is None or int(found[1]) == 0:
        raise SettingError(f"--expires {text}: write the time from now, such as 12h, 30d or 52w.")
    return int(found[1]) * _UNITS[found[2]]
