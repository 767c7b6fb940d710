"""Reads lists of words from a text file, and fills slots with them.

This module parses the notation of stories.txt and functions.txt. A slot `{name}` or `{name.1}` keeps its value in a
text; `{name2}` is another slot of the same list.
"""

import random
import re
from functools import cache
from pathlib import Path

SLOT = re.compile(r"\{(\w+)(?:\.(\d))?\}")

Fields = tuple[str, ...]
Lists = dict[str, tuple[Fields, ...]]
Section = tuple[str, tuple[str, ...]]


@cache
def sections(path: Path) -> tuple[Lists, tuple[Section, ...]]:
    """The lists at the top of the file, and the sections after them: titles with their lines."""
    head, *parts = path.read_text("utf-8").split("\n== ")
    lists = {}
    for line in head.splitlines():
        if line and not line.startswith("#"):
            name, entries = line.split(": ", 1)
            lists[name] = tuple(tuple(entry.strip().split("|")) for entry in entries.split("; "))
    found = [part.strip().splitlines() for part in parts]
    return lists, tuple((title, tuple(lines)) for title, *lines in found)


def ways(line: str) -> list[str]:
    """The alternative wordings of one line."""
    return [way.strip() for way in line.split("||")]


class Slots:
    """The values of one text's slots, chosen at random on first use."""

    def __init__(self, lists: Lists, rng: random.Random) -> None:
        self._lists = lists
        self._dice = rng
        self._values: dict[str, Fields] = {}

    def put(self, slot: str, *fields: str) -> None:
        """Set the value of a slot."""
        self._values[slot] = fields

    def draw(self, name: str, slot: str) -> Fields:
        """Fill a slot with a random entry that no other slot has. Slots within the entry get new values."""
        taken = {value[-1] for value in self._values.values()}
        while (fields := self._dice.choice(self._lists[name]))[-1] in taken:
            pass
        inner: dict[str, str] = {}
        for found in SLOT.finditer(" ".join(fields)):
            inner[found[1]] = self._dice.choice(self._lists[found[1]])[0]
        self._values[slot] = tuple(SLOT.sub(lambda found: inner[found[1]], field) for field in fields)
        return self._values[slot]

    def fill(self, text: str) -> str:
        """The text with every slot's value in its place."""
        return SLOT.sub(self._value, text)

    def _value(self, found: re.Match[str]) -> str:
        slot, field = found[1], int(found[2] or 0)
        return (self._values.get(slot) or self.draw(slot.rstrip("23"), slot))[field]
