"""Two replicas with `strict` pass all cases of tests/conformance, in both topologies."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_cluster import KEY, Cluster

sys.path.append(str(Path(__file__).parents[1] / "conformance"))

from cases import CASES
from probe import Probe
from verdict import Case, NotApplicable


@pytest.fixture(scope="module")
def api(cluster: Cluster) -> Iterator[Probe]:
    with Probe(f"{cluster.url}/v1", KEY, "afterword-tiny") as probe:
        yield probe


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.number:02} {case.rule}")
def test_case(case: Case, api: Probe) -> None:
    try:
        case.check(api)
    except NotApplicable as why:
        pytest.skip(str(why))
