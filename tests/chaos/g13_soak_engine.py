"""G13: neither process grows with requests, on the built-in model."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from afterword.engine.core.engine_loop import EngineLoop

from .gate import Fault, Gate, Result, Trial
from .soak import Soak, soak


def run(trial: Trial) -> Result:
    plan = Soak("engine", _body, leaves=0.2, slope=256)
    with trial.serve("--parallel", "16", "--context", "256", variables={"MALLOC_ARENA_MAX": "2"}) as server:
        return soak(server, plan, trial)


def _body(random: Random) -> dict[str, Any]:
    """A random request with a unique prompt and log probabilities, whole or streamed."""
    text = f"{random.getrandbits(64):016x} Once upon a time " * random.randint(1, 3)
    return {"prompt": text, "max_tokens": random.randint(1, 16), "logprobs": 5, "stream": random.random() < 0.5}


def keep_of_every_job(patch: pytest.MonkeyPatch) -> None:
    kept = []
    start = EngineLoop.start

    def starting(self: EngineLoop, *arguments: Any) -> None:
        kept.append(bytearray(200_000))
        start(self, *arguments)

    patch.setattr(EngineLoop, "start", starting)


GATE = Gate(
    name="G13",
    goal="memory does not grow with requests (built-in model; unique prompts, log probabilities, 20 % leave)",
    unit="requests",
    commit=500,
    nightly=10_000,
    run=run,
    fault=Fault("the worker keeps 200 kB for every job", "worker", keep_of_every_job),
    planted=300,
)
