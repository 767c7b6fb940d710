"""What the server must know about the worker that uses a vLLM server: its program, and the form of the URL."""

from __future__ import annotations

import sys
from urllib.parse import urlsplit

from afterword.engine.parent.worker_process import WorkerProgram
from afterword.errors import SettingError

UPSTREAM = WorkerProgram((sys.executable, "-m", "afterword.engine.http"))


def base_url(url: str) -> str:
    """The URL of a server, without `/v1` at its end. Raises `SettingError`."""
    if "@" in url:  # the message does not repeat the URL, which may contain a password
        raise SettingError(
            "--upstream must have no user name and no password (no @). The API key belongs in --upstream-key-file FILE."
        )
    base = url.rstrip("/").removesuffix("/v1")
    if not _is_server(base):
        raise SettingError(f"--upstream {url!r} is not the URL of a server. Write http://HOST:PORT or https://HOST.")
    return base


def _is_server(url: str) -> bool:
    """Whether the client of the worker takes this URL, and the system this host name."""
    import httpx2  # only here, because other engines do not need it at their start

    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        # Sockets encode a name in this way: its labels have 1 to 63 characters.
        httpx2.URL(url).raw_host.decode().encode("idna")
    except (httpx2.InvalidURL, ValueError):  # such as brackets that do not match, or a port that is not a number
        return False
    return valid and not set(url) & set(" ?#")
