"""Servers that several test files share, besides the server with the built-in model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from gguf import TokenType
from one_text_model import write_one_text_model

from oracle import tiny
from oracle.tiny import write_tiny


@pytest.fixture(scope="session")
def facts(http: httpx.Client) -> dict[str, Any]:
    """The response of `/tokenizer_info` for the built-in model."""
    facts: dict[str, Any] = http.get("/tokenizer_info").json()
    return facts


@pytest.fixture(scope="session")
def endless(facts: dict[str, Any]) -> dict[str, int]:
    """A `logit_bias` that excludes the end token."""
    return {str(facts["eos_token_id"]): -100}


@pytest.fixture(scope="session")
def one_text_client(serve: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a server without API keys, with the model that generates one fixed text."""
    path = write_one_text_model(tmp_path_factory.mktemp("models") / "one-text.gguf")
    with serve(str(path), "--parallel", "4", key=None) as server, server.http() as client:
        yield client


@pytest.fixture(scope="session")
def no_infill_client(serve: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a server without API keys, with a model without infill tokens."""
    path = write_tiny(tmp_path_factory.mktemp("models") / "plain.gguf", infill=False)
    with serve(str(path), "--parallel", "2", key=None) as server, server.http() as client:
        yield client


@pytest.fixture(scope="session")
def bos_client(serve: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a server without API keys, with a model that needs a BOS before a text."""
    path = write_tiny(tmp_path_factory.mktemp("models") / "spm.gguf", vocabulary="spm")
    with serve(str(path), "--parallel", "2", key=None) as server, server.http() as client:
        yield client


@pytest.fixture(scope="session")
def files_client(serve: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a server without API keys, with a model that has infill tokens and file separators."""
    names = ("<|repo_name|>", "<|file_sep|>")
    words = tiny.with_tokens(
        tiny.byte_vocabulary(infill=True, add_bos=False), *((name, TokenType.CONTROL) for name in names)
    )
    shape = tiny.Shape(context=512)
    path = tmp_path_factory.mktemp("models") / "files.gguf"
    tiny.write_model(path, shape, words, tiny.random_weights(shape, words, 0, False), "F32")
    with serve(str(path), "--parallel", "2", key=None) as server, server.http() as client:
        yield client
