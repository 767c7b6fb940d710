"""Afterword servers for the conformance cases: one with `--strict`, and one with extension fields."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.register_assert_rewrite("cases", "extensions", "probe")


@pytest.fixture(scope="session")
def api(serve: Any) -> Iterator[Any]:
    from probe import Probe

    with serve("--strict", "--parallel", "8") as server, Probe(f"{server.url}/v1", server.key, server.model) as probe:
        yield probe


@pytest.fixture(scope="session")
def extended(serve: Any) -> Iterator[Any]:
    """A server that accepts extension fields."""
    from probe import Probe

    with serve("--parallel", "8") as server, Probe(f"{server.url}/v1", server.key, server.model) as probe:
        yield probe
