"""A server that is asked over HTTP, whoever's it is. What it says is told apart by whether another try is worth it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import httpx2
import msgspec

from afterword.batch.output_lines import SendRequest, ServerReply
from afterword.errors import BatchStopped, SettingError

_TIMEOUT = httpx2.Timeout(1200, connect=10)  # seconds; an answer may have to wait for its turn
_CONNECTION_ERRORS = (httpx2.TransportError, httpx2.StreamError)


@asynccontextmanager
async def http_client(url: str, key: str | None, at_once: int) -> AsyncIterator[SendRequest]:
    """Connections to the server at a base URL, with or without its `/v1`. Raises `SettingError`."""
    base = url.rstrip("/").removesuffix("/v1")
    if not _is_server(base):
        raise SettingError(f"--url {url}: write http://HOST:PORT or https://HOST.")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    limits = httpx2.Limits(max_connections=at_once, max_keepalive_connections=at_once, keepalive_expiry=20)

    async def ask(method: str, path: str, body: bytes) -> ServerReply:
        content = {"content": body, "headers": {"content-type": "application/json"}} if body else {}
        try:
            answer = await client.request(method, path, **content)  # type: ignore[arg-type]
        except _CONNECTION_ERRORS:
            return ServerReply(0, b"", retry=True)
        return classify_reply(answer.status_code, answer.content, dict(answer.headers))

    async with httpx2.AsyncClient(base_url=base, headers=headers, timeout=_TIMEOUT, limits=limits) as client:
        yield ask


def _is_server(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of brackets or of the port
        return False


def classify_reply(status: int, body: bytes, headers: dict[str, str]) -> ServerReply:
    """What an answer is worth.

    Names of headers are in lower case. Raises `BatchStopped` where all rows would fail alike.
    """
    code, message = _problem(body) if status >= 400 else ("", "")
    if status in (401, 403) or code == "insufficient_quota":
        raise BatchStopped(f"The server lets nothing more in: {message or status} What is done is kept.")
    return ServerReply.from_response(status, body, headers)


def _problem(body: bytes) -> tuple[str, str]:
    """The code and the sentence of an error, as far as it has them."""
    try:
        error = msgspec.json.decode(body)["error"]
        return str(error["code"]), str(error["message"])[:300]
    except (msgspec.MsgspecError, UnicodeDecodeError, LookupError, TypeError):
        return "", ""
