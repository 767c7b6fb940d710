"""What a gate is: a goal, how much of it is tried, and the bug that it must catch."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from .server import Server, serving

Plant = Callable[[pytest.MonkeyPatch], None]
Figure = int | float | str


@dataclass(frozen=True, slots=True)
class Fault:
    """A deliberate bug: a description, and the patch that adds it to the process that `where` names.

    "gate": the gate's own process, for gates that need no server; undone afterwards.
    """

    name: str
    where: Literal["server", "engine", "gate"]
    plant: Plant


@dataclass(frozen=True, slots=True)
class Result:
    """What came out. `figures` go into the table, in order."""

    passed: bool
    figures: Mapping[str, Figure]


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of a gate: how much, from which seed, and on what servers. `planted` is for `serve`, not for gates."""

    size: int
    seed: int = 1
    planted: str | None = None
    folder: Path | None = None  # for what a gate draws or keeps; None: nowhere
    say: Callable[[str], None] = field(default=lambda _: None)  # progress, in a few words

    @contextmanager
    def serve(
        self,
        *arguments: str,
        scripted: bool = False,
        key: str | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> Iterator[Server]:
        """`afterword serve` with these arguments in a process of its own, with the planted bug if there is one.

        `scripted`: the engine's process computes no model (see `scripted_model.py`).
        """
        with serving(*arguments, scripted=scripted, planted=self.planted, key=key, variables=variables) as server:
            yield server


@dataclass(frozen=True, slots=True)
class Gate:
    """A promise as something to run. Sizes count `unit`; `planted` is how many are enough to catch the fault."""

    name: str
    goal: str
    unit: str
    commit: int
    nightly: int
    run: Callable[[Trial], Result]
    fault: Fault
    planted: int


def find_gates() -> list[Gate]:
    """The `GATE` of every file here that is called like one, in order."""
    return [_gate_in(module) for module in _modules()]


def find_gate(name: str) -> Gate:
    """One of them; the other files are not imported."""
    return _gate_in(next(module for module in _modules() if int(module[1:3]) == int(name[1:])))


def _modules() -> list[str]:
    names = sorted(found.name for found in pkgutil.iter_modules([str(Path(__file__).parent)]))
    return [name for name in names if name[0] == "g" and name[1:3].isdigit()]


def _gate_in(module: str) -> Gate:
    gate: Gate = importlib.import_module(f"{__package__}.{module}").GATE
    return gate


def attempt(gate: Gate, trial: Trial) -> Result:
    """Run a gate. A fault of the gate's own process is planted here; the others, where servers are started."""
    with pytest.MonkeyPatch.context() as patch:
        if trial.planted and gate.fault.where == "gate":
            gate.fault.plant(patch)
        return gate.run(trial)
