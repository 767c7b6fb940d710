"""Tests with the simulator: invariants hold for many seeds, runs are deterministic, deliberate bugs are found."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from . import TESTS
from .faults import FAULTS, Fault
from .seeds import saved_seeds
from .simulation import simulate
from .virtual import VirtualLoop

SEEDS = 48
COMMIT = 300  # seeds within which every deliberate bug must be found (gate G4)


@pytest.mark.parametrize("seed", sorted({*saved_seeds(), *range(SEEDS)}))
def test_every_invariant_holds(seed: int) -> None:
    assert simulate(seed).broken is None


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_a_deliberate_bug_is_found(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    fault.install(monkeypatch)
    assert any(simulate(seed).rule in fault.rules for seed in range(COMMIT))


def test_a_seed_gives_the_same_events_every_time() -> None:
    seeds = range(3, 6)
    here = [simulate(seed).trace for seed in seeds]
    assert here == [simulate(seed).trace for seed in seeds]
    assert len(set(here)) == len(here)
    command = [sys.executable, "-m", "tests.sim", "--trace", "--first", "3", "--seeds", "3", "--processes", "1"]
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    result = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, check=True)
    assert [line.split()[1] for line in result.stdout.splitlines()[:3]] == here


def test_drafts_are_verified() -> None:
    accepted = [simulate(seed).accepted for seed in range(16)]
    assert sum(map(bool, accepted)) >= 3
    assert not any(accepted[3::4]), "a slot that is truncated with snapshots"


def test_virtual_time_advances_only_when_no_task_can_run() -> None:
    loop = VirtualLoop()
    events: list[tuple[str, float]] = []
    loop.call_later(3600, lambda: events.append(("an hour later", loop.time())))
    loop.call_later(1, lambda: (events.append(("a second later", loop.time())), loop.jump(10)))
    loop.call_later(3601, loop.stop)
    loop.run_forever()
    loop.close()
    assert events == [("a second later", 1.0), ("an hour later", 3600.0)]
