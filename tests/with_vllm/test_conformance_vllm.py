"""Afterword with `--strict` passes all cases of tests/conformance over vLLM."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from model_with_bos import check_case
from vllm_server import arguments

sys.path.append(str(Path(__file__).parents[1] / "conformance"))

from cases import CASES
from probe import Probe
from verdict import Case


@pytest.fixture(scope="module")
def api(serve: Any, folder: Path) -> Iterator[Probe]:
    with (
        serve(*arguments(folder, "--parallel", "8", "--strict")) as server,
        Probe(f"{server.url}/v1", server.key, server.model) as probe,
    ):
        yield probe


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.number:02} {case.rule}")
def test_case(case: Case, api: Probe) -> None:
    check_case(case, api)
