"""Two replicas serve all extension fields with the meaning that their conformance cases demand, in both topologies."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_cluster import KEY, deployed

sys.path.append(str(Path(__file__).parents[1] / "conformance"))

from extensions import EXTENSIONS, NOT_ON_THE_BUILT_IN_MODEL, Extension, check_extension
from probe import Probe


@pytest.fixture(scope="module", params=["connections", "prefix"])
def extended(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Probe]:
    with (
        deployed(tmp_path_factory.mktemp("app"), request.param, strict=False) as cluster,
        Probe(f"{cluster.url}/v1", KEY, "afterword-tiny") as probe,
    ):
        yield probe


@pytest.mark.parametrize("case", EXTENSIONS, ids=lambda case: case.field)
def test_a_field_has_its_meaning(case: Extension, extended: Probe) -> None:
    check_extension(case, extended, NOT_ON_THE_BUILT_IN_MODEL)
