"""The eleven invariants in many worlds; that a world is the same every time; and that planted bugs are found."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from . import TESTS
from .faults import FAULTS, Fault
from .seeds import kept
from .virtual import VirtualLoop
from .world import simulate

SEEDS = 48
COMMIT = 300  # seeds for a commit (gate G4), within which every planted bug must be found


@pytest.mark.parametrize("seed", sorted({*kept(), *range(SEEDS)}))
def test_every_invariant_holds(seed: int) -> None:
    assert simulate(seed).broken is None


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_a_planted_bug_is_found(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    fault.plant(monkeypatch)
    assert any(simulate(seed).rule in fault.rules for seed in range(COMMIT))


def test_a_seed_is_the_same_world_every_time() -> None:
    seeds = range(3, 6)
    here = [simulate(seed).trace for seed in seeds]
    assert here == [simulate(seed).trace for seed in seeds]
    assert len(set(here)) == len(here)
    command = [sys.executable, "-m", "tests.sim", "--trace", "--first", "3", "--seeds", "3", "--processes", "1"]
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    told = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, check=True)
    assert [line.split()[1] for line in told.stdout.splitlines()[:3]] == here


def test_time_passes_only_when_nothing_is_left_to_do() -> None:
    loop = VirtualLoop()
    told: list[tuple[str, float]] = []
    loop.call_later(3600, lambda: told.append(("an hour later", loop.time())))
    loop.call_later(1, lambda: (told.append(("a second later", loop.time())), loop.leap(10)))
    loop.call_later(3601, loop.stop)
    loop.run_forever()
    loop.close()
    assert told == [("a second later", 1.0), ("an hour later", 3600.0)]
