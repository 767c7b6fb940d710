"""Seeds that once broke an invariant. The tests play them again."""

from __future__ import annotations

from pathlib import Path

from .world import Outcome

FILE = Path(__file__).with_name("seeds.txt")


def kept() -> list[int]:
    """All of them."""
    lines = FILE.read_text(encoding="utf-8").splitlines()
    return [int(line.split()[0]) for line in lines if line and not line.startswith("#")]


def keep(outcome: Outcome) -> None:
    """Add a seed, with what it broke."""
    if outcome.seed not in kept():
        with FILE.open("a", encoding="utf-8") as file:
            file.write(f"{outcome.seed}  {outcome.broken}\n")
