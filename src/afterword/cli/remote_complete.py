"""Implements `afterword complete --url` for any server that has `/v1/completions`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import httpx2

from afterword.errors import AfterwordError, RequestError, SettingError

_TIMEOUT = httpx2.Timeout(1200, connect=10)  # seconds; a request may wait long in the server's queue


def complete_remotely(url: str, key: str | None, body: dict[str, Any], as_json: bool) -> None:
    """Send a request, and write the text of the response to standard output as it arrives, or the response as JSON.

    Raises `AfterwordError`.
    """
    base = url.rstrip("/").removesuffix("/v1")
    if not base.startswith(("http://", "https://")):
        raise SettingError(f"--url {url} is not an HTTP URL. Write http://HOST:PORT or https://HOST.")
    fields = {name: value for name, value in body.items() if value is not None} | {"stream": not as_json}
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx2.stream(
            "POST", f"{base}/v1/completions", json=fields, headers=headers, timeout=_TIMEOUT
        ) as response:
            if response.status_code >= 400:
                raise _make_error(response.status_code, response.read())
            if as_json:
                sys.stdout.write(response.read().decode())
            else:
                _write_texts(response)
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise AfterwordError(f"The request to {url} failed: {error or type(error).__name__}.") from None
    sys.stdout.write("\n")
    sys.stdout.flush()


def _write_texts(response: httpx2.Response) -> None:
    """Write the texts of a stream. Raises `AfterwordError` for an error event, or a stream without `[DONE]`."""
    for data in parse_events(response.iter_bytes()):
        if data == b"[DONE]":
            return
        try:
            event = json.loads(data)
            problem = event.get("error")
            text = problem["message"] if problem else "".join(choice["text"] for choice in event["choices"])
        except (ValueError, LookupError, TypeError, AttributeError):
            raise AfterwordError("The server's response is not a stream of completions.") from None
        if problem:
            raise AfterwordError(str(text))
        sys.stdout.write(text)
        sys.stdout.flush()
    raise AfterwordError("The response ended before it was complete.")


def parse_events(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the data of server-sent events from pieces of a response, each event as soon as its line is complete.

    A line ends at LF or CR LF only. httpx's `iter_lines` also ends lines at U+2028, U+0085 and form feeds, which the
    JSON of an event may contain unescaped.
    """
    rest = b""
    for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        yield from (line.removeprefix(b"data:").strip() for line in lines if line.startswith(b"data:"))


def _make_error(status: int, body: bytes) -> AfterwordError:
    """Make an error from the server's message: `RequestError` (exit status 2) below 500, else `AfterwordError` (1)."""
    kind = RequestError if status < 500 else AfterwordError
    try:
        return kind(str(json.loads(body)["error"]["message"]))
    except (ValueError, LookupError, TypeError):
        return kind(f"The server responded with status {status}.")
