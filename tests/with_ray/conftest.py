"""Replicas of the server on Ray Serve. Without an environment that has Ray, all tests here are skipped: `make ray`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_cluster import PYTHON, Cluster, deployed

pytest.register_assert_rewrite("cases", "probe")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests without Ray, and give them the time that Ray takes to start."""
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        if not PYTHON:
            reason = "AFTERWORD_RAY_PYTHON names no interpreter of an environment with Ray: make ray"
            item.add_marker(pytest.mark.skip(reason=reason))
        item.add_marker(pytest.mark.timeout(300))


@pytest.fixture(scope="session", params=["connections", "prefix"])
def cluster(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Each topology after the other: pytest runs all tests with one value before those with the next."""
    with deployed(tmp_path_factory.mktemp("app"), request.param) as cluster:
        yield cluster
