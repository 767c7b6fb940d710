"""Runs each gate at its commit size, and each gate with its planted bug, which the gate must catch (G19)."""

from __future__ import annotations

import time

import pytest

from .gate import Gate, Trial, attempt, find_gates
from .table import Row

GATES = find_gates()
pytestmark = [
    pytest.mark.timeout(600),  # the simulation of G4 took 170 s beside other work
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # gates abort their own connections on purpose
]
each_gate = pytest.mark.parametrize("gate", GATES, ids=[gate.name for gate in GATES])


def judge(gate: Gate, trial: Trial, capsys: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    row = Row.of(gate, trial, attempt(gate, trial), time.monotonic() - start)
    with capsys.disabled():
        print(f"\n{row.line}")
    assert row.good, row.line


@each_gate
def test_the_gate_holds(gate: Gate, capsys: pytest.CaptureFixture[str]) -> None:
    judge(gate, Trial(gate.commit), capsys)


@each_gate
def test_the_gate_catches_its_planted_bug(gate: Gate, capsys: pytest.CaptureFixture[str]) -> None:
    judge(gate, Trial(gate.planted, planted=gate.name), capsys)
