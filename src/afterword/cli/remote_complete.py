"""`afterword complete --url`: the same from a server, this one or any other that has the endpoint."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import httpx2

from afterword.errors import AfterwordError, RequestError, SettingError

_TIMEOUT = httpx2.Timeout(1200, connect=10)  # seconds; an answer may have to wait for its turn


def complete_remotely(url: str, key: str | None, body: dict[str, Any], as_json: bool) -> None:
    """Write a server's answer to standard output as it comes, or whole as JSON. Raises `AfterwordError`."""
    base = url.rstrip("/").removesuffix("/v1")
    if not base.startswith(("http://", "https://")):
        raise SettingError(f"--url {url}: write http://HOST:PORT or https://HOST.")
    given = {name: value for name, value in body.items() if value is not None} | {"stream": not as_json}
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx2.stream("POST", f"{base}/v1/completions", json=given, headers=headers, timeout=_TIMEOUT) as answer:
            if answer.status_code >= 400:
                raise _problem(answer.status_code, answer.read())
            if as_json:
                sys.stdout.write(answer.read().decode())
            else:
                _write(answer)
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise AfterwordError(f"{url} cannot be asked: {error or type(error).__name__}.") from None
    sys.stdout.write("\n")
    sys.stdout.flush()


def _write(answer: httpx2.Response) -> None:
    """The texts of a stream. Raises `AfterwordError` if it ends before its end."""
    for data in parse_events(answer.iter_bytes()):
        if data == b"[DONE]":
            return
        try:
            event = json.loads(data)
            problem = event.get("error")
            text = problem["message"] if problem else "".join(choice["text"] for choice in event["choices"])
        except (ValueError, LookupError, TypeError, AttributeError):
            raise AfterwordError("This is no server of completions: its answer is none.") from None
        if problem:
            raise AfterwordError(str(text))
        sys.stdout.write(text)
        sys.stdout.flush()
    raise AfterwordError("The answer broke off before its end.")


def parse_events(parts: Iterable[bytes]) -> Iterator[bytes]:
    """The data of server-sent events, which come in parts, each as soon as its line is whole.

    A line ends at LF or CR LF only. httpx's `iter_lines` ends one at U+2028, U+0085 and form feeds too, which stand in
    the JSON of an event as they are.
    """
    rest = b""
    for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        yield from (line.removeprefix(b"data:").strip() for line in lines if line.startswith(b"data:"))


def _problem(status: int, body: bytes) -> AfterwordError:
    """What the server says is wrong; whose fault it is decides how the command ends."""
    kind = RequestError if status < 500 else AfterwordError
    try:
        return kind(str(json.loads(body)["error"]["message"]))
    except (ValueError, LookupError, TypeError):
        return kind(f"The server answered {status}.")
