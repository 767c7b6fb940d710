"""Afterword with `--strict` passes all cases of tests/conformance over vLLM."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm_server import arguments

sys.path.append(str(Path(__file__).parents[1] / "conformance"))

from cases import CASES
from probe import Probe
from verdict import Case, NotApplicable

COUNTS_NO_BOS = "a completion may fill the context"
"""It takes the length of the prompt from `usage`, which does not count the BOS that the server adds for this model."""


@pytest.fixture(scope="module")
def api(serve: Any, folder: Path) -> Iterator[Probe]:
    with (
        serve(*arguments(folder, "--parallel", "8", "--strict")) as server,
        Probe(f"{server.url}/v1", server.key, server.model) as probe,
    ):
        yield probe


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.number:02} {case.rule}")
def test_case(case: Case, api: Probe) -> None:
    if case.rule == COUNTS_NO_BOS:
        pytest.skip("the model has a BOS, which usage does not count")
    try:
        case.check(api)
    except NotApplicable as why:
        pytest.skip(str(why))
