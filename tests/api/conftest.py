"""The servers that several files share, beside the one of the built-in model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from one_text_model import write_parrot

from oracle.tiny import write_tiny


@pytest.fixture(scope="session")
def facts(http: httpx.Client) -> dict[str, Any]:
    """What the built-in model's tokenizer says of itself."""
    facts: dict[str, Any] = http.get("/tokenizer_info").json()
    return facts


@pytest.fixture(scope="session")
def endless(facts: dict[str, Any]) -> dict[str, int]:
    """A bias that keeps a text from ending."""
    return {str(facts["eos_token_id"]): -100}


@pytest.fixture(scope="session")
def one_text_client(serve: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """The model that knows one text, on a server without a key."""
    path = write_parrot(tmp_path_factory.mktemp("models") / "parrot.gguf")
    with serve(str(path), "--parallel", "4", key=None) as server, server.http() as client:
        yield client


@pytest.fixture(scope="session")
def no_infill_client(serve: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A model that cannot fill in the middle, on a server without a key."""
    path = write_tiny(tmp_path_factory.mktemp("models") / "plain.gguf", infill=False)
    with serve(str(path), "--parallel", "2", key=None) as server, server.http() as client:
        yield client


@pytest.fixture(scope="session")
def bos_client(serve: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A model that wants a BOS before a text, on a server without a key."""
    path = write_tiny(tmp_path_factory.mktemp("models") / "spm.gguf", vocabulary="spm")
    with serve(str(path), "--parallel", "2", key=None) as server, server.http() as client:
        yield client
