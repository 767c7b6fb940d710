"""lm-evaluation-harness with a real model: its answers are right, and their numbers are the oracle's."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

if find_spec("lm_eval") is None:
    pytest.skip("lm-eval is not installed: make clients", allow_module_level=True)

NATS = 0.5
"""The largest difference of a log-likelihood of a few tokens: activations are rounded to 8 bits."""


@pytest.mark.timeout(300)
def test_capitals_are_known_and_have_the_oracles_numbers(real_model: Path, serve: Any, tmp_path: Path) -> None:
    from harness import evaluating
    from judge import Judge
    from threadpoolctl import threadpool_limits

    with serve(str(real_model), "--parallel", "4", key=None) as server, evaluating(server, tmp_path) as evaluate:
        rows = evaluate("capitals", batch_size=4)["capitals"]
    judge = Judge(real_model)
    assert len(rows) == 5
    with threadpool_limits(1):  # the texts are short
        for row in rows:
            assert row["acc"] == 1, row
            for arguments, (answer,) in zip(row["arguments"], row["resps"], strict=True):
                number, greedy = judge.loglikelihood(*arguments)
                assert answer == (pytest.approx(number, abs=NATS), greedy), arguments
