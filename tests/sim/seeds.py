"""Seeds that once broke an invariant. Every test run simulates them again."""

from __future__ import annotations

from pathlib import Path

from .simulation import Outcome

FILE = Path(__file__).with_name("seeds.txt")


def saved_seeds() -> list[int]:
    """All seeds in seeds.txt."""
    lines = FILE.read_text(encoding="utf-8").splitlines()
    return [int(line.split()[0]) for line in lines if line and not line.startswith("#")]


def save(outcome: Outcome) -> None:
    """Add a seed and its broken invariant to seeds.txt, unless it is there."""
    if outcome.seed not in saved_seeds():
        with FILE.open("a", encoding="utf-8") as file:
            file.write(f"{outcome.seed}  {outcome.broken}\n")
