"""G12: the server process does not grow with requests; the engine is scripted and computes no model."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from afterword.api.routes import completions

from .gate import Fault, Gate, Result, Trial
from .soak import Soak, soak


def run(trial: Trial) -> Result:
    plan = Soak("front-end", _body, leaves=0.1, slope=64)
    with trial.serve(
        "--parallel", "16", "--context", "256", scripted=True, variables={"MALLOC_ARENA_MAX": "2"}
    ) as server:
        return soak(server, plan, trial)


def _body(random: Random) -> dict[str, Any]:
    """A random request of one of several kinds, some of them invalid. No two requests are equal."""
    text = f"{random.getrandbits(128):032x} " * random.randint(1, 3)
    return random.choice(
        (
            {"prompt": text, "max_tokens": 8},
            {"prompt": text, "max_tokens": 8, "stream": True, "stop": [text[:3], "zz"]},
            {"prompt": text, "max_tokens": 4, "logprobs": 3, "echo": True, "user": text},
            {"prompt": [text, text[::-1]], "max_tokens": 4, "n": 2, "cache_salt": text},
            {"prompt": text, "max_tokens": 4, "temperature": text},
            {text: 1},
        )
    )


def keep_every_plan(patch: pytest.MonkeyPatch) -> None:
    kept = []
    answer = completions.CompletionResponse.__init__

    def init(self: Any, *arguments: Any, **more: Any) -> None:
        kept.append(bytearray(1_000))
        answer(self, *arguments, **more)

    patch.setattr(completions.CompletionResponse, "__init__", init)


GATE = Gate(
    name="G12",
    goal="memory does not grow with requests, nor do files, threads, processes (scripted engine)",
    unit="requests",
    commit=10_000,
    nightly=100_000,
    run=run,
    fault=Fault("the server keeps 1 kB for every response", "server", keep_every_plan),
    planted=2_500,
)
