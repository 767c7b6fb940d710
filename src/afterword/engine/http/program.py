"""What the server must know about the worker that uses a vLLM server: its program, and the form of the URL."""

from __future__ import annotations

import sys
from urllib.parse import urlsplit

from afterword.engine.parent.worker_process import WorkerProgram
from afterword.errors import SettingError

UPSTREAM = WorkerProgram((sys.executable, "-m", "afterword.engine.http"))


def base_url(url: str) -> str:
    """The URL of a server, without `/v1` at its end. Raises `SettingError`."""
    base = url.rstrip("/").removesuffix("/v1")
    try:
        parts = urlsplit(base)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that do not match, or a port that is not a number
        valid = False
    if not valid or parts.query or parts.fragment:
        raise SettingError(f"--upstream {url} is not the URL of a server. Write http://HOST:PORT or https://HOST.")
    return base
