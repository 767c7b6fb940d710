"""Afterword passes all cases of tests/conformance over vLLM, and refuses the extension fields that it cannot serve."""

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
from extensions import EXTENSIONS, NOT_WITH_VLLM, Extension, check_extension
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


@pytest.fixture(scope="module")
def extended(server: Any) -> Iterator[Probe]:
    with Probe(f"{server.url}/v1", server.key, server.model) as probe:
        yield probe


@pytest.mark.parametrize("case", EXTENSIONS, ids=lambda case: case.field)
def test_a_field_has_its_meaning_or_is_refused_by_name(case: Extension, extended: Probe) -> None:
    check_extension(case, extended, NOT_WITH_VLLM)
