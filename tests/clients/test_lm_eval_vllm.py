"""lm-evaluation-harness against a model that vLLM runs: every sample is what an independent forward pass says.

The forward pass reads the same weights in double precision; the model is a random one in float32.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "with_vllm"))

from vllm_server import ENVIRONMENT, PYTHON, WRITE_MODEL, arguments

if find_spec("lm_eval") is None:
    pytest.skip("lm-eval is not installed: make clients", allow_module_level=True)
if not PYTHON:
    pytest.skip("there is no environment with vLLM: make vllm, then make clients", allow_module_level=True)

if TYPE_CHECKING:
    from harness import Evaluate
    from judge import Judge

BOS = 1
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "random-llama"
    subprocess.run([PYTHON, str(WRITE_MODEL), str(path)], check=True, env=_environment())
    return path


@pytest.fixture(scope="module")
def judge(folder: Path) -> Judge:
    from forward_pass import reference
    from judge import Judge
    from tokenizers import Tokenizer

    judge = Judge.__new__(Judge)
    judge.oracle, judge._bos = reference(folder), (BOS,)
    judge.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for name in ("loglikelihood", "rolling", "greedy"):
        setattr(judge, name, cache(getattr(judge, name)))
    return judge


@pytest.fixture(scope="module")
def evaluate(folder: Path, serve: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Evaluate]:
    """The harness' samples by task."""
    from harness import evaluating

    with pytest.MonkeyPatch.context() as patch:
        for name, value in _environment().items():
            patch.setenv(name, value)
        with (
            serve(*arguments(folder, "--parallel", "8", "--bos-before-ids"), key=None) as server,
            evaluating(server, tmp_path_factory.mktemp("hub")) as run,
        ):
            yield run


def _environment() -> dict[str, str]:
    """The environment of vLLM's processes: without the folder of the clients, which has other versions of libraries."""
    folders = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    kept = [each for each in folders if each and not (Path(each) / "lm_eval").exists()]
    return os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(kept)}


@pytest.mark.parametrize(
    "arrangement",
    [
        pytest.param({}, id="tokens"),
        pytest.param({"num_concurrent": 4, "batch_size": 2}, id="tokens-2-by-4"),
        pytest.param({"tokenized_requests": False, "batch_size": 8}, id="texts-by-8"),
    ],
)
def test_every_sample_is_what_the_forward_pass_says(
    evaluate: Evaluate, judge: Judge, arrangement: dict[str, Any]
) -> None:
    from test_lm_eval import check

    check(evaluate("choices", "perplexity", "stories", **arrangement), judge)


def test_long_texts_in_windows(evaluate: Evaluate, judge: Judge) -> None:
    from test_lm_eval import check

    check(evaluate("perplexity", max_length=34, num_concurrent=4), judge, window=32)
