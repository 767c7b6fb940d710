"""An Afterword server with `--strict`, for the conformance cases."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.register_assert_rewrite("cases", "probe")


@pytest.fixture(scope="session")
def api(serve: Any) -> Iterator[Any]:
    from probe import Probe

    with serve("--strict", "--parallel", "8") as server, Probe(f"{server.url}/v1", server.key, server.model) as probe:
        yield probe
