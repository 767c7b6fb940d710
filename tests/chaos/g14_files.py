"""G14: model files with wrong headers are refused with a message, or load, and never crash the worker."""

from __future__ import annotations

import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from afterword.errors import SettingError
from afterword.models import gguf_checks, gguf_facts

from .gate import Fault, Gate, Result, Trial
from .mutations import DIED, HUNG, LIVED, REFUSED, bases, mutated
from .server import helper_process


def run(trial: Trial) -> Result:
    random, results = Random(trial.seed), Counter[str]()
    surprises = 0
    with tempfile.TemporaryDirectory() as name, helper_process("mutations") as loader:
        folder = Path(name)
        sound = bases(folder)
        path = folder / "mutated.gguf"
        for number in range(trial.size):
            path.write_bytes(mutated(random.choice(sound), random))
            try:
                gguf_facts.read_facts(path)
            except SettingError:
                results["checked"] += 1
            except Exception:  # in the server this exception would occur in the server's process
                surprises += 1
            else:
                load_result = _load_result(loader, path)
                results[load_result.split()[0]] += 1
                if trial.folder and load_result.startswith((DIED, HUNG)):
                    trial.folder.mkdir(parents=True, exist_ok=True)
                    (trial.folder / f"{load_result.split()[0]}-{trial.seed}-{number}.gguf").write_bytes(
                        path.read_bytes()
                    )
            if number % 50 == 0:
                trial.say(f"G14 {number}, {dict(results)}")
    figures = {"refused by the checks": results["checked"], "by llama.cpp": results[REFUSED], "loaded": results[LIVED]}
    ended = results[DIED] + results[HUNG]
    return Result(
        not ended and not surprises, {**figures, "crashed the worker": ended, "crashed the checks": surprises}
    )


def _load_result(loader: subprocess.Popen[str], path: Path) -> str:
    assert loader.stdin is not None
    assert loader.stdout is not None
    loader.stdin.write(f"{path}\n")
    loader.stdin.flush()
    return loader.stdout.readline().strip() or DIED


def disable_header_checks(patch: pytest.MonkeyPatch) -> None:
    """Skip all checks except the number of layers, which bounds the checker's own lists."""
    for check in ("_numbers", "_types", "_tokens"):
        patch.setattr(gguf_checks, check, lambda *_: None)


GATE = Gate(
    name="G14",
    goal="no model file with a wrong header that the checks accept crashes the worker, and no file crashes the checks",
    unit="wrong files",
    commit=600,
    nightly=100_000,
    run=run,
    fault=Fault("the assumptions of llama.cpp are not checked", "gate", disable_header_checks),
    planted=300,
)
