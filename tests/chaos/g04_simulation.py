"""G4: the eleven invariants in simulated worlds. `python -m tests.sim` runs the same and prints the seeds."""

from __future__ import annotations

import os
from collections import Counter

import pytest

from afterword.engine.parent.pending_job import PendingJob
from sim.__main__ import outcomes

from .gate import Fault, Gate, Result, Trial

EVENTS, ALONE = 200, 100  # events per seed; up to this many seeds one process is faster than several


def run(trial: Trial) -> Result:
    processes = 1 if trial.size < ALONE else os.cpu_count() or 1
    broken, deaths = [], 0
    ends: Counter[str] = Counter()
    for done, outcome in enumerate(outcomes(trial.seed * 10**7, trial.size, EVENTS, processes)):
        trial.say(f"G4 {done}")
        deaths += outcome.deaths
        ends.update(outcome.outcomes)
        broken += [outcome.seed] if outcome.broken else []
    figures = {"broken": len(broken), "first": broken[0] if broken else "-", "engines that died": deaths}
    return Result(not broken, {**figures, "requests": ends.total(), "finished": ends["finished"]})


def repeat_after_a_crash(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PendingJob, "_repeats", lambda *_: False)


GATE = Gate(
    name="G4",
    goal="eleven invariants of queue, scheduler, limiter and supervisor hold in every simulated world",
    unit="seeds of 200 events",
    commit=300,
    nightly=40_000,
    run=run,
    fault=Fault("a token is repeated after a crash", "gate", repeat_after_a_crash),
    planted=20,
)
