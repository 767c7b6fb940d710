"""Formats results as a table for the terminal, and updates the table in a document."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from .gate import Figure, Gate, Result, Trial

HEAD = "| gate | goal | tried | figures | | seconds | date |\n|---|---|---|---|---|---|---|"
_START, _END = "<!-- gates -->", "<!-- /gates -->"


@dataclass(frozen=True, slots=True)
class Row:
    """One run of a gate. `good`: the gate passed, or failed with its bug planted."""

    gate: str
    goal: str
    tried: str
    figures: str
    good: bool
    planted: bool
    seconds: float

    @classmethod
    def of(cls, gate: Gate, trial: Trial, result: Result, seconds: float) -> Row:
        figures = ", ".join(f"{name} {_shown(figure)}" for name, figure in result.figures.items())
        planted = trial.planted is not None
        goal = f"catches: {gate.fault.name}" if planted else gate.goal
        return cls(gate.name, goal, f"{trial.size:,} {gate.unit}", figures, result.passed != planted, planted, seconds)

    @property
    def line(self) -> str:
        """As a row of the table."""
        verdict = {(True, False): "held", (False, False): "FAILED", (True, True): "caught", (False, True): "NOT CAUGHT"}
        cells = (self.gate, self.goal, self.tried, self.figures, verdict[self.good, self.planted])
        return f"| {' | '.join(cells)} | {self.seconds:.0f} | {datetime.now(UTC):%Y-%m-%d} |"


def markdown(rows: Iterable[Row]) -> str:
    """The whole table, with the size of the machine below it."""
    return "\n".join((HEAD, *(row.line for row in rows), "", machine()))


def machine() -> str:
    """The size of this machine, without which the figures have no meaning."""
    memory = psutil.virtual_memory().total / 2**30
    return f"On {os.cpu_count()} cores and {memory:.0f} GB of memory."


def merge_into(document: Path, rows: Iterable[Row]) -> None:
    """Replace the rows of the same gates in the table between the marks of a document."""
    text = document.read_text(encoding="utf-8")
    before, rest = text.split(_START)
    old, after = rest.split(_END)
    lines = {found[1]: line for line in old.splitlines() if (found := re.match(r"\| (G\d+) \|", line))}
    lines |= {row.gate: row.line for row in rows}
    table = "\n".join((HEAD, *(lines[name] for name in sorted(lines, key=_number)), "", machine()))
    document.write_text(f"{before}{_START}\n{table}\n{_END}{after}", encoding="utf-8")


def _number(name: str) -> int:
    return int(name[1:])


def _shown(figure: Figure) -> str:
    if isinstance(figure, float):
        return f"{figure:,.3g}" if abs(figure) < 100 else f"{figure:,.0f}"
    return f"{figure:,}" if isinstance(figure, int) else " ".join(figure.replace("|", "/").split())
