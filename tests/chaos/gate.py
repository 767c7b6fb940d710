"""The parts of a gate: a goal, a size, a function that tests the goal, and a planted bug that the gate must catch."""

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

    "gate": the gate's own process, for gates without a server; the patch is undone afterwards.
    """

    name: str
    where: Literal["server", "worker", "gate"]
    plant: Plant


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of a gate. The table shows `figures` in this order."""

    passed: bool
    figures: Mapping[str, Figure]


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of a gate: its size, its seed and its servers. Only `serve` reads `planted`; gates must not."""

    size: int
    seed: int = 1
    planted: str | None = None
    folder: Path | None = None  # for pictures and files that a gate keeps; None: keep nothing
    say: Callable[[str], None] = field(default=lambda _: None)  # shows progress

    @contextmanager
    def serve(
        self,
        *arguments: str,
        scripted: bool = False,
        key: str | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> Iterator[Server]:
        """Run `afterword serve` with these arguments in a separate process, with the planted bug if there is one.

        `scripted`: the worker runs `scripted_model.py` instead of a model.
        """
        with serving(*arguments, scripted=scripted, planted=self.planted, key=key, variables=variables) as server:
            yield server


@dataclass(frozen=True, slots=True)
class Gate:
    """A reliability goal and its test. Sizes are counts of `unit`; a size of `planted` suffices to catch the fault."""

    name: str
    goal: str
    unit: str
    commit: int
    nightly: int
    run: Callable[[Trial], Result]
    fault: Fault
    planted: int


def find_gates() -> list[Gate]:
    """The `GATE` of every module named `g` and a number, in order."""
    return [_gate_in(module) for module in _modules()]


def find_gate(name: str) -> Gate:
    """The gate with this name. The modules of other gates are not imported."""
    return _gate_in(next(module for module in _modules() if int(module[1:3]) == int(name[1:])))


def _modules() -> list[str]:
    names = sorted(found.name for found in pkgutil.iter_modules([str(Path(__file__).parent)]))
    return [name for name in names if name[0] == "g" and name[1:3].isdigit()]


def _gate_in(module: str) -> Gate:
    gate: Gate = importlib.import_module(f"{__package__}.{module}").GATE
    return gate


def attempt(gate: Gate, trial: Trial) -> Result:
    """Run a gate. This function plants faults of the gate's own process; `serve` plants the others."""
    with pytest.MonkeyPatch.context() as patch:
        if trial.planted and gate.fault.where == "gate":
            gate.fault.plant(patch)
        return gate.run(trial)
