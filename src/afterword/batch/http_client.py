"""The HTTP client of `afterword batch --url`, for any server that has `/v1/completions`.

It sends one request and returns one `ServerReply`. It does not retry: `batch_job.py` does, as the reply states.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import httpx2
import msgspec

from afterword.batch.output_lines import SendRequest, ServerReply
from afterword.errors import BatchStopped, SettingError

_TIMEOUT = httpx2.Timeout(1200, connect=10)  # seconds; a request may wait long in the server's queue
_CONNECTION_ERRORS = (httpx2.TransportError, httpx2.StreamError)


@asynccontextmanager
async def http_client(url: str, key: str | None, concurrency: int) -> AsyncIterator[SendRequest]:
    """Open a client for the server at `url`, with or without `/v1` at its end, and at most `concurrency` connections.

    Raises `SettingError` if `url` is not an HTTP URL.
    """
    base = url.rstrip("/").removesuffix("/v1")
    if not _is_server(base):
        raise SettingError(f"--url {url} is not an HTTP URL. Write http://HOST:PORT or https://HOST.")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    limits = httpx2.Limits(max_connections=concurrency, max_keepalive_connections=concurrency, keepalive_expiry=20)

    async def send_request(method: str, path: str, body: bytes) -> ServerReply:
        content = {"content": body, "headers": {"content-type": "application/json"}} if body else {}
        try:
            response = await client.request(method, path, **content)  # type: ignore[arg-type]
        except _CONNECTION_ERRORS:
            return ServerReply(0, b"", retry=True)
        return classify_reply(response.status_code, response.content, dict(response.headers))

    async with httpx2.AsyncClient(base_url=base, headers=headers, timeout=_TIMEOUT, limits=limits) as client:
        yield send_request


def _is_server(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that do not match, or a port that is not a number
        return False


def classify_reply(status: int, body: bytes, headers: dict[str, str]) -> ServerReply:
    """Make a reply from a response. Names of headers are in lower case.

    Raises `BatchStopped` if every other request would get the same error: the key is refused, or its quota is used up.
    """
    code, message = _error_details(body) if status >= 400 else ("", "")
    if status in (401, 403) or code == "insufficient_quota":
        reason = message or f"HTTP status {status}."
        raise BatchStopped(f"The server refuses further requests: {reason} All answers so far are kept.")
    return ServerReply.from_response(status, body, headers)


def _error_details(body: bytes) -> tuple[str, str]:
    """Return `code` and `message` of an error in OpenAI's form, or two empty strings."""
    try:
        error = msgspec.json.decode(body)["error"]
        return str(error["code"]), str(error["message"])[:300]
    except (msgspec.MsgspecError, UnicodeDecodeError, LookupError, TypeError):
        return "", ""
