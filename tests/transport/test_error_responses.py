"""The error responses of the transport are small, have OpenAI's error object, and are documented."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from afterword.transport import error_responses
from afterword.transport.error_responses import ErrorResponse

REFERENCE = (Path(__file__).resolve().parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
ALL = {name: value for name, value in vars(error_responses).items() if isinstance(value, ErrorResponse)}


@pytest.mark.parametrize("name", ALL)
def test_an_error_response_is_small_and_complete(name: str) -> None:
    head, _, body = ALL[name].response.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0].startswith(f"HTTP/1.1 {ALL[name].status} ")
    assert f"content-length: {len(body)}" in lines
    assert "connection: close" in lines
    assert json.loads(body)["error"].keys() == {"message", "type", "param", "code"}
    assert len(body) < 500
    assert any(line.startswith("retry-after: ") for line in lines) is (ALL[name].status == 503)


@pytest.mark.parametrize("name", ALL)
def test_an_error_response_is_documented(name: str) -> None:
    assert f"| {ALL[name].status} |" in REFERENCE
    assert ALL[name].code is None or f"`{ALL[name].code}`" in REFERENCE
